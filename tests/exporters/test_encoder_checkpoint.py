from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtok_bench.families import FamilyName
from mmtok_export.encoders import EncoderError, build_encoder, export_encoder
from tests.exporters.encoder_cases import assert_equal, checkpoint, hugging_face, pixels_of

FAMILY: FamilyName = "qwen2.5-vl"
IMAGE_SIZE = (140, 84)
# The 7B model's configuration as published (text at the top, `in_chans`, no rope_parameters), with a smaller tower.
PUBLISHED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 2,
        "hidden_act": "silu",
        "hidden_size": 160,
        "intermediate_size": 428,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


def stored_tensors() -> dict[str, Tensor]:
    return load_file(checkpoint(FAMILY) / "model.safetensors")


def copy_with(folder: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copy(checkpoint(FAMILY) / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def configured(folder: Path, content: Any) -> Path:
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.slow
def test_random_weights_need_the_configuration_alone(tmp_path: Path) -> None:
    exported = export_encoder(configured(tmp_path, PUBLISHED), (252, 140), dtype=torch.float16, random_weights=True)
    assert (exported.module.grid, exported.module.vision_width, exported.module.keys_width) == ((1, 5, 9), 3584, 160)
    onnx_ir.save(exported.model, tmp_path / "encoder.onnx", external_data="encoder.data")
    onnx.checker.check_model(tmp_path / "encoder.onnx", full_check=True)
    assert {opset.domain for opset in onnx.load(tmp_path / "encoder.onnx", load_external_data=False).opset_import} == {
        ""
    }
    # The file says nothing about the machine that made it.
    content = (tmp_path / "encoder.onnx").read_bytes()
    for trace in (b".py", b"pkg.torch", b"site-packages", str(Path.cwd()).encode()):
        assert trace not in content


@pytest.mark.parametrize("layout", ["shards", "below model"])
def test_layouts_of_a_checkpoint(tmp_path: Path, layout: str) -> None:
    tensors = stored_tensors()
    if layout == "below model":
        copy_with(
            tmp_path, {f"model.{name}" if name.startswith("visual.") else name: tensors[name] for name in tensors}
        )
    else:
        # The shard with the language model is not there, and need not be.
        shutil.copy(checkpoint(FAMILY) / "config.json", tmp_path)
        shards = {name: f"{'ab'[idx % 2] if name.startswith('visual.') else 'c'}" for idx, name in enumerate(tensors)}
        for shard in "ab":
            save_file({name: tensors[name] for name in tensors if shards[name] == shard}, tmp_path / shard)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    pixels = pixels_of(FAMILY, IMAGE_SIZE)
    expected = hugging_face(FAMILY, pixels, IMAGE_SIZE, torch.float32)
    assert_equal(list(build_encoder(tmp_path, IMAGE_SIZE)(pixels)), expected, torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "a JSON list: expected an object"),
        ({}, "has no vision tower .*expected model_type llava or llava_next or qwen2_vl or qwen2_5_vl"),
        ({"model_type": "qwen2"}, "no vision tower .*'qwen2'.*expected model_type llava or llava_next or qwen2_vl or"),
        ({"model_type": "llava"}, "no vision tower"),
        (
            {"model_type": "gemma3", "vision_config": {}},
            "not supported .*'gemma3'.* expected model_type llava or llava_next or .* or internvl and",
        ),
        ({"model_type": ["llava"], "vision_config": {}}, "not supported"),
        ({"model_type": "qwen2_5_vl", "vision_config": {"depth": "deep"}}, "describes no qwen2.5-vl model: "),
        ({"model_type": "qwen2_5_vl", "vision_config": {"hidden_act": "nod"}}, "describes no qwen2.5-vl model: "),
    ],
)
def test_a_configuration_without_an_encoder(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        export_encoder(configured(tmp_path, config), IMAGE_SIZE, random_weights=True)


def test_no_configuration(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(EncoderError, match=r"expected a Hugging Face checkpoint directory, .* has no config.json"):
            export_encoder(folder, IMAGE_SIZE)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"has no weights: expected model.safetensors, or .*config.json alone"):
        export_encoder(configured(tmp_path, PUBLISHED), IMAGE_SIZE)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in stored_tensors().items() if "merger" not in name}
    with pytest.raises(
        EncoderError, match=r"lacks 5 of .* 30 tensors: visual.merger.ln_q.weight, .*, \.\.\.; expected"
    ):
        export_encoder(copy_with(tmp_path, tensors), IMAGE_SIZE)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(65), r"has shape \[65\], and config.json says \[64\]"),
        (torch.zeros(64, dtype=torch.float8_e4m3fn), "stored as F8_E4M3: .*not quantised"),
    ],
)
def test_a_tensor_of_another_model(tmp_path: Path, tensor: Tensor, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        export_encoder(copy_with(tmp_path, stored_tensors() | {"visual.merger.ln_q.weight": tensor}), IMAGE_SIZE)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    shutil.copy(checkpoint(FAMILY) / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((checkpoint(FAMILY) / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(EncoderError, match=r"cannot be read as safetensors: .*download it again"):
        export_encoder(tmp_path, IMAGE_SIZE)
    for index, message in (({}, "no weight_map"), ({"weight_map": {"visual.x": "absent"}}, "absent cannot be read")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(EncoderError, match=message):
            export_encoder(tmp_path, IMAGE_SIZE)


def test_a_type_that_is_none() -> None:
    with pytest.raises(EncoderError, match=r"dtype is one of torch.float32, .* got torch.float64"):
        export_encoder(checkpoint(FAMILY), IMAGE_SIZE, dtype=torch.float64)
