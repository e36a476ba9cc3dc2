"""Training data of the pocket models: scenes with words for each patch, and scenes with packed questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
from pocket_training.model import GRID, PATCH_PX
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
    "looks_of",
    "middle_patches",
    "patch_items",
    "patch_targets",
    "pixels_of",
    "targets_of",
]

Task = Literal[
    "patches",
    "answers",
    "characters",
    "page patches",
    "page answers",
    "size patches",
    "size answers",
    "tile patches",
    "tile answers",
]
TASKS: dict[Task, int] = {task: number for number, task in enumerate(get_args(Task), start=1)}
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
_MIN_PIXELS_OF_SMALLER = 4
_NUM_QUESTIONS = 12
_WITH_MANY_CHARACTERS: tuple[Task, ...] = ("characters", "tile patches")
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
        characters = _MANY_CHARACTERS if self.task in _WITH_MANY_CHARACTERS else {}
        scene, grid = make_scene(rng, **characters), self.grid(index)
        seen = {"pixels": self.pixels(scene, grid), "targets": self.targets(scene, grid)}
        if not self.task.endswith("answers"):
            return seen
        kinds = rng.choice(list(_KIND_SHARES), _NUM_QUESTIONS, p=list(_KIND_SHARES.values()))
        questions = [question for kind in kinds if (question := ask(rng, scene, kind))]
        return {**seen, **self._packed(questions), "looks": self.looks(scene, questions, grid)}

    def grid(self, index: int) -> int:
        """Returns the number of image tokens in a row and in a column of a scene."""
        return GRID

    def pixels(self, scene: Scene, grid: int) -> Tensor:
        """Returns the pixels of a scene, [3, 8 * grid, 8 * grid]."""
        return pixels_of(scene)

    def targets(self, scene: Scene, grid: int) -> Tensor:
        """Returns the targets of each of a scene's image tokens, [N, choices] int64."""
        return patch_targets(scene, grid)

    def looks(self, scene: Scene, questions: Sequence[Question], grid: int) -> Tensor:
        """Returns [2, 12, N]: for each question, the image tokens that show what it asks for, and its middle's."""
        return looks_of(scene, questions, grid)

    def _packed(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        naming_ids = {self.tokenizer.convert_tokens_to_ids(word) for word in NAMING_WORDS}
        return self.pack([Asked(question, naming_ids, row) for row, question in enumerate(questions)])


def pixels_of(scene: Scene | Page) -> Tensor:
    """Returns the picture of a scene or page, [3, 112, 112] uint8."""
    return torch.from_numpy(np.array(picture_of(scene))).permute(2, 0, 1)


def patch_targets(scene: Scene, grid: int = GRID) -> Tensor:
    """Returns [grid * grid, choices] int64: the index of each patch's right word of each of `PATCH_CHOICES`."""
    words = [(NOTHING, NOTHING, NOTHING)]
    words += [(thing.color, thing.shape, thing.size) for thing in scene.things]
    words += [(NOTHING, glyph.character.lower(), glyph.kind) for glyph in scene.glyphs]
    return targets_of(words, _scene_items(scene, grid), _places(scene), grid)


def targets_of(
    words: Sequence[tuple[str, str, str]],
    items: np.ndarray,
    places: Sequence[tuple[float, float]],
    grid: int = GRID,
) -> Tensor:
    """Returns [grid * grid, choices] int64: the index of each patch's right word of each of `PATCH_CHOICES`.

    Args:
        words: The colour, the shape or character, and the size or kind of no item, and then of each item.
        items: [grid * grid], the index into `words` of what each patch shows.
        places: The middle `x`, `y` of each item.
        grid: Patches in a row and in a column.
    """
    targets = []
    middles = dict(zip(middle_patches(places, grid), places, strict=True))
    for patch, item in enumerate(items):
        row, column = divmod(patch, grid)
        # A patch on a middle line of the scene belongs to the side that the item in it is on.
        x, y = middles.get(patch, (column * SCENE_PX / grid, row * SCENE_PX / grid))
        shown = (
            *words[item],
            "top" if y < SCENE_PX / 2 else "bottom",
            "left" if x < SCENE_PX / 2 else "right",
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
    """Returns [N]: for each patch, the item that most of its pixels show; 0 where fewer than `min_pixels` show any.

    Args:
        mask: [side, side], the number of the item that each pixel shows, from 1 on; 0 for nothing.
        num_items: Number of items.
        min_pixels: Least pixels of an item in a patch that shows it.
    """
    grid = len(mask) // PATCH_PX
    patches = mask.reshape(grid, PATCH_PX, grid, PATCH_PX).swapaxes(1, 2).reshape(grid**2, -1)
    counts = np.stack([(patches == item).sum(1) for item in range(1 + num_items)], axis=1)
    counts[:, 0] = min_pixels - 1
    most: np.ndarray = counts.argmax(1)
    return most


def middle_patches(places: Iterable[tuple[float, float]], grid: int = GRID) -> list[int]:
    """Returns the patches in which the places `x`, `y` are."""
    return [int(y * grid // SCENE_PX) * grid + int(x * grid // SCENE_PX) for x, y in places]


def _scene_items(scene: Scene, grid: int) -> np.ndarray:
    num_items = len(scene.things) + len(scene.glyphs)
    if grid == GRID:
        return patch_items(draw_mask(scene), num_items)
    side = grid * PATCH_PX
    mask = Image.fromarray(draw_mask(scene)).resize((side, side), Image.Resampling.NEAREST)
    items = patch_items(np.asarray(mask), num_items, _MIN_PIXELS_OF_SMALLER)
    items[middle_patches(_places(scene), grid)] = 1 + np.arange(num_items)
    return items


def _places(scene: Scene) -> list[tuple[float, float]]:
    """Returns the middle of each thing, then of each glyph."""
    items: list[Thing | Glyph] = [*scene.things, *scene.glyphs]
    return [(item.x, item.y) for item in items]


def looks_of(scene: Scene, questions: Sequence[Question], grid: int) -> Tensor:
    """Returns [2, 12, grid * grid]: for each question, the patches that show what it asks for, and its middle patch."""
    looks = torch.zeros(2, _NUM_QUESTIONS, grid**2)
    items, middles = torch.from_numpy(_scene_items(scene, grid)), middle_patches(_places(scene), grid)
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
