"""Photographs for load tests: each request gets a different one."""

from __future__ import annotations

import random

from PIL import Image

from mmtok_bench.client import image_url
from mmtok_deploy.photographs import PHOTOGRAPHS, photograph

__all__ = ["new_photograph", "photograph_url"]


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


def photograph_url(image_px: tuple[int, int], sent_px: tuple[int, int], seed: str, *, lossless: bool = False) -> str:
    """Returns a new photograph as a data URL: a JPEG, as cameras and browsers send, or a PNG.

    Args:
        image_px: Size of the photograph.
        sent_px: Size to which the client shrinks it before it is sent.
        seed: Decides which photograph.
        lossless: Whether it is a PNG.
    """
    image = new_photograph(image_px, seed)
    if sent_px != image_px:
        image = image.resize(sent_px, Image.Resampling.LANCZOS)
    return image_url(image, lossless=lossless)
