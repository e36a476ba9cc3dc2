"""Questions: every answer is checked against the scene by the question's words alone."""

import re

import numpy as np
import pytest

from mmtok_bench.pocket.questions import NEGATIVES, Negative, Question, ask_existence
from mmtok_bench.pocket.scenes import COLOR_RGB, DIGITS, SCENE_PX, SHAPES, Glyph, Scene, Thing, make_scene
from pocket_training.questions import KINDS, Kind, ask, named_items
from pocket_training.words import word_tokenizer

SCENE = Scene(
    things=(
        Thing("red", "circle", "large", 30, 30, 30),
        Thing("blue", "cross", "small", 80, 20, 16),
        Thing("red", "square", "small", 90, 90, 16),
        Thing("blue", "cross", "large", 30, 85, 32),
    ),
    glyphs=(Glyph("7", 60, 60, is_dark=True),),
    background_seed=1,
)


def questions(kind: Kind, num_scenes: int = 150) -> list[tuple[Scene, Question]]:
    asked = []
    for index in range(num_scenes):
        rng = np.random.default_rng([1, index])
        scene = make_scene(rng)
        question = ask(rng, scene, kind)
        if question is not None:
            asked.append((scene, question))
    return asked


def things(scene: Scene, words: str) -> list[Thing]:
    """The things that every colour and shape among `words` is true of."""
    colors = [color for color in COLOR_RGB if color in words]
    shapes = [shape for shape in SHAPES if shape in words]
    return [
        thing
        for thing in scene.things
        if (not colors or thing.color in colors) and (not shapes or thing.shape in shapes)
    ]


@pytest.mark.parametrize("kind", ["existence", "simple"])
def test_existence_is_true_and_balanced(kind: Kind) -> None:
    asked = questions(kind)
    for scene, question in asked:
        assert question.answer == ("yes" if things(scene, question.text) else "no")
    share_of_yes = np.mean([question.answer == "yes" for _, question in asked])
    assert 0.38 < share_of_yes < 0.62


def test_counts_are_true() -> None:
    for scene, question in questions("count"):
        assert len(things(scene, question.text)) == int(question.answer)


def test_positions_are_true() -> None:
    for scene, question in questions("position"):
        (thing,) = things(scene, question.text)
        rows = "top" if thing.y < SCENE_PX / 2 else "bottom"
        columns = "left" if thing.x < SCENE_PX / 2 else "right"
        assert question.answer == f"{rows} {columns}"


def test_what_is_read_is_there() -> None:
    for scene, question in questions("reading"):
        assert question.answer in {glyph.character for glyph in scene.glyphs}
        assert ("digit" in question.text) == (question.answer in DIGITS)


def test_attributes_are_true() -> None:
    for scene, question in questions("attribute"):
        (thing,) = things(scene, question.text)
        asked = re.match(r"What (color|shape|size)", question.text)
        assert asked is not None
        assert question.answer == getattr(thing, asked[1])


@pytest.mark.parametrize("negative", NEGATIVES)
def test_a_negative_is_absent_and_of_its_sort(negative: Negative) -> None:
    for seed in range(60):
        question = ask_existence(np.random.default_rng(seed), SCENE, negative)
        assert question is not None
        assert (question.answer, question.negative) == ("no", negative)
        assert not things(SCENE, question.text)
        color = next(color for color in COLOR_RGB if color in question.text)
        shape = next(shape for shape in SHAPES if shape in question.text)
        if negative == "adversarial":
            assert (color, shape) in {("red", "cross"), ("blue", "circle"), ("blue", "square")}
        if negative == "popular":
            assert color in list(COLOR_RGB)[:3]
            assert shape in SHAPES[:3]


def test_a_thing_that_is_not_alone_is_not_asked_for() -> None:
    texts = {ask(np.random.default_rng(seed), SCENE, "position") for seed in range(60)}
    assert not any("blue cross" in question.text for question in texts if question)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Is there a red thing in the image?", [0, 2]),
        ("Is there a blue cross in the image?", [1, 3]),
        ("Is there a blue circle in the image?", []),
        ("How many crosses are in the image?", [1, 3]),
        ("What color is the square?", [2]),
        ("What digit is in the image?", [4]),
        ("What letter is in the image?", []),
        ("What is in the image?", []),
    ],
)
def test_what_a_question_names(text: str, named: list[int]) -> None:
    assert named_items(SCENE, text) == named


def test_a_scene_without_characters_has_nothing_to_read() -> None:
    assert ask(np.random.default_rng(0), Scene(SCENE.things, (), 1), "reading") is None


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = word_tokenizer(["<unk>"])
    for kind in KINDS:
        for _, question in questions(kind):
            assert tokenizer.unk_token_id not in tokenizer(f"{question.text} {question.answer}")["input_ids"]
