"""Synthetic scenes: coloured shapes and a few small characters on cluttered backgrounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "CHARACTERS",
    "COLOR_RGB",
    "DIGITS",
    "LETTERS",
    "OUTLINES",
    "SCENE_PX",
    "SHAPES",
    "SIZE_PX",
    "Glyph",
    "Scene",
    "Thing",
    "draw",
    "make_scene",
    "write_glyph",
]

SCENE_PX = 112
"""Side of a scene in its own units; it may be drawn at any multiple."""

COLOR_RGB = {
    "red": (214, 40, 36),
    "green": (38, 160, 62),
    "blue": (40, 84, 214),
    "yellow": (240, 208, 40),
    "purple": (150, 50, 190),
    "white": (244, 244, 244),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZE_PX = {"small": (15.0, 19.0), "large": (28.0, 36.0)}
DIGITS = tuple("0123456789")
LETTERS = tuple("BCEFHKLPTX")
CHARACTERS = DIGITS + LETTERS

# In the order of COLOR_RGB and SHAPES. Some colours and shapes are more frequent, as POPE's "popular" negatives need.
_COLOR_WEIGHTS = np.array([0.26, 0.20, 0.18, 0.14, 0.12, 0.10])
_SHAPE_WEIGHTS = np.array([0.30, 0.24, 0.18, 0.15, 0.13])
_NUM_THINGS = (2, 6)
_GLYPH_SHARE = 0.6
_GLYPH_PX = 15.0
_GAP_PX = 3.0
# Least distance of a thing's middle from the scene's middle lines, so that "top left" is never ambiguous.
_FROM_MIDDLE_PX = 5.0
_MAX_TRIES = 60

_Fill = int | tuple[int, ...]
_Outline = Callable[[ImageDraw.ImageDraw, "Thing", int, _Fill], None]


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape; `x`, `y` is its middle and `size_px` its diameter, in the scene's units."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    size_px: float


@dataclass(frozen=True, slots=True)
class Glyph:
    """A digit or a capital letter, dark or bright; `x`, `y` is its middle, `size_px` the size of the font."""

    character: str
    x: float
    y: float
    is_dark: bool
    size_px: float = _GLYPH_PX

    @property
    def kind(self) -> str:
        """What the character is: "digit" or "letter"."""
        return "digit" if self.character in DIGITS else "letter"


@dataclass(frozen=True, slots=True)
class Scene:
    """The contents of a scene, and the seed of its background."""

    things: tuple[Thing, ...]
    glyphs: tuple[Glyph, ...]
    background_seed: int


def make_scene(rng: np.random.Generator, *, num_each: int = 1, share: float = _GLYPH_SHARE) -> Scene:
    """Returns a scene of 2 to 6 things and a few digits and letters, which do not overlap.

    Args:
        rng: Draws the scene.
        num_each: The most digits, and the most letters.
        share: Probability of each digit and letter.
    """
    boxes: list[tuple[float, float, float]] = []
    things: list[Thing] = []
    glyphs: list[Glyph] = []
    for characters in (DIGITS, LETTERS) * num_each:
        if rng.random() < share and (place := _free_place(rng, boxes, _GLYPH_PX)):
            glyphs.append(Glyph(characters[rng.integers(len(characters))], *place, bool(rng.random() < 0.5)))
    for _ in range(rng.integers(_NUM_THINGS[0], _NUM_THINGS[1] + 1)):
        size = "small" if rng.random() < 0.5 else "large"
        size_px = float(rng.uniform(*SIZE_PX[size]))
        if place := _free_place(rng, boxes, size_px):
            color = list(COLOR_RGB)[_weighted(rng, _COLOR_WEIGHTS)]
            things.append(Thing(color, SHAPES[_weighted(rng, _SHAPE_WEIGHTS)], size, *place, size_px))
    return Scene(tuple(things), tuple(glyphs), int(rng.integers(2**31)))


def draw(scene: Scene, scale: int = 2) -> Image.Image:
    """Returns the scene as an RGB image with sides of `scale` times 112 px."""
    rng = np.random.default_rng(scene.background_seed)
    picture = _background(rng, SCENE_PX * scale)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        rgb = np.array(COLOR_RGB[thing.color]) + rng.integers(-18, 19, 3)
        fill = tuple(int(value) for value in rgb.clip(0, 255))
        OUTLINES[thing.shape](pen, thing, scale, fill)
    for glyph in scene.glyphs:
        write_glyph(pen, glyph, scale, (16, 16, 16) if glyph.is_dark else (250, 250, 250))
    return picture


def _weighted(rng: np.random.Generator, weights: np.ndarray) -> int:
    return int(np.searchsorted(weights.cumsum(), rng.random() * weights.sum(), side="right"))


def _free_place(
    rng: np.random.Generator, boxes: list[tuple[float, float, float]], size_px: float
) -> tuple[float, float] | None:
    half = size_px / 2
    for _ in range(_MAX_TRIES):
        x, y = rng.uniform(half + 1, SCENE_PX - half - 1, 2)
        if min(abs(x - SCENE_PX / 2), abs(y - SCENE_PX / 2)) < _FROM_MIDDLE_PX:
            continue
        if all(max(abs(x - bx), abs(y - by)) >= half + bh + _GAP_PX for bx, by, bh in boxes):
            boxes.append((x, y, half))
            return float(x), float(y)
    return None


def _background(rng: np.random.Generator, side_px: int) -> Image.Image:
    base = rng.integers(80, 150) + rng.integers(-14, 15, 3)
    slope = rng.uniform(-30, 30, (2, 3))
    ramp = np.linspace(-0.5, 0.5, side_px)
    pixels = base + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]
    pixels += rng.normal(0, 5, (side_px, side_px, 1))
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(6, 15)):
        ends = rng.uniform(0, side_px, 4)
        grey = rng.integers(60, 170) + rng.integers(-20, 21, 3)
        fill = tuple(int(value) for value in grey)
        if rng.random() < 0.6:
            pen.line(tuple(ends), fill=fill, width=max(1, round(side_px / 112 * rng.uniform(0.7, 2))))
        else:
            radius = side_px / 112 * rng.uniform(1, 4)
            pen.ellipse((ends[0] - radius, ends[1] - radius, ends[0] + radius, ends[1] + radius), fill=fill)
    return picture


def _circle(pen: ImageDraw.ImageDraw, thing: Thing, scale: int, fill: _Fill) -> None:
    radius = thing.size_px / 2
    box = (thing.x - radius, thing.y - radius, thing.x + radius, thing.y + radius)
    pen.ellipse(tuple(edge * scale for edge in box), fill=fill)


def _polygon(points: Sequence[tuple[float, float]]) -> _Outline:
    """Returns a function that fills the polygon of `points`, given in radii around a thing's middle."""

    def fill_polygon(pen: ImageDraw.ImageDraw, thing: Thing, scale: int, fill: _Fill) -> None:
        radius = thing.size_px / 2
        corners = [((thing.x + radius * dx) * scale, (thing.y + radius * dy) * scale) for dx, dy in points]
        pen.polygon(corners, fill=fill)

    return fill_polygon


def _star_points() -> list[tuple[float, float]]:
    corners = [(1.05 if corner % 2 == 0 else 0.42, math.pi * (corner / 5 - 0.5)) for corner in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


_ARM = 0.34
OUTLINES: dict[str, _Outline] = {
    "circle": _circle,
    "square": _polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "triangle": _polygon([(0, -0.95), (1, 0.85), (-1, 0.85)]),
    "star": _polygon(_star_points()),
    "cross": _polygon(
        [
            *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
            *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
        ]
    ),
}
"""Shape -> function that draws it."""


def write_glyph(pen: ImageDraw.ImageDraw, glyph: Glyph, scale: int, fill: _Fill) -> None:
    """Draws a digit or letter."""
    font = _font(glyph.size_px * scale)
    pen.text((glyph.x * scale, glyph.y * scale), glyph.character, fill=fill, font=font, anchor="mm")


@cache
def _font(size_px: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # The font that comes with Pillow.
    return ImageFont.load_default(size_px)
