"""The pocket tasks: held-out scenes and the questions about them, made anew from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import numpy as np
from PIL import Image

from mmtok_bench.pocket.questions import Kind, Negative, Question, ask, ask_existence
from mmtok_bench.pocket.scenes import SCENE_PX, Scene, draw, make_scene

__all__ = ["HELD_OUT", "SCORED_KINDS", "AskedScene", "fingerprint", "make_scenes", "picture_of", "scene_at"]

SCORED_KINDS: tuple[Kind, ...] = ("existence", "count", "position", "reading")

HELD_OUT = 1000
"""The second part of a scene's seed, where training has the number of its stage: no scene here was trained on."""

_NEGATIVES: tuple[Negative, ...] = get_args(Negative)
_A_KIND_AND_SCENE = 2
_TRIES = 6


@dataclass(frozen=True, slots=True)
class AskedScene:
    """A scene and what is asked about it.

    Args:
        seed: Of the set that the scene is in.
        index: The scene's number in it.
        scene: What is to be seen.
        questions: All kinds together, no text twice.
        settings: For each question about existence, which of POPE's three settings it counts for; else "".
    """

    seed: int
    index: int
    scene: Scene
    questions: tuple[Question, ...]
    settings: tuple[str, ...]


def make_scenes(seed: int, num_questions: int, kinds: Sequence[Kind] = SCORED_KINDS) -> list[AskedScene]:
    """Returns scenes in order, with `num_questions` questions of each kind in all of them together.

    A scene has two questions of a kind, or fewer where it has less to ask for. Those about existence are a pair: a
    thing that is there, and one that is not, chosen in turns as in POPE's settings random, popular and adversarial.

    Raises:
        ValueError: No kinds, a kind that is not scored, or fewer than one question.
    """
    unknown = [kind for kind in kinds if kind not in SCORED_KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds are some of {', '.join(SCORED_KINDS)}, got {', '.join(unknown) or 'none'}")
    if num_questions < 1:
        raise ValueError(f"at least 1 question of each kind, got {num_questions}")
    missing = dict.fromkeys(kinds, num_questions)
    scenes = []
    index = 0
    while any(missing.values()):
        scene = scene_at(seed, index)
        asked: list[tuple[Question, str]] = []
        for kind in kinds:
            # Of its own for each kind, so that leaving out a kind changes no question of another.
            rng = np.random.default_rng([seed, HELD_OUT, index, SCORED_KINDS.index(kind) + 1])
            chosen = _existence_pair(rng, scene, index) if kind == "existence" else _distinct(rng, scene, kind)
            asked += chosen[: missing[kind]]
            missing[kind] -= len(chosen[: missing[kind]])
        if asked:
            questions, settings = zip(*asked, strict=True)
            scenes.append(AskedScene(seed, index, scene, questions, settings))
        index += 1
    return scenes


def scene_at(seed: int, index: int) -> Scene:
    """Returns scene number `index` of a seed's held-out set."""
    return make_scene(np.random.default_rng([seed, HELD_OUT, index]))


def picture_of(scene: Scene, side_px: int = SCENE_PX) -> Image.Image:
    """Returns the scene as the pocket models learn to see it: 112 x 112 px, drawn at twice that and made smaller.

    Args:
        scene: What is to be seen.
        side_px: What those 112 px are enlarged to, for a model that is served so.
    """
    picture = draw(scene).resize((SCENE_PX, SCENE_PX), Image.Resampling.BICUBIC)
    return picture.resize((side_px, side_px), Image.Resampling.BICUBIC)


def fingerprint(scenes: Sequence[AskedScene]) -> str:
    """Returns 12 hexadecimal digits of all questions and of the first pictures: where they differ, so may the scores.

    NumPy does not promise the same draws, nor Pillow the same pixels, in every version.
    """
    digest = hashlib.sha256()
    for asked in scenes:
        questions = [asdict(question) for question in asked.questions]
        digest.update(json.dumps([asked.seed, asked.index, questions, asked.settings]).encode())
    for asked in scenes[:8]:
        digest.update(picture_of(asked.scene).tobytes())
    return digest.hexdigest()[:12]


def _existence_pair(rng: np.random.Generator, scene: Scene, index: int) -> list[tuple[Question, str]]:
    setting = _NEGATIVES[index % len(_NEGATIVES)]
    pair = [ask_existence(rng, scene, None), ask_existence(rng, scene, setting)]
    # Both or neither: each setting stays half yes and half no.
    return [] if None in pair else [(question, setting) for question in pair if question is not None]


def _distinct(rng: np.random.Generator, scene: Scene, kind: Kind) -> list[tuple[Question, str]]:
    found: dict[str, Question] = {}
    for _ in range(_TRIES):
        question = ask(rng, scene, kind)
        if question is not None and len(found) < _A_KIND_AND_SCENE:
            found.setdefault(question.text, question)
    return [(question, "") for question in found.values()]
