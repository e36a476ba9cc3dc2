"""Real photographs that are installed with scikit-image; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PHOTOGRAPHS", "photograph"]

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
        ModuleNotFoundError: No scikit-image.

    Source: skimage/data of scikit-image 0.26; licences in its README.txt.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"photograph is one of {', '.join(PHOTOGRAPHS)}, got {name!r}")
    import skimage
    from PIL import Image

    path = Path(skimage.__file__).parent / "data" / PHOTOGRAPHS[name]
    if not path.is_file():
        raise FileNotFoundError(f"the scikit-image that is installed ships no {path.name}: install scikit-image 0.26")
    with Image.open(path) as picture:
        return picture.convert("RGB")
