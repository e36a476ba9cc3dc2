"""Training data of the pocket models: scenes with words for each patch, and scenes with packed questions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmtok_bench.pocket.pages import Page
from mmtok_bench.pocket.questions import Question, picture_of
from mmtok_bench.pocket.scenes import (
    CHARACTERS,
    COLOR_RGB,
    OUTLINES,
    SCENE_PX,
    SHAPES,
    SIZE_PX,
    Glyph,
    Scene,
    Thing,
    make_scene,
    write_glyph,
)
from pocket_training.model import GRID, NUM_IMAGE_TOKENS, PATCH_PX
from pocket_training.questions import NAMING_WORDS, Kind, ask, named_items

__all__ = [
    "IGNORED",
    "NOTHING",
    "PATCH_CHOICES",
    "TASKS",
    "Asked",
    "Task",
    "TrainingPictures",
    "TrainingScenes",
    "collate",
    "draw_mask",
    "middle_patches",
    "patch_items",
    "patch_targets",
    "pixels_of",
    "targets_of",
]

Task = Literal["patches", "answers", "characters", "page patches", "page answers"]
TASKS: dict[Task, int] = {"patches": 1, "answers": 2, "characters": 3, "page patches": 4, "page answers": 5}
"""Task -> second part of its scenes' seeds; held-out scenes have another one."""

NOTHING = "nothing"
PATCH_CHOICES: tuple[tuple[str, ...], ...] = (
    (*COLOR_RGB, NOTHING),
    (*SHAPES, *(character.lower() for character in CHARACTERS), NOTHING),
    (*SIZE_PX, "digit", "letter", NOTHING),
    ("top", "bottom"),
    ("left", "right"),
    ("middle", NOTHING),
)
"""The classes of a patch's targets, in words."""

IGNORED = -100
"""Label of a token that is not predicted."""

