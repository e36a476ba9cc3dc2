"""Synthetic pages: lines of labels with a word or a number each, in characters of three sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mmtok_bench.pocket.scenes import COLOR_RGB, DIGITS, LETTERS, SCENE_PX, Glyph, write_glyph

__all__ = ["MAX_GLYPHS", "TEXT_PX", "Entry", "Page", "draw_page", "make_page"]

TEXT_PX = {"small": 9.0, "medium": 12.0, "large": 16.0}
"""Size of the font, in units of which a page has 112."""

_LABEL_COLORS = ("red", "green", "blue", "purple")
_MAX_LENGTH = 3
MAX_GLYPHS = len(LETTERS) * (1 + _MAX_LENGTH)
"""The most characters on a page."""
_MARGIN_PX = 4.0
# Distances of neighbouring characters and lines, in sizes of the font.
_ADVANCE = 0.82
_LINE = 1.15


@dataclass(frozen=True, slots=True)
class Entry:
    """A label and the word or number on its right, in characters of one size.

    Args:
        size: A key of `TEXT_PX`.
        label: A coloured letter, which is the label of no other entry of the page.
        value: One to three dark digits or letters.
    """

    size: str
    label: Glyph
    value: tuple[Glyph, ...]

    @property
    def glyphs(self) -> tuple[Glyph, ...]:
        """The label and the value's characters, from left to right."""
        return (self.label, *self.value)


@dataclass(frozen=True, slots=True)
class Page:
    """The contents of a page, and the seed of its paper."""

    entries: tuple[Entry, ...]
    label_color: str
    paper_seed: int

    @property
    def glyphs(self) -> tuple[Glyph, ...]:
        """All characters in reading order."""
        return tuple(glyph for entry in self.entries for glyph in entry.glyphs)


def make_page(rng: np.random.Generator) -> Page:
    """Returns a page of up to ten entries in lines that do not overlap; a line has characters of one size."""
    labels = [str(label) for label in rng.permutation(LETTERS)]
    entries: list[Entry] = []
    bottom = _MARGIN_PX
    while labels:
        size = list(TEXT_PX)[rng.integers(len(TEXT_PX))]
        font_px = TEXT_PX[size]
        top = bottom + rng.uniform(0, 3)
        bottom = top + font_px * _LINE
        if bottom > SCENE_PX - _MARGIN_PX:
            break
        entries += _line(rng, size, (top + bottom) / 2, labels)
    return Page(tuple(entries), _LABEL_COLORS[rng.integers(len(_LABEL_COLORS))], int(rng.integers(2**31)))


def _line(rng: np.random.Generator, size: str, y: float, labels: list[str]) -> list[Entry]:
    """Returns the entries of a line; takes their labels from the end of `labels`."""
    font_px = TEXT_PX[size]
    advance = font_px * _ADVANCE
    x = _MARGIN_PX + rng.uniform(0, 8)
    entries = []
    while labels:
        characters = (DIGITS, LETTERS)[rng.integers(2)]
        value = rng.choice(characters, rng.integers(1, _MAX_LENGTH + 1))
        # The value begins one to two characters after the label.
        start = x + advance * rng.uniform(1.3, 2.0)
        if start + advance * len(value) > SCENE_PX - _MARGIN_PX:
            break
        entries.append(
            Entry(
                size,
                Glyph(labels.pop(), x + advance / 2, y, is_dark=True, size_px=font_px),
                tuple(
                    Glyph(str(character), start + advance * (number + 0.5), y, is_dark=True, size_px=font_px)
                    for number, character in enumerate(value)
                ),
            )
        )
        x = start + advance * (len(value) + rng.uniform(1.0, 2.0))
    return entries


def draw_page(page: Page, scale: int = 2) -> Image.Image:
    """Returns the page as an RGB image with sides of `scale` times 112 px."""
    rng = np.random.default_rng(page.paper_seed)
    side_px = SCENE_PX * scale
    pixels = rng.integers(226, 250) + rng.integers(-5, 6, 3) + rng.normal(0, 2, (side_px, side_px, 1))
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    ink = tuple(int(value) for value in rng.integers(10, 60) + rng.integers(-8, 9, 3))
    for entry in page.entries:
        write_glyph(pen, entry.label, scale, COLOR_RGB[page.label_color])
        for glyph in entry.value:
            write_glyph(pen, glyph, scale, ink)
    return picture
