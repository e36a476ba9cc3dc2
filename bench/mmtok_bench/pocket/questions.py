"""Questions about a scene and their answers: POPE's existence, counts, positions, reading, attributes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar, get_args

import numpy as np

from mmtok_bench.pocket.scenes import COLOR_RGB, DIGITS, SCENE_PX, SHAPES, Scene, Thing

__all__ = ["KINDS", "NAMING_WORDS", "NEGATIVES", "Kind", "Negative", "Question", "ask", "ask_existence", "named_items"]

Kind = Literal["existence", "simple", "count", "position", "reading", "attribute"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Negative = Literal["random", "popular", "adversarial"]
NEGATIVES: tuple[Negative, ...] = get_args(Negative)

_PAIRS = tuple(product(COLOR_RGB, SHAPES))
# The most frequent pairs of the scenes: the first three colours and shapes by their weights.
_POPULAR = tuple(product(list(COLOR_RGB)[:3], SHAPES[:3]))
_MAX_COUNT = 4
_CHARACTER_KINDS = ("digit", "letter")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the answer that is right, and its kind; for existence, how a "no" was chosen."""

    kind: Kind
    text: str
    answer: str
    negative: Negative | None = None


def ask(rng: np.random.Generator, scene: Scene, kind: Kind) -> Question | None:
    """Returns a question of `kind` about the scene, or None where the scene has nothing of the kind to ask for."""
    if kind == "existence":
        negative = NEGATIVES[rng.integers(len(NEGATIVES))]
        return ask_existence(rng, scene, None if rng.random() < 0.5 else negative)
    return _ASKERS[kind](rng, scene)


def ask_existence(rng: np.random.Generator, scene: Scene, negative: Negative | None) -> Question | None:
    """Returns a question for a thing that is there, or (`negative`) for one that is not, chosen as POPE does.

    Args:
        rng: Draws the thing.
        scene: Asked about.
        negative: None for a thing that is there. "random": any that is not; "popular": a frequent one that is not;
            "adversarial": one whose colour and whose shape are there, but not together.

    Source: POPE (arXiv 2305.10355, section 5), with co-occurring taken as sharing colour and shape.
    """
    present = {(thing.color, thing.shape) for thing in scene.things}
    colors, shapes = {color for color, _ in present}, {shape for _, shape in present}
    absent = {
        None: sorted(present),
        "random": [pair for pair in _PAIRS if pair not in present],
        "popular": [pair for pair in _POPULAR if pair not in present],
        "adversarial": [pair for pair in _PAIRS if pair not in present and pair[0] in colors and pair[1] in shapes],
    }[negative]
    if not absent:
        return None
    color, shape = _one_of(rng, absent)
    return Question(
        "existence", f"Is there a {color} {shape} in the image?", "yes" if negative is None else "no", negative
    )


def named_items(scene: Scene, text: str) -> list[int]:
    """Returns the indices, into things followed by glyphs, of what a question's words are true of, all together."""
    words = set(text.lower().replace("?", " ").split())
    named = {_SINGULAR.get(word, word) for word in words} & {*COLOR_RGB, *SHAPES, *_CHARACTER_KINDS}
    items = [{thing.color, thing.shape} for thing in scene.things]
    items += [{"digit" if glyph.character in DIGITS else "letter"} for glyph in scene.glyphs]
    return [index for index, item in enumerate(items) if named and named <= item]


def _ask_simple(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Asks for a colour or a shape alone."""
    if rng.random() < 0.5:
        words, present = tuple(COLOR_RGB), {thing.color for thing in scene.things}
    else:
        words, present = SHAPES, {thing.shape for thing in scene.things}
    is_there = rng.random() < 0.5
    choices = [word for word in words if (word in present) == is_there]
    if not choices:
        return None
    word = _one_of(rng, choices)
    what = word if words is SHAPES else f"{word} thing"
    return Question("simple", f"Is there a {what} in the image?", "yes" if is_there else "no")


def _ask_count(rng: np.random.Generator, scene: Scene) -> Question | None:
    # By the answer first: else most answers were 0 or 1.
    by_color, by_shape = Counter(thing.color for thing in scene.things), Counter(thing.shape for thing in scene.things)
    counts = {f"{color} things": by_color[color] for color in COLOR_RGB} | {
        _plural(shape): by_shape[shape] for shape in SHAPES
    }
    answers = sorted({count for count in counts.values() if count <= _MAX_COUNT})
    answer = answers[rng.integers(len(answers))]
    what = _one_of(rng, [what for what, count in counts.items() if count == answer])
    return Question("count", f"How many {what} are in the image?", str(answer))


def _ask_position(rng: np.random.Generator, scene: Scene) -> Question | None:
    alone = _alone(scene)
    if not alone:
        return None
    thing = _one_of(rng, alone)
    vertical = "top" if thing.y < SCENE_PX / 2 else "bottom"
    horizontal = "left" if thing.x < SCENE_PX / 2 else "right"
    return Question("position", f"Where is the {thing.color} {thing.shape}?", f"{vertical} {horizontal}")


def _ask_reading(rng: np.random.Generator, scene: Scene) -> Question | None:
    if not scene.glyphs:
        return None
    character = _one_of(rng, scene.glyphs).character
    kind = "digit" if character in DIGITS else "letter"
    return Question("reading", f"What {kind} is in the image?", character)


def _ask_attribute(rng: np.random.Generator, scene: Scene) -> Question | None:
    by_color, by_shape = Counter(thing.color for thing in scene.things), Counter(thing.shape for thing in scene.things)
    alone = set(_alone(scene))
    questions = [
        *((f"What color is the {thing.shape}?", thing.color) for thing in scene.things if by_shape[thing.shape] == 1),
        *((f"What shape is {thing.color}?", thing.shape) for thing in scene.things if by_color[thing.color] == 1),
        *((f"What size is the {thing.color} {thing.shape}?", thing.size) for thing in scene.things if thing in alone),
    ]
    if not questions:
        return None
    text, answer = _one_of(rng, questions)
    return Question("attribute", text, answer)


_ASKERS: dict[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "simple": _ask_simple,
    "count": _ask_count,
    "position": _ask_position,
    "reading": _ask_reading,
    "attribute": _ask_attribute,
}


def _alone(scene: Scene) -> list[Thing]:
    pairs = Counter((thing.color, thing.shape) for thing in scene.things)
    return [thing for thing in scene.things if pairs[thing.color, thing.shape] == 1]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _one_of(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


_SINGULAR = {_plural(shape): shape for shape in SHAPES}

NAMING_WORDS = (*COLOR_RGB, *SHAPES, *_SINGULAR, *_CHARACTER_KINDS)
"""The words by which questions name things and characters."""
