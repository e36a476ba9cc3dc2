from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtok_bench.families import FamilyName
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.presets import PRESETS
from mmtok_export.encoders import EncoderError, build_encoder, export_encoder
from tests.exporters.encoder_cases import (
    assert_equal,
    checkpoint,
    hugging_face,
    pixels_of,
    run,
    session_of,
    signature,
)

FAMILY: FamilyName = "llava-1.5"
IMAGE_SIZE = (336, 336)


@pytest.mark.parametrize("batch_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_graph_is_hugging_faces(batch_size: int) -> None:
    exported = export_encoder(checkpoint(FAMILY), IMAGE_SIZE, batch=DimRange.fixed(batch_size))
    assert (exported.module.family, exported.module.grid, exported.module.num_tokens) == (
        FAMILY,
        (1, 24, 24),
        DimRange.fixed(576),
    )
    assert exported.module.family in PRESETS
    assert not exported.module.has_positions
    assert signature(exported) == {
        "pixels": ([batch_size, 3, 336, 336], "FLOAT"),
        "vision": ([batch_size, 576, 256], "FLOAT"),
        "keys": ([batch_size, 576, 64], "FLOAT"),
    }
    pixels = pixels_of(FAMILY, IMAGE_SIZE, batch_size)
    assert tuple(pixels.shape) == exported.module.pixels_shape
    assert_equal(run(exported, pixels), hugging_face(FAMILY, pixels, IMAGE_SIZE, torch.float32), torch.float32)


def test_one_graph_of_any_number_of_images() -> None:
    session = session_of(export_encoder(checkpoint(FAMILY), IMAGE_SIZE, batch=DimRange(1, 1, 8)))
    for batch_size in (1, 2):
        pixels = pixels_of(FAMILY, IMAGE_SIZE, batch_size)
        outputs = session.run(["vision", "keys"], {"pixels": pixels.numpy()})
        assert_equal(outputs, hugging_face(FAMILY, pixels, IMAGE_SIZE, torch.float32), torch.float32)


@pytest.mark.exhaustive
def test_float16() -> None:
    pixels = pixels_of(FAMILY, IMAGE_SIZE)
    outputs = run(export_encoder(checkpoint(FAMILY), IMAGE_SIZE, dtype=torch.float16), pixels)
    assert [output.dtype.name for output in outputs] == ["float16", "float16"]
    assert_equal(outputs, hugging_face(FAMILY, pixels, IMAGE_SIZE, torch.float16), torch.float16)


def test_bfloat16() -> None:
    # ONNX Runtime's CPU provider multiplies no bfloat16 matrices.
    pixels = pixels_of(FAMILY, IMAGE_SIZE)
    outputs = list(build_encoder(checkpoint(FAMILY), IMAGE_SIZE, dtype=torch.bfloat16)(pixels))
    assert [output.dtype for output in outputs] == [torch.bfloat16, torch.bfloat16]
    assert_equal(outputs, hugging_face(FAMILY, pixels, IMAGE_SIZE, torch.bfloat16), torch.bfloat16)


def test_layers_past_the_one_the_projector_reads_are_left_out() -> None:
    names = [name for name, _ in build_encoder(checkpoint(FAMILY), IMAGE_SIZE).named_parameters()]
    assert any(".layers.1." in name for name in names)
    assert not any(".layers.2." in name or "post_layernorm" in name for name in names)


@pytest.mark.parametrize("image_size", [(336, 335), (672, 672), (0, 0)])
def test_an_image_size_that_is_not_the_towers(image_size: tuple[int, int]) -> None:
    with pytest.raises(EncoderError, match=f"images of 336x336, got {image_size[0]}x{image_size[1]}"):
        export_encoder(checkpoint(FAMILY), image_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "drops the class token .* got 'full'"),
        ({"vision_feature_layer": [-2, -3]}, r"one of the tower's 4 hidden states, got \[-2, -3\]"),
        ({"vision_feature_layer": -5}, "one of the tower's 4 hidden states, got -5"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "clip_vision_model, got siglip_vision_model"),
        ({"vision_feature_layer": "last"}, "describes no llava-1.5 model: "),
        ({"vision_config": {"model_type": "imagined"}}, "describes no llava-1.5 model: "),
    ],
)
def test_a_configuration_that_is_not_llava_1_5s(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((checkpoint(FAMILY) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(EncoderError, match=message):
        build_encoder(tmp_path, IMAGE_SIZE, random_weights=True)


def test_the_original_layout(tmp_path: Path) -> None:
    """Hugging Face's first conversions name CLIP's tensors vision_tower.vision_model.*."""
    from safetensors.torch import load_file, save_file

    shutil.copy(checkpoint(FAMILY) / "config.json", tmp_path)
    stored = load_file(checkpoint(FAMILY) / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    pixels = pixels_of(FAMILY, IMAGE_SIZE)
    expected = hugging_face(FAMILY, pixels, IMAGE_SIZE, torch.float32)
    assert_equal(list(build_encoder(tmp_path, IMAGE_SIZE)(pixels)), expected, torch.float32)
