"""Questions for the training of the pocket models, and a picture with sample scenes and questions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmtok_bench.pocket import questions
from mmtok_bench.pocket.pages import Page, make_page
from mmtok_bench.pocket.questions import Question, ask_about, choose, plural, render, things_alone
from mmtok_bench.pocket.scenes import COLOR_RGB, SCENE_PX, SHAPES, Scene, make_scene

__all__ = ["KINDS", "NAMING_WORDS", "Kind", "ask", "draw_sheet", "named_items"]

Kind = Literal["existence", "simple", "count", "position", "reading", "attribute"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_COLUMNS, _ROWS = 4, 2
_SCALE = 3
_MARGIN_PX = 12
_TEXT_PX = 26

_CHARACTER_KINDS = ("digit", "letter")
_SINGULAR = {plural(shape): shape for shape in SHAPES}

NAMING_WORDS = (*COLOR_RGB, *SHAPES, *_SINGULAR, *_CHARACTER_KINDS)
"""The words by which questions name things and characters."""


def ask(rng: np.random.Generator, scene: Scene, kind: Kind) -> Question | None:
    """Returns a question of `kind` about the scene, or None if the scene allows no such question."""
    if kind == "simple":
        return _ask_simple(rng, scene)
    if kind == "attribute":
        return _ask_attribute(rng, scene)
    return questions.ask(rng, scene, kind)


def named_items(scene: Scene, text: str) -> list[int]:
    """Returns the indices, into things followed by glyphs, of the items that a question's naming words describe."""
    words = set(text.lower().replace("?", " ").split())
    named = {_SINGULAR.get(word, word) for word in words} & {*COLOR_RGB, *SHAPES, *_CHARACTER_KINDS}
    items = [{thing.color, thing.shape} for thing in scene.things]
    items += [{glyph.kind} for glyph in scene.glyphs]
    return [index for index, item in enumerate(items) if named and named <= item]


def _ask_simple(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Asks whether there is a colour, or a shape."""
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


def draw_sheet(path: Path, *, seed: int, pages: bool = False) -> Path:
    """Writes eight scenes or pages drawn from `seed`, each with a question and its answer, as a PNG; returns `path`."""
    cell_width, cell_height = SCENE_PX * _SCALE + _MARGIN_PX, SCENE_PX * _SCALE + _MARGIN_PX + _TEXT_PX
    sheet = Image.new("RGB", (_COLUMNS * cell_width + _MARGIN_PX, _ROWS * cell_height + _MARGIN_PX), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number in range(_COLUMNS * _ROWS):
        rng = np.random.default_rng([seed, number])
        scene = make_page(rng) if pages else make_scene(rng)
        left = _MARGIN_PX + number % _COLUMNS * cell_width
        top = _MARGIN_PX + number // _COLUMNS * cell_height
        sheet.paste(render(scene, _SCALE), (left, top))
        kind = KINDS[number % len(KINDS)]
        question = ask_about(choose(rng, scene.entries)) if isinstance(scene, Page) else ask(rng, scene, kind)
        if question is not None:
            pen.text(
                (left, top + SCENE_PX * _SCALE + 4), f"{question.text}  {question.answer}", fill="black", font=font
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
