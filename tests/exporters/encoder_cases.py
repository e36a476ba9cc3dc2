"""What the encoder tests share: tiny checkpoints, photographs as pixels, and Hugging Face's own answer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from transformers.vision_utils import get_vision_window_index

from mmtok_bench.families import FamilyName
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_deploy.photographs import photograph
from mmtok_export.encoders import ExportedEncoder

CHECKPOINTS = Path(__file__).parents[2] / "artifacts" / "checkpoints"
PHOTOGRAPHS = ("coffee", "chelsea")

_OUTPUTS = ("vision", "keys", "levels")

# Outputs reach 14 on most tiny checkpoints; in proportion where they reach more.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 3e-2,  # 11 bits of mantissa; sums are made in another order
    torch.bfloat16: 2e-1,  # 8 bits
}


def checkpoint(family: FamilyName) -> Path:
    return make_tiny_checkpoint(family, CHECKPOINTS / family)


@cache
def pixels_of(family: FamilyName, image_size: tuple[int, int], batch_size: int = 1) -> Tensor:
    """Returns photographs of that size as the family's own image processor yields them."""
    processor = AutoImageProcessor.from_pretrained(checkpoint(family))
    images = [photograph(name).resize(image_size) for name in PHOTOGRAPHS[:batch_size]]
    pixels: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels


@torch.inference_mode()
def hugging_face(family: FamilyName, pixels: Tensor, image_size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Returns vision [B, N, D], keys [B, N, d] and any levels [B, N, L * D], float32, of Hugging Face's encoder."""
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint(family), dtype=dtype).eval()
    pixels = pixels.to(dtype)
    if family == "llava-next":
        keys = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return [model.model.multi_modal_projector(keys).float(), keys.float()]
    if family == "llava-1.5":
        output = model.get_image_features(pixels)
        keys = output.hidden_states[-2][:, 1:]
    elif family.startswith("glm"):
        joined: list[Tensor] = []
        model.model.visual.downsample.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0]))
        grids = torch.tensor([[1, image_size[1] // 14, image_size[0] // 14]])
        output = model.get_image_features(pixels, grids.repeat(len(pixels) // int(grids.prod()), 1))
        keys = joined[0].float().mean((2, 3)).unflatten(0, (len(output.pooler_output), -1))
    elif family.startswith(("qwen2-", "qwen3")):
        side = 14 if family == "qwen2-vl" else 16
        grids = torch.tensor([[1, image_size[1] // side, image_size[0] // side]])
        grids = grids.repeat(len(pixels) // int(grids.prod()), 1)
        output = model.get_image_features(pixels, grids)
        keys = output.last_hidden_state.unflatten(0, (-1, 4)).float().mean(dim=1).unflatten(0, (len(grids), -1))
        features = [torch.stack(list(output.pooler_output)).float(), keys.float()]
        if not family.startswith("qwen3-vl"):
            return features
        levels = torch.cat([torch.stack(list(level)) for level in output.deepstack_features], dim=2)
        return [*features, levels.float()]
    else:
        patches = torch.tensor([1, image_size[1] // 14, image_size[0] // 14])
        grids = patches.repeat(len(pixels) // int(patches.prod()), 1)
        output = model.get_image_features(pixels, grids)
        order, _ = get_vision_window_index(grids, 2, 112, 14)
        groups = output.last_hidden_state.unflatten(0, (-1, 4)).float().mean(dim=1)
        keys = groups[order.argsort()].unflatten(0, (len(grids), -1))
    return [torch.stack(list(output.pooler_output)).float(), keys.float()]


def session_of(exported: ExportedEncoder) -> onnxruntime.InferenceSession:
    """Returns the model in ONNX Runtime, on the CPU, once the checker has passed it."""
    proto = onnx_ir.to_proto(exported.model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def run(exported: ExportedEncoder, pixels: Tensor) -> list[np.ndarray[Any, Any]]:
    """Returns what ONNX Runtime computes on the CPU, once the checker has passed the model."""
    session = session_of(exported)
    names = [output.name for output in session.get_outputs()]
    assert names == list(_OUTPUTS[: len(names)])
    outputs: list[np.ndarray[Any, Any]] = session.run(names, {"pixels": pixels.numpy()})
    return outputs


def assert_equal(outputs: list[Any], expected: list[Tensor], dtype: torch.dtype) -> None:
    for name, output, answer in zip(_OUTPUTS[: len(outputs)], outputs, expected, strict=True):
        found = torch.as_tensor(output).float()
        assert found.shape == answer.shape, name
        assert (found - answer).abs().max() < TOLERANCE[dtype] * max(1.0, float(answer.abs().max()) / 14), name


def signature(exported: ExportedEncoder) -> dict[str, tuple[list[int], str]]:
    graph = exported.model.graph
    found = {}
    for value in (*graph.inputs, *graph.outputs):
        assert value.name is not None
        assert value.shape is not None
        assert value.dtype is not None
        found[value.name] = ([int(size) for size in value.shape.numpy()], value.dtype.name)
    return found
