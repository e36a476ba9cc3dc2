"""The pocket tasks: questions about held-out scenes and their answers, generated from a seed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Literal, TypeVar, get_args

import numpy as np
from PIL import Image

from mmtok_bench.pocket.pages import Entry, Page, draw_page, make_page
from mmtok_bench.pocket.scenes import COLOR_RGB, SCENE_PX, SHAPES, Scene, Thing, draw, make_scene

__all__ = [
    "HELD_OUT",
    "KINDS",
    "NEGATIVES",
    "PAGE_KINDS",
    "AskedScene",
    "Kind",
    "Negative",
    "Question",
    "ask",
    "ask_about",
    "ask_existence",
    "check_kinds",
    "choose",
    "render",
    "fingerprint",
    "make_scenes",
    "page_at",
    "picture_of",
    "plural",
    "scene_at",
    "things_alone",
]

Kind = Literal["existence", "count", "position", "reading", "small-text", "medium-text", "large-text"]
KINDS: tuple[Kind, ...] = ("existence", "count", "position", "reading")
"""Kinds of questions about scenes."""
PAGE_KINDS: tuple[Kind, ...] = ("small-text", "medium-text", "large-text")
"""Kinds of questions about pages, by the size of the characters that are asked about."""
Negative = Literal["random", "popular", "adversarial"]
NEGATIVES: tuple[Negative, ...] = get_args(Negative)

_PAIRS = tuple(product(COLOR_RGB, SHAPES))
# The most frequent pairs of the scenes: the first three colours and shapes have the largest weights.
_POPULAR = tuple(product(list(COLOR_RGB)[:3], SHAPES[:3]))
_MAX_COUNT = 4
_T = TypeVar("_T")

HELD_OUT = 1000
"""The second part of a scene's seed. Training uses the number of its stage here, so no scene below was trained on."""

_A_KIND_AND_SCENE = 2
_TRIES = 6


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its right answer and its kind; for existence, how a thing that is absent was chosen."""

    kind: str
    text: str
    answer: str
    negative: Negative | None = None


def ask(rng: np.random.Generator, scene: Scene, kind: Kind) -> Question | None:
    """Returns a question of `kind` about the scene; None if the scene allows no such question."""
    if kind == "existence":
        negative = NEGATIVES[rng.integers(len(NEGATIVES))]
        return ask_existence(rng, scene, None if rng.random() < 0.5 else negative)
    return _ASKERS[kind](rng, scene)


def ask_existence(rng: np.random.Generator, scene: Scene, negative: Negative | None) -> Question | None:
    """Returns a question about a thing that is present, or (`negative`) about an absent one, chosen as in POPE.

    Args:
        rng: Draws the thing.
        scene: The scene.
        negative: None for a thing that is present. "random": any absent thing; "popular": a frequent thing that is
            absent; "adversarial": an absent thing whose colour and whose shape are present in other things.

    Source: POPE (arXiv 2305.10355, section 5); things co-occur here if they share a colour or a shape.
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
    color, shape = choose(rng, absent)
    return Question(
        "existence", f"Is there a {color} {shape} in the image?", "yes" if negative is None else "no", negative
    )


def _ask_count(rng: np.random.Generator, scene: Scene) -> Question | None:
    # Draws the answer first: otherwise most answers would be 0 or 1.
    by_color, by_shape = Counter(thing.color for thing in scene.things), Counter(thing.shape for thing in scene.things)
    counts = {f"{color} things": by_color[color] for color in COLOR_RGB} | {
        plural(shape): by_shape[shape] for shape in SHAPES
    }
    answers = sorted({count for count in counts.values() if count <= _MAX_COUNT})
    answer = answers[rng.integers(len(answers))]
    what = choose(rng, [what for what, count in counts.items() if count == answer])
    return Question("count", f"How many {what} are in the image?", str(answer))


def _ask_position(rng: np.random.Generator, scene: Scene) -> Question | None:
    alone = things_alone(scene)
    if not alone:
        return None
    thing = choose(rng, alone)
    vertical = "top" if thing.y < SCENE_PX / 2 else "bottom"
    horizontal = "left" if thing.x < SCENE_PX / 2 else "right"
    return Question("position", f"Where is the {thing.color} {thing.shape}?", f"{vertical} {horizontal}")


def _ask_reading(rng: np.random.Generator, scene: Scene) -> Question | None:
    if not scene.glyphs:
        return None
    glyph = choose(rng, scene.glyphs)
    return Question("reading", f"What {glyph.kind} is in the image?", glyph.character)


_ASKERS: dict[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "count": _ask_count,
    "position": _ask_position,
    "reading": _ask_reading,
}


def ask_about(entry: Entry) -> Question:
    """Returns the question about an entry of a page."""
    answer = " ".join(glyph.character for glyph in entry.value)
    return Question(f"{entry.size}-text", f"What is right of {entry.label.character}?", answer)


def things_alone(scene: Scene) -> list[Thing]:
    """Returns the things whose combination of colour and shape is unique in the scene."""
    pairs = Counter((thing.color, thing.shape) for thing in scene.things)
    return [thing for thing in scene.things if pairs[thing.color, thing.shape] == 1]


