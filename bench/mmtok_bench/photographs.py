"""Real photographs that are installed with scikit-image; nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path

import skimage
from PIL import Image

from mmtok_bench.client import image_url

__all__ = ["PHOTOGRAPHS", "new_photograph", "photograph", "photograph_url"]

# Shipped inside scikit-image's wheel (its other samples are downloaded on first use), width x height.
PHOTOGRAPHS = {
    "astronaut": "astronaut.png",  # 512 x 512
    "chelsea": "chelsea.png",  # a cat, 451 x 300
    "coffee": "coffee.png",  # a cup, a spoon, a table, 600 x 400
    "motorcycle": "motorcycle_left.png",  # a garage, 741 x 500
    "rocket": "rocket.jpg",  # a launch pad, 640 x 427
}


def photograph(name: str = "coffee") -> Image.Image:
    """Returns an RGB photograph.

    Args:
        name: One of `PHOTOGRAPHS`.

    Raises:
        ValueError: A name that is not one of them.
        FileNotFoundError: A scikit-image that does not ship the file.

    Source: skimage/data of scikit-image 0.26; licences in its README.txt.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"photograph is one of {', '.join(PHOTOGRAPHS)}, got {name!r}")
    path = Path(skimage.__file__).parent / "data" / PHOTOGRAPHS[name]
    if not path.is_file():
        raise FileNotFoundError(f"the scikit-image that is installed ships no {path.name}: install scikit-image 0.26")
    with Image.open(path) as picture:
        return picture.convert("RGB")


def new_photograph(size_px: tuple[int, int], seed: str) -> Image.Image:
    """Returns a photograph of this size that no other seed gives: a part of one, flipped or not."""
    draw = random.Random(seed)
    whole = photograph(draw.choice(list(PHOTOGRAPHS)))
    shape = size_px[0] / size_px[1]
    width = min(whole.width, whole.height * shape) * draw.uniform(0.7, 1.0)
    height = width / shape
    left, top = draw.uniform(0, whole.width - width), draw.uniform(0, whole.height - height)
    part = whole.resize(size_px, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part


def photograph_url(image_px: tuple[int, int], sent_px: tuple[int, int], seed: str) -> str:
    """Returns a new photograph as a data URL: a JPEG, which is what cameras and browsers send.

    Args:
        image_px: Its size.
        sent_px: The size to which the client shrinks it before it is sent.
        seed: Which photograph.
    """
    image = new_photograph(image_px, seed)
    if sent_px != image_px:
        image = image.resize(sent_px, Image.Resampling.LANCZOS)
    return image_url(image, lossless=False)
