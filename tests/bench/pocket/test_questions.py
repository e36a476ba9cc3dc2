from __future__ import annotations

import itertools
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from mmtok_bench.pocket.questions import (
    HELD_OUT,
    KINDS,
    Negative,
    fingerprint,
    make_scenes,
    picture_of,
    scene_at,
)
from mmtok_bench.pocket.scenes import make_scene
from pocket_training.training import STAGES

# The fingerprint of make_scenes(0, 170), with NumPy 2 and Pillow 12. A change means other questions or other pixels:
# scores made before it are no longer comparable, and the pocket model was not trained on what is drawn now.
FINGERPRINT = "fe9b38e9e4a4"


def test_questions_and_pixels_are_those_of_the_recorded_scores() -> None:
    assert fingerprint(make_scenes(0, 170)) == FINGERPRINT


def test_fingerprint_tells_questions_and_pixels_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = make_scenes(0, 3)
    assert fingerprint(scenes) != fingerprint(make_scenes(1, 3))
    before = fingerprint(scenes)
    drawn = picture_of(scenes[0].scene).point(lambda value: value ^ 1)
    monkeypatch.setattr("mmtok_bench.pocket.questions.picture_of", lambda scene: drawn)
    assert fingerprint(scenes) != before


@pytest.mark.parametrize("num_questions", [1, 20])
def test_as_many_of_each_kind_as_asked_for(num_questions: int) -> None:
    scenes = make_scenes(3, num_questions)
    counts = Counter(question.kind for asked in scenes for question in asked.questions)
    assert counts == dict.fromkeys(KINDS, num_questions)
    for asked in scenes:
        assert len({question.text for question in asked.questions}) == len(asked.questions)


def test_existence_is_balanced_in_each_of_popes_settings() -> None:
    answers: dict[str, Counter[str]] = {}
    for asked in make_scenes(0, 120, ["existence"]):
        for question, setting in zip(asked.questions, asked.settings, strict=True):
            answers.setdefault(setting, Counter())[question.answer] += 1
            assert question.negative in (None, setting)
    assert sum(answers.values(), Counter()) == {"yes": 60, "no": 60}
    assert set(answers) == set(get_args(Negative))
    assert all(found["yes"] == found["no"] > 10 for found in answers.values())


def test_fewer_questions_are_the_first_of_more() -> None:
    few, many = make_scenes(0, 10), make_scenes(0, 40)
    for kind in KINDS:
        of_few, of_many = (
            [question for asked in scenes for question in asked.questions if question.kind == kind]
            for scenes in (few, many)
        )
        assert of_many[:10] == of_few


def test_leaving_out_a_kind_changes_no_other_question() -> None:
    alone = {asked.index: asked.questions for asked in make_scenes(0, 12, ["count"])}
    for asked in make_scenes(0, 12):
        counts = tuple(question for question in asked.questions if question.kind == "count")
        assert counts == alone.get(asked.index, ())


def test_no_training_scene_is_held_out() -> None:
    # Training seeds a scene by [seed, 1 + stage, index].
    assert len(STAGES) < HELD_OUT
    places = itertools.product(range(3), range(len(STAGES)), range(40))
    trained = {make_scene(np.random.default_rng([seed, 1 + stage, index])) for seed, stage, index in places}
    held_out = {scene_at(seed, index) for seed in range(3) for index in range(40)}
    assert len(held_out) == 120
    assert not trained & held_out


@pytest.mark.parametrize(
    ("kinds", "num_questions", "message"),
    [([], 3, "got none"), (["attribute"], 3, "got attribute"), (["count"], 0, "at least 1 question")],
)
def test_what_cannot_be_asked(kinds: list[str], num_questions: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scenes(0, num_questions, kinds)  # type: ignore[arg-type]