# A patch counts as showing a thing if at least this many of its 64 pixels do.
_MIN_PIXELS = 7
_NUM_QUESTIONS = 12
_MANY_CHARACTERS: dict[str, Any] = {"num_each": 4, "share": 0.9}
_KIND_SHARES: dict[Kind, float] = {
    "existence": 0.24,
    "simple": 0.08,
    "count": 0.16,
    "position": 0.14,
    "reading": 0.20,
    "attribute": 0.18,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and where its tokens look.

    Args:
        question: The question.
        naming_ids: Tokens by which questions name what they ask for.
        look_row: The row of looks of the question's tokens.
        answer_rows: Those of the last token before the answer and of the answer's tokens; by default the same.
    """

    question: Question
    naming_ids: Set[int]
    look_row: int
    answer_rows: Sequence[int] = ()


class TrainingPictures(Dataset[dict[str, Tensor]]):
    """Pictures by number, which depend only on the seed.

    Args:
        task: What is learned.
        seed: Seed of all pictures.
        tokenizer: Tokenizer of the model.
        asked: `PocketModel.asked`.
    """

    def __init__(self, task: Task, seed: int, tokenizer: Any, asked: str) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self._asked = asked
        self._seed = seed

    def random(self, index: int) -> np.random.Generator:
        """Returns the generator of a picture's contents and questions."""
        return np.random.default_rng([self._seed, TASKS[self.task], index])

    def pack(self, questions: Sequence[Asked]) -> dict[str, Tensor]:
        """Returns the tokens of questions in a row: ids, labels, segments, has_named and look_rows, [L] each."""
        ids: list[int] = []
        labels: list[int] = []
        segments: list[int] = []
        has_named: list[bool] = []
        look_rows: list[int] = []
        for number, each in enumerate(questions, start=1):
            asked = self._ids(self._asked.format(each.question.text))
            answered = [*self._ids(each.question.answer), self.tokenizer.eos_token_id]
            named_at = max(index for index, token in enumerate(asked) if token in each.naming_ids)
            ids += asked + answered
            labels += [IGNORED] * len(asked) + answered
            segments += [number] * (len(asked) + len(answered))
            has_named += [index >= named_at for index in range(len(asked) + len(answered))]
            look_rows += [each.look_row] * (len(asked) - 1)
            look_rows += each.answer_rows or [each.look_row] * (1 + len(answered))
        packed = {"ids": ids, "labels": labels, "segments": segments, "has_named": has_named, "look_rows": look_rows}
        return {name: torch.tensor(values) for name, values in packed.items()}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class TrainingScenes(TrainingPictures):
    """Scenes by number.

    For the task "patches": pixels [3, 112, 112] uint8 and targets [196, choices]. "characters": the same, of scenes
    with more characters. "answers": both, and ids, labels and segments [L] of up to twelve questions in a row, whose
    segments are numbered from 1; has_named [L], whether a question has named by this token what it asks for; looks
    [2, 12, 196], the patches that show it, and its middle patch; and look_rows [L], the number of each token's row of
    looks.
    """

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = self.random(index)
        scene = make_scene(rng, **(_MANY_CHARACTERS if self.task == "characters" else {}))
        seen = {"pixels": pixels_of(scene), "targets": patch_targets(scene)}
        if self.task != "answers":
            return seen
        kinds = rng.choice(list(_KIND_SHARES), _NUM_QUESTIONS, p=list(_KIND_SHARES.values()))
        questions = [question for kind in kinds if (question := ask(rng, scene, kind))]
        return {**seen, **self._packed(questions), "looks": _looks(scene, questions)}

    def _packed(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        naming_ids = {self.tokenizer.convert_tokens_to_ids(word) for word in NAMING_WORDS}
        return self.pack([Asked(question, naming_ids, row) for row, question in enumerate(questions)])


def pixels_of(scene: Scene | Page) -> Tensor:
    """Returns the picture of a scene or page, [3, 112, 112] uint8."""
    return torch.from_numpy(np.array(picture_of(scene))).permute(2, 0, 1)


def patch_targets(scene: Scene) -> Tensor:
    """Returns [196, choices] int64: for each patch, the index of the right word of each of `PATCH_CHOICES`."""
    words = [(NOTHING, NOTHING, NOTHING)]
    words += [(thing.color, thing.shape, thing.size) for thing in scene.things]
    words += [(NOTHING, glyph.character.lower(), glyph.kind) for glyph in scene.glyphs]
    return targets_of(words, _scene_items(scene), _middles(scene))


def targets_of(words: Sequence[tuple[str, str, str]], items: np.ndarray, middles: Collection[int]) -> Tensor:
    """Returns [196, choices] int64: for each patch, the index of the right word of each of `PATCH_CHOICES`.

    Args:
        words: The colour, the shape or character, and the size or kind of no item, and then of each item.
        items: [196], the index into `words` of what each patch shows.
        middles: The patches in which an item's middle is.
    """
    targets = []
    for patch, item in enumerate(items):
        row, column = divmod(patch, GRID)
        shown = (
            *words[item],
            "top" if row < GRID / 2 else "bottom",
            "left" if column < GRID / 2 else "right",
            "middle" if patch in middles else NOTHING,
        )
        targets.append([choice.index(word) for choice, word in zip(PATCH_CHOICES, shown, strict=True)])
    return torch.tensor(targets)


def draw_mask(scene: Scene) -> np.ndarray:
    """Returns [112, 112] uint8: 0 where there is nothing, otherwise 1 + the index into things followed by glyphs."""
    mask = Image.new("L", (SCENE_PX, SCENE_PX))
    pen = ImageDraw.Draw(mask)
    pen.fontmode = "1"
    for index, thing in enumerate(scene.things, start=1):
        OUTLINES[thing.shape](pen, thing, 1, index)
    for index, glyph in enumerate(scene.glyphs, start=1 + len(scene.things)):
        write_glyph(pen, glyph, 1, index)
    return np.asarray(mask)


def patch_items(mask: np.ndarray, num_items: int, min_pixels: int = _MIN_PIXELS) -> np.ndarray:
    """Returns [196]: for each patch, the item that most of its pixels show; 0 where fewer than `min_pixels` show any.

    Args:
        mask: [112, 112], the number of the item that each pixel shows, from 1 on; 0 for nothing.
        num_items: Number of items.
        min_pixels: Least pixels of an item in a patch that shows it.
    """
    patches = mask.reshape(GRID, PATCH_PX, GRID, PATCH_PX).swapaxes(1, 2).reshape(NUM_IMAGE_TOKENS, -1)
    counts = np.stack([(patches == item).sum(1) for item in range(1 + num_items)], axis=1)
    counts[:, 0] = min_pixels - 1
    most: np.ndarray = counts.argmax(1)
    return most


def middle_patches(places: Iterable[tuple[float, float]]) -> list[int]:
    """Returns the patches in which the places `x`, `y` are."""
    return [int(y // PATCH_PX) * GRID + int(x // PATCH_PX) for x, y in places]


def _scene_items(scene: Scene) -> np.ndarray:
    return patch_items(draw_mask(scene), len(scene.things) + len(scene.glyphs))


def _middles(scene: Scene) -> list[int]:
    """Returns the patch that each thing's, then each glyph's middle is in."""
    items: list[Thing | Glyph] = [*scene.things, *scene.glyphs]
    return middle_patches((item.x, item.y) for item in items)


def _looks(scene: Scene, questions: Sequence[Question]) -> Tensor:
    looks = torch.zeros(2, _NUM_QUESTIONS, NUM_IMAGE_TOKENS)
    items, middles = torch.from_numpy(_scene_items(scene)), _middles(scene)
    for number, question in enumerate(questions):
        for index in named_items(scene, question.text):
            looks[0, number, items == 1 + index] = 1
            looks[1, number, middles[index]] = 1
    return looks


def collate(scenes: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns a batch; texts are padded at their end, where labels are `IGNORED` and the segment is -1."""
    padding = {"ids": 0, "labels": IGNORED, "segments": -1, "has_named": False, "look_rows": 0}
    return {
        name: nn.utils.rnn.pad_sequence(
            [scene[name] for scene in scenes], batch_first=True, padding_value=padding[name]
        )
        if name in padding
        else torch.stack([scene[name] for scene in scenes])
        for name in scenes[0]
    }
