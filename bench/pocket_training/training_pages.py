"""Training data of a pocket model that reads pages: words for each patch, and packed questions about entries."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mmtok_bench.pocket.pages import MAX_GLYPHS, Page, make_page
from mmtok_bench.pocket.questions import ask_about
from mmtok_bench.pocket.scenes import SCENE_PX, write_glyph
from pocket_training.model import NUM_IMAGE_TOKENS
from pocket_training.training_data import (
    NOTHING,
    PATCH_CHOICES,
    Asked,
    TrainingPictures,
    middle_patches,
    patch_items,
    pixels_of,
    targets_of,
)

__all__ = ["PAGE_CHOICES", "TrainingPages", "label_patches", "page_targets"]

PAGE_CHOICES: tuple[tuple[str, ...], ...] = (*PATCH_CHOICES, ("1", "2", "3", NOTHING))
"""The classes of a patch's targets, in words: those of a scene, and the number of a character in its value."""

# A small character has about 15 pixels, often in two patches.
_MIN_PIXELS = 4
# The rows of looks are one for each character of a page, and this one for nothing.
_NOTHING_ROW = MAX_GLYPHS


class TrainingPages(TrainingPictures):
    """Pages by number.

    For the task "page patches": pixels [3, 112, 112] uint8 and targets [196, choices]. "page answers": as "answers" of
    `TrainingScenes`, with looks [2, 41, 196], the patches that show each character of the page and the character's
    middle patch; the last row has none. A question's tokens look for the label, and from the last token before the
    answer on, each looks for the character that follows it. Also label_patches [196, 196] bool: for each patch of a
    value, the patches before it that show its label.
    """

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = self.random(index)
        page = make_page(rng)
        items = _page_items(page)
        seen = {"pixels": pixels_of(page), "targets": page_targets(page, items)}
        if self.task == "page patches":
            return seen
        looks = torch.zeros(2, _NOTHING_ROW + 1, NUM_IMAGE_TOKENS)
        for number, middle in enumerate(_middles(page)):
            looks[0, number, torch.from_numpy(items) == 1 + number] = 1
            looks[1, number, middle] = 1
        return {**seen, **self._packed(rng, page), "looks": looks, "label_patches": label_patches(page, items)}

    def _packed(self, rng: np.random.Generator, page: Page) -> dict[str, Tensor]:
        firsts = np.cumsum([0, *(len(entry.glyphs) for entry in page.entries)])
        questions = []
        for chosen in rng.permutation(len(page.entries)):
            entry, first = page.entries[chosen], int(firsts[chosen])
            label = self.tokenizer.convert_tokens_to_ids(entry.label.character.lower())
            value_rows = range(first + 1, first + len(entry.glyphs))
            questions.append(Asked(ask_about(entry), {label}, first, [*value_rows, _NOTHING_ROW, _NOTHING_ROW]))
        return self.pack(questions)


def page_targets(page: Page, items: np.ndarray) -> Tensor:
    """Returns [196, choices] int64: for each patch, the index of the right word of each of `PAGE_CHOICES`.

    Args:
        page: The page.
        items: [196], 0 or 1 + the index of the character that each patch shows.
    """
    words = [(NOTHING, NOTHING, NOTHING)]
    numbers = [NOTHING]
    for entry in page.entries:
        for glyph in entry.glyphs:
            color = page.label_color if glyph is entry.label else NOTHING
            words.append((color, glyph.character.lower(), glyph.kind))
        numbers += [NOTHING, *(str(number) for number in range(1, 1 + len(entry.value)))]
    in_values = torch.tensor([PAGE_CHOICES[-1].index(numbers[item]) for item in items])
    return torch.cat([targets_of(words, items, _places(page)), in_values[:, None]], dim=1)


def label_patches(page: Page, items: np.ndarray) -> Tensor:
    """Returns [196, 196] bool: for each patch of a value, the patches before it that show its label.

    Args:
        page: The page.
        items: [196], 0 or 1 + the index of the character that each patch shows.
    """
    labels = [-1]
    for entry in page.entries:
        labels += [-1] + [len(labels)] * len(entry.value)
    label_of = np.array(labels)[items]
    return torch.from_numpy(label_of[:, None] == items[None]).tril()


def _page_items(page: Page) -> np.ndarray:
    mask = Image.new("L", (SCENE_PX, SCENE_PX))
    pen = ImageDraw.Draw(mask)
    pen.fontmode = "1"
    for index, glyph in enumerate(page.glyphs, start=1):
        write_glyph(pen, glyph, 1, index)
    items = patch_items(np.asarray(mask), len(page.glyphs), _MIN_PIXELS)
    items[_middles(page)] = 1 + np.arange(len(page.glyphs))
    return items


def _places(page: Page) -> list[tuple[float, float]]:
    return [(glyph.x, glyph.y) for glyph in page.glyphs]


def _middles(page: Page) -> list[int]:
    return middle_patches(_places(page))
