"""Images for load tests: each request gets a different one."""

from __future__ import annotations

import random
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from mmtok_bench.client import image_url
from mmtok_deploy.photographs import PHOTOGRAPHS, photograph

__all__ = ["Shown", "load_image_url", "new_document", "new_photograph"]

Shown = Literal["photograph", "document"]
"""What an image shows."""

_LINE_PX = 20
_INK = (32, 32, 32)


def new_photograph(size_px: tuple[int, int], seed: str) -> Image.Image:
    """Returns a photograph of this size that depends on the seed: a random crop of one, flipped or not."""
    draw = random.Random(seed)
    whole = photograph(draw.choice(list(PHOTOGRAPHS)))
    shape = size_px[0] / size_px[1]
    width = min(whole.width, whole.height * shape) * draw.uniform(0.7, 1.0)
    height = width / shape
    left, top = draw.uniform(0, whole.width - width), draw.uniform(0, whole.height - height)
    part = whole.resize(size_px, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part


def new_document(size_px: tuple[int, int], seed: str) -> Image.Image:
    """Returns a page of text of this size that depends on the seed: random words in paragraphs, on white paper."""
    draw = random.Random(seed)
    page = Image.new("RGB", size_px, "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(0.7 * _LINE_PX)
    margin = round(0.1 * min(size_px))
    y = margin
    while y < size_px[1] - margin - _LINE_PX:
        for line in range(draw.randint(2, 6)):
            # All lines of a paragraph but the first end at a random place.
            end = size_px[0] - margin - (draw.random() * size_px[0] / 2 if line else 0)
            x: float = margin
            while y < size_px[1] - margin - _LINE_PX:
                word = "".join(draw.choices("abcdefghilmnoprstu", k=draw.randint(2, 9)))
                width = pen.textlength(word + " ", font=font)
                if x + width > end:
                    break
                pen.text((x, y), word, fill=_INK, font=font)
                x += width
            y += _LINE_PX
        y += draw.choice((1, 1, 3)) * _LINE_PX
    return page


def load_image_url(
    shown: Shown, image_px: tuple[int, int], sent_px: tuple[int, int], seed: str, *, lossless: bool = False
) -> str:
    """Returns a new image as a data URL: a JPEG, as cameras and browsers send, or a PNG.

    Args:
        shown: What it shows.
        image_px: Size of the image.
        sent_px: Size to which the client shrinks it before it is sent.
        seed: Decides which image.
        lossless: Whether it is a PNG.
    """
    image = (new_photograph if shown == "photograph" else new_document)(image_px, seed)
    if sent_px != image_px:
        image = image.resize(sent_px, Image.Resampling.LANCZOS)
    return image_url(image, lossless=lossless)
