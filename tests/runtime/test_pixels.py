from __future__ import annotations

import logging
from typing import Any, get_args

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from transformers import AutoImageProcessor

from mmtok_bench.families import FamilyName
from mmtok_deploy.photographs import photograph
from mmtok_sglang.pixels import PixelScale, compact_items, for_encoder, normalise_item, take_over_scaling
from tests.runtime.conftest import checkpoint

CPU = torch.device("cpu")
SIZES = [(451, 300), (28, 28), (333, 1000), (640, 63)]


def processor_of(family: FamilyName, **settings: Any) -> Any:
    return AutoImageProcessor.from_pretrained(checkpoint(family), **settings)


def scale_of(image_processor: Any) -> PixelScale:
    scale = take_over_scaling(image_processor, {})
    assert scale is not None
    return scale


def item_of(pixels: torch.Tensor) -> MultimodalDataItem:
    return MultimodalDataItem(modality=Modality.IMAGE, feature=pixels)


@pytest.mark.parametrize("size", SIZES, ids=str)
# SGLang scales InternVL's images itself.
@pytest.mark.parametrize("family", [name for name in get_args(FamilyName) if name != "internvl3"])
def test_pixels_are_bit_for_bit_the_processors(family: FamilyName, size: tuple[int, int]) -> None:
    image_processor = processor_of(family)
    images = [photograph("chelsea").resize(size), photograph("coffee").resize(size)]
    expected = image_processor(images=images, return_tensors="pt")["pixel_values"]
    scale = scale_of(image_processor)
    item = item_of(image_processor(images=images, return_tensors="pt")["pixel_values"])
    compact_items([item], scale)
    assert item.feature.dtype == torch.uint8
    assert expected.nbytes == item.feature.nbytes * (8 if family.startswith(("qwen", "glm")) else 4)
    (found,) = for_encoder([item], CPU)
    if family == "llava-next":
        # A missing tile is zeros, which no encoder reads: before the scaling here, after it there.
        is_missing = (expected == 0).flatten(2).all(dim=2)
        assert torch.equal(found.feature[~is_missing], expected[~is_missing])
    else:
        assert torch.equal(found.feature, expected)
    assert item.feature.dtype == torch.uint8


def test_other_settings_of_the_processor_are_followed() -> None:
    image_processor = processor_of("qwen2.5-vl", image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    image = photograph()
    expected = image_processor(images=[image], return_tensors="pt")["pixel_values"]
    scale = scale_of(image_processor)
    raw = image_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(scale.normalise(scale.compact(raw), CPU), expected)


@pytest.mark.parametrize("name", ["image_mean", "do_normalize", "rescale_factor"])
def test_a_server_with_scaling_of_its_own_keeps_float32(name: str, caplog: pytest.LogCaptureFixture) -> None:
    image_processor = processor_of("qwen2.5-vl")
    with caplog.at_level(logging.INFO):
        assert take_over_scaling(image_processor, {name: 1}) is None
    assert f"--mm-process-config sets {name}" in caplog.text
    assert image_processor.do_rescale


def test_a_processor_that_scales_otherwise_is_left_as_it_was(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_processor = processor_of("qwen2.5-vl")
    plain = type(image_processor).rescale_and_normalize

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        pixels = plain(self, *args, **kwargs)
        return pixels * 1.01 if pixels.is_floating_point() else pixels

    monkeypatch.setattr(type(image_processor), "rescale_and_normalize", other)
    expected = image_processor(images=[photograph()], return_tensors="pt")["pixel_values"]
    with caplog.at_level(logging.INFO):
        assert take_over_scaling(image_processor, {}) is None
    assert "its pixels are other ones" in caplog.text
    assert torch.equal(image_processor(images=[photograph()], return_tensors="pt")["pixel_values"], expected)


def test_a_processor_that_does_not_normalise_keeps_its_way() -> None:
    image_processor = processor_of("llava-1.5", do_normalize=False)
    assert take_over_scaling(image_processor, {}) is None
    assert image_processor.do_rescale


def test_features_that_are_not_pixels_stay_as_they_are() -> None:
    scale = PixelScale([0.5] * 3, [0.5] * 3)
    item = item_of(torch.rand(2, 8))
    compact_items([item], scale)
    assert for_encoder([item], CPU)[0].feature is item.feature
    normalise_item(item)
    assert for_encoder([item], CPU)[0].feature is item.feature


def test_an_item_is_normalised_once() -> None:
    image_processor = processor_of("llava-1.5")
    expected = image_processor(images=[photograph()], return_tensors="pt")["pixel_values"]
    scale = scale_of(image_processor)
    item = item_of(image_processor(images=[photograph()], return_tensors="pt")["pixel_values"])
    compact_items([item], scale)
    for _ in range(2):
        normalise_item(item)
        assert torch.equal(item.feature, expected)