def plural(shape: str) -> str:
    """Returns the plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def choose(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    """Returns one of the items at random."""
    return items[int(rng.integers(len(items)))]


@dataclass(frozen=True, slots=True)
class AskedScene:
    """A scene or page and the questions about it.

    Args:
        seed: Seed of the set of scenes.
        index: Number of the scene in the set.
        scene: The scene or page.
        questions: Questions of all kinds, no text twice.
        settings: For each question, the POPE setting that it counts for; "" if it is not about existence.
    """

    seed: int
    index: int
    scene: Scene | Page
    questions: tuple[Question, ...]
    settings: tuple[str, ...]


def make_scenes(seed: int, num_questions: int, kinds: Sequence[Kind] = KINDS) -> list[AskedScene]:
    """Returns scenes in order that together have `num_questions` questions of each kind; pages for kinds of pages.

    A scene has at most two questions of a kind. Those about existence are a pair: a thing that is present, and an
    absent one, chosen in turn by POPE's settings random, popular and adversarial.

    Raises:
        ValueError: There are no kinds, a kind is unknown, some are of scenes and others of pages, or `num_questions`
            is below 1.
    """
    check_kinds(kinds)
    if num_questions < 1:
        raise ValueError(f"at least 1 question of each kind, got {num_questions}")
    missing = dict.fromkeys(kinds, num_questions)
    scenes = []
    index = 0
    while any(missing.values()):
        scene = page_at(seed, index) if kinds[0] in PAGE_KINDS else scene_at(seed, index)
        asked: list[tuple[Question, str]] = []
        for kind in kinds:
            # Each kind has its own generator, so that leaving out a kind does not change the others' questions.
            rng = np.random.default_rng([seed, HELD_OUT, index, get_args(Kind).index(kind) + 1])
            if isinstance(scene, Page):
                chosen = _about_entries(rng, scene, kind)
            else:
                chosen = _existence_pair(rng, scene, index) if kind == "existence" else _distinct(rng, scene, kind)
            asked += chosen[: missing[kind]]
            missing[kind] -= len(chosen[: missing[kind]])
        if asked:
            questions, settings = zip(*asked, strict=True)
            scenes.append(AskedScene(seed, index, scene, questions, settings))
        index += 1
    return scenes


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises ValueError unless there are kinds, all of them of scenes or all of them of pages."""
    if not kinds or not (set(kinds) <= set(KINDS) or set(kinds) <= set(PAGE_KINDS)):
        raise ValueError(
            f"expected kinds of questions about scenes ({', '.join(KINDS)}) or about pages ({', '.join(PAGE_KINDS)}), "
            f"got {', '.join(kinds) or 'none'}"
        )


def scene_at(seed: int, index: int) -> Scene:
    """Returns scene number `index` of a seed's held-out set."""
    return make_scene(np.random.default_rng([seed, HELD_OUT, index]))


def page_at(seed: int, index: int) -> Page:
    """Returns page number `index` of a seed's held-out set."""
    return make_page(np.random.default_rng([seed, HELD_OUT, index]))


def render(scene: Scene | Page, scale: int = 2) -> Image.Image:
    """Returns the scene or page as an RGB image with sides of `scale` times 112 px."""
    return draw_page(scene, scale) if isinstance(scene, Page) else draw(scene, scale)


def picture_of(scene: Scene | Page, side_px: int = SCENE_PX) -> Image.Image:
    """Returns the scene or page as in the pocket models' training: drawn at 224 x 224 px and resized to 112 x 112.

    Args:
        scene: The scene or page.
        side_px: Side to which the 112 px are then enlarged, for a served model.
    """
    picture = render(scene).resize((SCENE_PX, SCENE_PX), Image.Resampling.BICUBIC)
    return picture.resize((side_px, side_px), Image.Resampling.BICUBIC)


def fingerprint(scenes: Sequence[AskedScene]) -> str:
    """Returns 12 hexadecimal digits that identify all questions and the first pictures; scores of others may differ.

    Versions of NumPy may draw other numbers, and versions of Pillow other pixels.
    """
    digest = hashlib.sha256()
    for asked in scenes:
        questions = [asdict(question) for question in asked.questions]
        digest.update(json.dumps([asked.seed, asked.index, questions, asked.settings]).encode())
    for asked in scenes[:8]:
        digest.update(picture_of(asked.scene).tobytes())
    return digest.hexdigest()[:12]


def _existence_pair(rng: np.random.Generator, scene: Scene, index: int) -> list[tuple[Question, str]]:
    setting = NEGATIVES[index % len(NEGATIVES)]
    pair = [ask_existence(rng, scene, None), ask_existence(rng, scene, setting)]
    # Both or neither, so that half of each setting's answers are yes.
    return [] if None in pair else [(question, setting) for question in pair if question is not None]


def _distinct(rng: np.random.Generator, scene: Scene, kind: Kind) -> list[tuple[Question, str]]:
    found: dict[str, Question] = {}
    for _ in range(_TRIES):
        question = ask(rng, scene, kind)
        if question is not None and len(found) < _A_KIND_AND_SCENE:
            found.setdefault(question.text, question)
    return [(question, "") for question in found.values()]


def _about_entries(rng: np.random.Generator, page: Page, kind: Kind) -> list[tuple[Question, str]]:
    questions = [question for entry in page.entries if (question := ask_about(entry)).kind == kind]
    return [(questions[index], "") for index in rng.permutation(len(questions))[:_A_KIND_AND_SCENE]]
