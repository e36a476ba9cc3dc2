"""What the pocket models are trained on beside the pocket tasks: simpler questions, attributes, and what is named."""

from __future__ import annotations

from collections import Counter
from typing import Literal, get_args

import numpy as np

from mmtok_bench.pocket import questions
from mmtok_bench.pocket.questions import Question, choose, plural, things_alone
from mmtok_bench.pocket.scenes import COLOR_RGB, DIGITS, SHAPES, Scene

__all__ = ["KINDS", "NAMING_WORDS", "Kind", "ask", "named_items"]

Kind = Literal["existence", "simple", "count", "position", "reading", "attribute"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_CHARACTER_KINDS = ("digit", "letter")
_SINGULAR = {plural(shape): shape for shape in SHAPES}

NAMING_WORDS = (*COLOR_RGB, *SHAPES, *_SINGULAR, *_CHARACTER_KINDS)
"""The words by which questions name things and characters."""


def ask(rng: np.random.Generator, scene: Scene, kind: Kind) -> Question | None:
    """Returns a question of `kind` about the scene, or None where the scene has nothing of the kind to ask for."""
    if kind == "simple":
        return _ask_simple(rng, scene)
    if kind == "attribute":
        return _ask_attribute(rng, scene)
    return questions.ask(rng, scene, kind)


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
    word = choose(rng, choices)
    what = word if words is SHAPES else f"{word} thing"
    return Question("simple", f"Is there a {what} in the image?", "yes" if is_there else "no")


def _ask_attribute(rng: np.random.Generator, scene: Scene) -> Question | None:
    by_color, by_shape = Counter(thing.color for thing in scene.things), Counter(thing.shape for thing in scene.things)
    alone = set(things_alone(scene))
    questions = [
        *((f"What color is the {thing.shape}?", thing.color) for thing in scene.things if by_shape[thing.shape] == 1),
        *((f"What shape is {thing.color}?", thing.shape) for thing in scene.things if by_color[thing.color] == 1),
        *((f"What size is the {thing.color} {thing.shape}?", thing.size) for thing in scene.things if thing in alone),
    ]
    if not questions:
        return None
    text, answer = choose(rng, questions)
    return Question("attribute", text, answer)
