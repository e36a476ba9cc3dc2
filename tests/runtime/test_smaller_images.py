"""Images that are made smaller have the pixels that SGLang would have given to the processor, scaled."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
from transformers import Glm4vImageProcessor, Glm46VImageProcessor, Qwen2VLImageProcessor

from mmtok_deploy import Budget
from mmtok_sglang.families.glm_4_1v import Glm41V
from mmtok_sglang.smaller_images import ProcessorSizes
from tests.runtime.chats import small

SIZES = ProcessorSizes(token_px=28, min_pixels=4 * 784, max_pixels=1280 * 784)
SIZE = (168, 112)


def photo() -> Image.Image:
    return small("coffee").resize(SIZE)


def transparent(colour: tuple[int, int, int]) -> Image.Image:
    """A photograph whose right half is transparent; the pixels there have a colour all the same."""
    image = photo().convert("RGBA")
    image.paste((*colour, 0), (84, 0, 168, 112))
    return image


def palette_with_transparency() -> Image.Image:
    image = photo().quantize(16)
    image.info["transparency"] = 0
    return image


def palette_with_alphas() -> Image.Image:
    image = photo().quantize(16)
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257)


IMAGES: dict[str, tuple[str, Callable[[], Image.Image]]] = {
    "RGB": ("PNG", photo),
    "RGBA, transparent white": ("PNG", lambda: transparent((255, 255, 255))),
    "RGBA, transparent red": ("PNG", lambda: transparent((255, 0, 0))),
    "RGBA, half transparent": ("PNG", lambda: Image.merge("RGBA", (*photo().split(), photo().convert("L")))),
    "LA": ("PNG", lambda: transparent((255, 255, 255)).convert("LA")),
    "P": ("PNG", lambda: photo().quantize(16)),
    "P with a transparent colour": ("PNG", palette_with_transparency),
    "P with an alpha for each colour": ("PNG", palette_with_alphas),
    "L with a transparent grey": ("PNG", lambda: photo().convert("L")),
    "PA": ("", lambda: transparent((255, 255, 255)).convert("PA")),
    "1": ("PNG", lambda: photo().convert("1")),
    "L": ("PNG", lambda: photo().convert("L")),
    "I": ("TIFF", lambda: photo().convert("I")),
    "I;16": ("PNG", sixteen_bit),
    "F": ("TIFF", lambda: photo().convert("F")),
    "CMYK": ("TIFF", lambda: photo().convert("CMYK")),
    "CMYK JPEG": ("JPEG", lambda: photo().convert("CMYK")),
    "YCbCr": ("", lambda: photo().convert("YCbCr")),
    "LAB": ("TIFF", lambda: Image.new("LAB", SIZE, (120, 30, 200))),
    "HSV": ("", lambda: photo().convert("HSV")),
    "RGBX": ("", lambda: photo().convert("RGBX")),
    "RGBa": ("", lambda: transparent((255, 255, 255)).convert("RGBa")),
}


@pytest.mark.parametrize("name", IMAGES)
def test_scaled_pixels_are_those_of_the_unpruned_path(name: str) -> None:
    format_, make = IMAGES[name]
    source: Image.Image | bytes = make()
    if format_:
        buffer = io.BytesIO()
        options = {"transparency": 128} if "transparent grey" in name else {}
        make().save(buffer, format_, **options)
        source = buffer.getvalue()
    unpruned = QwenVLImageProcessor._load_single_item(source, Modality.IMAGE)
    smaller = SIZES.shrink(source, Budget.parse(6), 0)
    assert (unpruned.size, smaller.size, smaller.mode) == (SIZE, (84, 56), "RGB")
    expected = unpruned.resize((84, 56), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(smaller), np.asarray(expected))
    scaled = SIZES.scale(source, 0.5, 0)
    assert np.array_equal(np.asarray(scaled), np.asarray(expected))


def test_an_image_that_the_camera_held_upright_is_not_turned() -> None:
    # SGLang does not turn it either: a turned one would have another grid.
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(buffer, "JPEG", exif=exif)
    unpruned = QwenVLImageProcessor._load_single_item(buffer.getvalue(), Modality.IMAGE)
    smaller = SIZES.shrink(buffer.getvalue(), Budget.parse(6), 0)
    assert (unpruned.size, smaller.size) == (SIZE, (84, 56))
    assert np.array_equal(np.asarray(smaller), np.asarray(unpruned.resize((84, 56), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"size": {"shortest_edge": 30 * 784, "longest_edge": 40 * 784}},
        {"size": {"shortest_edge": 4 * 784, "longest_edge": 9 * 784}},
        {"min_pixels": 30 * 784},
        {"max_pixels": 10 * 784},
        {"size": {"shortest_edge": 4 * 784, "longest_edge": 9 * 784}, "max_pixels": 12 * 784},
    ],
    ids=str,
)
def test_sizes_are_those_that_the_server_gives_the_processor(given: dict[str, Any]) -> None:
    images = Qwen2VLImageProcessor()
    sizes = ProcessorSizes.of(SimpleNamespace(_processor=SimpleNamespace(image_processor=images), image_config=given))
    _, rows, columns = images(images=[photo()], return_tensors="pt", **given)["image_grid_thw"][0].tolist()
    assert sizes._grid(SIZE[1], SIZE[0]) == (rows // 2, columns // 2)


@pytest.mark.parametrize("made", [Glm4vImageProcessor, Glm46VImageProcessor])
@pytest.mark.parametrize("given", [{}, {"size": {"shortest_edge": 60 * 784, "longest_edge": 90 * 784}}], ids=str)
@pytest.mark.parametrize("size", [(600, 400), (112, 84), (30, 20), (5, 3), (2000, 3000)], ids=str)
def test_a_glms_processor_counts_the_pixels_of_two_frames(
    made: Any, given: dict[str, Any], size: tuple[int, int]
) -> None:
    images = made()
    processor = SimpleNamespace(_processor=SimpleNamespace(image_processor=images), image_config=given)
    sizes = ProcessorSizes.of(processor, Glm41V().num_sized_frames(processor))
    _, rows, columns = images(images=[photo().resize(size)], return_tensors="pt", **given)["image_grid_thw"][0].tolist()
    assert sizes._grid(size[1], size[0]) == (rows // 2, columns // 2)
    assert (sizes.min_pixels, sizes.max_pixels) == ((30 * 784, 45 * 784) if given else (8 * 784, 7500 * 784))


def test_transparent_white_stays_white() -> None:
    smaller = SIZES.shrink(transparent((255, 255, 255)), Budget.parse(6), 0)
    assert smaller.getpixel((70, 30)) == (255, 255, 255)
