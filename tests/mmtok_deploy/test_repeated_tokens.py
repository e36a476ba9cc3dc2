"""Which squares of a picture repeat a neighbour, and how large a share does not."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mmtok_deploy.photographs import photograph
from mmtok_deploy.repeated_tokens import repeated_tokens, share_of_distinct

Pixels = NDArray[np.uint8]


def one_by_one(pixels: Pixels, columns: int, max_difference: int) -> list[bool]:
    """The definition, a token after the other."""
    tokens = pixels.astype(int)
    shown: list[int] = []
    for place, token in enumerate(tokens):
        neighbours = ([shown[-1]] if place % columns else []) + ([shown[place - columns]] if place >= columns else [])
        like = [each for each in neighbours if np.abs(tokens[each] - token).max() <= max_difference]
        shown.append(like[0] if like else place)
    return [place != each for place, each in enumerate(shown)]


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 1), (5, 7), (8, 3)])
@pytest.mark.parametrize("max_difference", [0, 1, 3, 255])
def test_tokens_repeat_a_neighbour_as_defined(grid: tuple[int, int], max_difference: int) -> None:
    rng = np.random.default_rng(0)
    for num_colours in (1, 2, 5):
        colours = rng.integers(0, num_colours, (grid[0] * grid[1], 1))
        pixels = (colours * 3 + rng.integers(0, 2, (len(colours), 12))).astype(np.uint8)
        assert repeated_tokens(pixels, grid, max_difference).tolist() == one_by_one(pixels, grid[1], max_difference)


def test_blank_paper_is_one_token() -> None:
    assert repeated_tokens(np.full((35, 12), 255, np.uint8), (5, 7), 0).tolist() == [False] + [True] * 34


def test_a_slow_gradient_is_not_one_colour() -> None:
    pixels = np.repeat(np.arange(20, dtype=np.uint8)[:, None], 12, axis=1)
    # Each is 1 from its neighbour; one in four is distinct, from which the next three differ by at most 3.
    assert (~repeated_tokens(pixels, (1, 20), 3)).nonzero()[0].tolist() == [0, 4, 8, 12, 16]


def test_a_single_pixel_counts() -> None:
    pixels = np.zeros((2, 12), np.uint8)
    pixels[1, 7] = 5
    assert repeated_tokens(pixels, (1, 2), 4).tolist() == [False, False]
    assert repeated_tokens(pixels, (1, 2), 5).tolist() == [False, True]


def test_the_difference_of_far_values_does_not_wrap_around() -> None:
    pixels = np.array([[255] * 12, [0] * 12], np.uint8)
    assert repeated_tokens(pixels, (1, 2), 254).tolist() == [False, False]


def encoded(picture: Image.Image, name: str, **options: int) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, name, **options)
    return buffer.getvalue()


def paper(width: int = 400, height: int = 400) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


@pytest.mark.parametrize("num_tokens", [1, 2, 100, 10_000])
def test_of_blank_paper_one_square_is_distinct(num_tokens: int) -> None:
    assert share_of_distinct(paper(), num_tokens) == Fraction(-(-100 // num_tokens), 100)


def test_a_photograph_is_distinct() -> None:
    assert share_of_distinct(photograph("chelsea"), 256) >= Fraction(95, 100)


def test_a_photograph_on_blank_paper() -> None:
    page = paper()
    # Just 5 x 5 of 10 x 10 squares. Beside the first square of the paper, those behind the photograph begin anew.
    page.paste(photograph("chelsea").resize((200, 200)), (80, 80))
    assert Fraction(25, 100) < share_of_distinct(page, 100) <= Fraction(36, 100)


@pytest.mark.parametrize(("width", "height"), [(800, 200), (200, 800), (10, 3000), (1, 1), (3, 2)])
def test_every_shape_has_a_share(width: int, height: int) -> None:
    assert share_of_distinct(paper(width, height), 64) == Fraction(2, 100)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    assert 0 < share_of_distinct(noise, 64) <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_of_every_mode(mode: str) -> None:
    assert share_of_distinct(Image.new(mode, (60, 60)), 16) == Fraction(7, 100)


def test_a_file_has_the_share_of_what_is_in_it() -> None:
    picture = photograph("rocket")
    assert share_of_distinct(encoded(picture, "PNG"), 400) == share_of_distinct(picture, 400)
    # A JPEG is decoded at a part of its size, which blurs it otherwise.
    large = picture.resize((2560, 1708))
    shares = [share_of_distinct(each, 400) for each in (large, encoded(large, "JPEG", quality=95))]
    assert abs(shares[0] - shares[1]) <= Fraction(3, 100)


@pytest.mark.parametrize("name", ["BMP", "PPM", "SGI", "TGA", "TIFF", "WEBP"])
def test_files_of_every_format(name: str) -> None:
    picture = photograph("rocket").resize((160, 107))
    options = {"lossless": 1} if name == "WEBP" else {}
    assert share_of_distinct(encoded(picture, name, **options), 100) == share_of_distinct(picture, 100)


@given(width=st.integers(1, 300), height=st.integers(1, 300), num_tokens=st.integers(1, 2000), seed=st.integers(0, 9))
def test_pictures_of_any_size(width: int, height: int, num_tokens: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    # A half is blank.
    levels[:, : width // 2] = 255
    share = share_of_distinct(Image.fromarray(levels), num_tokens)
    assert 0 < share <= 1
    # The part that the model sees of it, cut out or not.
    box = (width // 2 / width, 0.0, 1.0, 1.0)
    part = Image.fromarray(levels[:, width // 2 :])
    seen = share_of_distinct(Image.fromarray(levels), num_tokens, lambda *_: box)
    assert seen == share_of_distinct(part, num_tokens)


def test_a_users_picture_stays_as_it_is() -> None:
    with Image.open(BytesIO(encoded(photograph("rocket").resize((1280, 856)), "JPEG"))) as picture:
        share_of_distinct(picture, 16)
        assert picture.size == (1280, 856)


def test_of_a_part_alone() -> None:
    page = paper(300, 100)
    page.paste(photograph("chelsea").resize((100, 100)), (100, 0))
    whole = share_of_distinct(page, 300)
    middle = share_of_distinct(page, 100, lambda width, height: (1 / 3, 0.0, 2 / 3, 1.0))
    assert whole < Fraction(40, 100)
    assert middle == share_of_distinct(page.crop((100, 0, 200, 100)), 100) > Fraction(90, 100)
    # The part of a file, too.
    assert share_of_distinct(encoded(page, "PNG"), 100, lambda *_: (1 / 3, 0.0, 2 / 3, 1.0)) == middle


def test_what_is_no_picture_fails() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        share_of_distinct(b"no picture", 16)
    with pytest.raises(OSError, match="truncated"):
        share_of_distinct(encoded(photograph("rocket"), "PNG")[:5000], 16)
