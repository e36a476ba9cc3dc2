"""Which squares of a picture look like the one beside them: blank paper, plain screens."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["WHOLE", "Box", "repeated_tokens", "share_of_distinct"]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a picture, as shares of its sides."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

# Pixels to a side of a square: with fewer, small print on paper is as grey as its neighbour.
_SQUARE_PX = 8
_MAX_DIFFERENCE = 8


def repeated_tokens(pixels: NDArray[np.uint8], grid: tuple[int, int], max_difference: int) -> NDArray[np.bool_]:
    """Returns which tokens of an image repeat a neighbour, [N] in raster order.

    A token repeats the one left of it, or the one above it, if no two of their pixels differ by more than
    `max_difference`. A neighbour that is a repetition itself stands for the token that it repeats, so a slow gradient
    is not taken for one colour. The first token repeats none.

    Args:
        pixels: [N, X], the pixels of each token.
        grid: Rows and columns of tokens.
        max_difference: From 0 (equal pixels) to 255.
    """
    rows, columns = grid
    places = np.arange(rows * columns)
    # The token that each one stands for.
    shown = places.copy()
    # A diagonal at a time: its tokens have their neighbours on the one before.
    for diagonal in range(1, rows + columns - 1):
        row = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        here = row * columns + diagonal - row
        for has_neighbour, step in ((row < diagonal, 1), (row > 0, columns)):
            compared = here[has_neighbour & (shown[here] == here)]
            if len(compared):
                neighbours = shown[compared - step]
                one, other = pixels[compared], pixels[neighbours]
                difference = (np.maximum(one, other) - np.minimum(one, other)).max(axis=1)
                shown[compared] = np.where(difference <= max_difference, neighbours, compared)
    repeated: NDArray[np.bool_] = shown != places
    return repeated


def share_of_distinct(
    source: bytes | Image.Image, num_tokens: int, box_seen: Callable[[int, int], Box] = lambda width, height: WHOLE
) -> Fraction:
    """Returns the share of a picture's squares that repeat no neighbour, in whole percent, rounded up.

    The picture is divided into about `num_tokens` squares, which need not be those of the tokens. Each is compared at
    8 x 8 pixels, and repeats a neighbour if no two of these differ by more than 8 of 255 (`repeated_tokens`).

    A file is decoded by Pillow, a JPEG at a part of its size where that is enough. So the share is the same, whatever
    decodes the picture for the model.

    Args:
        source: An encoded picture, or a decoded one.
        num_tokens: At least 1.
        box_seen: Returns the part that the model sees of a picture of this width and height.

    Raises:
        OSError: The file cannot be decoded; Pillow's formats raise other errors, too.
    """
    from PIL import Image

    picture = Image.open(BytesIO(source)) if isinstance(source, bytes) else source
    left, top, right, bottom = box_seen(picture.width, picture.height)
    width, height = (right - left) * picture.width, (bottom - top) * picture.height
    rows = min(num_tokens, max(1, round(math.sqrt(num_tokens * height / width))))
    columns = max(1, round(num_tokens / rows))
    size = (_SQUARE_PX * columns, _SQUARE_PX * rows)
    if isinstance(source, bytes):
        picture.draft("RGB", (math.ceil(size[0] / (right - left)), math.ceil(size[1] / (bottom - top))))
    seen = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
    small = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX, seen))
    squares = small.reshape(rows, _SQUARE_PX, columns, _SQUARE_PX, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    num_distinct = np.count_nonzero(~repeated_tokens(squares, (rows, columns), _MAX_DIFFERENCE))
    return Fraction(math.ceil(100 * num_distinct / (rows * columns)), 100)
