"""Draws which patches of a photograph a selection keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

__all__ = ["draw_kept"]

_LONG_SIDE_PX = 1200
# Drawn at this multiple and scaled down, which smooths discs and frames.
_OVERSAMPLING = 2
_PAPER = (255, 255, 255)
_INK = (28, 30, 34)
_QUIET_INK = (112, 117, 125)
_ACCENT = (255, 176, 0)
_SHADE = (24, 27, 34)


def draw_kept(
    image: Image.Image, grid: tuple[int, int], order: Sequence[int], path: Path, *, title: str, numbered: int = 20
) -> Path:
    """Writes the photograph as a PNG, kept patches clear and the rest dimmed; returns `path`.

    Args:
        image: What the vision encoder saw, cut into `grid` patches of equal size.
        grid: Rows and columns.
        order: Kept patches in the order of picking, counted row by row from 0.
        path: Where to write; its folder is made.
        title: One line above the picture.
        numbered: How many of the first picks are numbered, from 1.

    Raises:
        ValueError: An empty grid, or an index that is not in it.
    """
    rows, columns = grid
    if rows < 1 or columns < 1:
        raise ValueError(f"grid is at least 1 row and 1 column, got {rows} x {columns}")
    outside = [index for index in order if not 0 <= index < rows * columns]
    if outside:
        raise ValueError(f"order holds indices from 0 to {rows * columns - 1} for this grid, got {outside[0]}")

    scale = _OVERSAMPLING * _LONG_SIDE_PX / max(image.size)
    clear = image.convert("RGB").resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
    )
    boxes = [_box(index, grid, clear.size) for index in order]
    picture = _dimmed(clear)
    for box in boxes:
        picture.paste(clear.crop(box), box[:2])
    _frame(picture, boxes, set(order), order, columns)
    _number(picture, boxes[:numbered])

    num_numbered = min(numbered, len(order))
    legend = f"{len(order)} of {rows * columns} vision tokens kept"
    if num_numbered:
        legend += f"; the first {num_numbered} numbered in the order of picking"
    page = _with_caption(picture, title, legend)
    page = page.resize((page.width // _OVERSAMPLING, page.height // _OVERSAMPLING), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, format="PNG", optimize=True)
    return path


def _box(index: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    row, column = divmod(index, grid[1])
    width, height = size
    left, right = (round(edge * width / grid[1]) for edge in (column, column + 1))
    top, bottom = (round(edge * height / grid[0]) for edge in (row, row + 1))
    return left, top, right, bottom


def _dimmed(image: Image.Image) -> Image.Image:
    grey = ImageEnhance.Contrast(ImageOps.grayscale(image).convert("RGB")).enhance(0.8)
    return Image.blend(grey, Image.new("RGB", image.size, _SHADE), 0.55)


def _frame(
    picture: Image.Image, boxes: list[tuple[int, int, int, int]], kept: set[int], order: Sequence[int], columns: int
) -> None:
    """Draws the outline of every group of neighbouring kept patches."""
    draw = ImageDraw.Draw(picture)
    width = 2 * _OVERSAMPLING
    for index, (left, top, right, bottom) in zip(order, boxes, strict=True):
        column = index % columns
        edges = {
            (left, top, right, top): index - columns in kept,
            (left, bottom, right, bottom): index + columns in kept,
            (left, top, left, bottom): column > 0 and index - 1 in kept,
            (right, top, right, bottom): column < columns - 1 and index + 1 in kept,
        }
        for edge, is_inside in edges.items():
            if not is_inside:
                draw.line(edge, fill=_PAPER, width=width)


def _number(picture: Image.Image, boxes: list[tuple[int, int, int, int]]) -> None:
    draw = ImageDraw.Draw(picture)
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        # A small disc in a corner, so that the patch stays visible.
        radius = max(0.25 * min(right - left, bottom - top), 10 * _OVERSAMPLING)
        x, y = left + 1.05 * radius, top + 1.05 * radius
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_ACCENT, outline=_INK, width=_OVERSAMPLING)
        draw.text((x, y), str(number), font=ImageFont.load_default(1.25 * radius), fill=_INK, anchor="mm")


def _with_caption(picture: Image.Image, title: str, legend: str) -> Image.Image:
    margin = 24 * _OVERSAMPLING
    title_font = ImageFont.load_default(30 * _OVERSAMPLING)
    legend_font = ImageFont.load_default(20 * _OVERSAMPLING)
    head = 100 * _OVERSAMPLING
    page = Image.new("RGB", (picture.width + 2 * margin, picture.height + head + margin), _PAPER)
    page.paste(picture, (margin, head))
    draw = ImageDraw.Draw(page)
    draw.text((margin, 20 * _OVERSAMPLING), title, font=title_font, fill=_INK)
    draw.text((margin, 62 * _OVERSAMPLING), legend, font=legend_font, fill=_QUIET_INK)
    return page
