"""Pages: the same from the same seed, characters apart and inside, and questions whose answers are on the page."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from mmtok_bench.pocket.pages import TEXT_PX, draw_page, make_page
from mmtok_bench.pocket.questions import PAGE_KINDS, fingerprint, make_scenes, page_at
from mmtok_bench.pocket.scenes import COLOR_RGB, SCENE_PX
from pocket_training.training import STAGES_ON_PAGES
from pocket_training.training_data import TASKS

# The fingerprint of make_scenes(0, 100, PAGE_KINDS), with NumPy 2 and Pillow 12. If it changes, so do the questions:
# scores made before it are no longer comparable, and the pocket model was not trained on what is drawn now.
FINGERPRINT = "53686c8f891c"


def test_questions_and_pixels_are_those_of_the_published_scores() -> None:
    assert fingerprint(make_scenes(0, 100, PAGE_KINDS)) == FINGERPRINT


@pytest.mark.parametrize("seed", range(10))
def test_characters_are_apart_inside_and_drawn_where_they_stand(seed: int) -> None:
    page = page_at(seed, 3)
    assert page == page_at(seed, 3) != page_at(seed, 4)
    boxes = [(glyph.x, glyph.y, glyph.size_px) for glyph in page.glyphs]
    for x, y, size_px in boxes:
        assert size_px / 2 < x < SCENE_PX - size_px / 2
        assert size_px / 2 < y < SCENE_PX - size_px / 2
    for (x, y, size_px), (other_x, other_y, other_px) in combinations(boxes, 2):
        mean_px = (size_px + other_px) / 2
        assert abs(y - other_y) >= mean_px or abs(x - other_x) >= 0.8 * mean_px
    pixels = np.asarray(draw_page(page, 4)).astype(int)
    for entry in page.entries:
        for glyph in entry.glyphs:
            half = 2 * glyph.size_px * 0.8
            box = [round(4 * place + side * half) for place in (glyph.y, glyph.x) for side in (-1, 1)]
            shown = pixels[box[0] : box[1], box[2] : box[3]].reshape(-1, 3)
            if glyph is entry.label:
                assert np.abs(shown - COLOR_RGB[page.label_color]).max(1).min() <= 1
            else:
                assert shown.max(1).min() < 70


def test_every_question_has_one_answer_on_its_page() -> None:
    for asked in make_scenes(1, 40, PAGE_KINDS):
        labels = [entry.label.character for entry in asked.scene.entries]  # type: ignore[union-attr]
        assert len(set(labels)) == len(labels)
        for question in asked.questions:
            (entry,) = (
                entry
                for entry in asked.scene.entries  # type: ignore[union-attr]
                if question.text == f"What is right of {entry.label.character}?"
            )
            assert question.answer.split() == [glyph.character for glyph in entry.value]
            assert question.kind == f"{entry.size}-text"
            assert all(glyph.size_px == TEXT_PX[entry.size] for glyph in entry.glyphs)
            assert [glyph.x for glyph in entry.glyphs] == sorted(glyph.x for glyph in entry.glyphs)
            assert len({glyph.y for glyph in entry.glyphs}) == 1


def test_as_many_questions_of_each_size_as_asked_for() -> None:
    scenes = make_scenes(3, 20, PAGE_KINDS)
    assert Counter(question.kind for asked in scenes for question in asked.questions) == dict.fromkeys(PAGE_KINDS, 20)
    alone = {asked.index: asked.questions for asked in make_scenes(3, 10, ["small-text"])}
    for asked in make_scenes(3, 10, PAGE_KINDS):
        small = tuple(question for question in asked.questions if question.kind == "small-text")
        assert small == alone.get(asked.index, ())


def test_no_training_page_is_held_out() -> None:
    tasks = [TASKS[stage.task] for stage in STAGES_ON_PAGES]
    trained = {make_page(np.random.default_rng([0, task, index])) for task in tasks for index in range(60)}
    assert not trained & {page_at(0, index) for index in range(60)}


def test_pages_and_scenes_are_not_asked_about_together() -> None:
    with pytest.raises(ValueError, match="got count, small-text"):
        make_scenes(0, 3, ["count", "small-text"])
