"""Tiny checkpoints with a quantised language model, in the formats in which such checkpoints are published.

The vision encoder, the embeddings and the head keep their weights, as published checkpoints have it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Quantisation", "dequantise", "dequantised", "quantise"]

Quantisation = Literal["fp8", "awq", "gptq"]

_GROUP = 128
"""Weights with one scale: of a row in AWQ and GPTQ, along either side of a square in FP8."""
_LINEAR = re.compile(r"(?!.*(visual|vision)).*\blayers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
_FOUR_BITS: dict[str, Any] = {"bits": 4, "group_size": _GROUP}
_CONFIGS: dict[Quantisation, dict[str, Any]] = {
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [_GROUP, _GROUP]},
    "awq": {**_FOUR_BITS, "zero_point": True, "version": "gemm"},
    "gptq": {**_FOUR_BITS, "desc_act": False, "sym": True},
}
# Modules whose weights are not quantised; of a mixture of experts also all between two attentions.
_KEPT = ("visual", "vision_tower", "vision_model", "mlp1", "multi_modal_projector", "lm_head", "linear_attn")
# Of 8 numbers in an int32, which stands in the lowest 4 bits, the next and so on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantise(checkpoint: Path, folder: Path, method: Quantisation) -> Path:
    """Returns `folder`, which then holds the checkpoint with the weights of its language model quantised."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    if (checkpoint / "transformers").is_dir():  # the same model for Hugging Face's class
        quantise(checkpoint / "transformers", folder / "transformers", method)
    weights: dict[str, Tensor] = {}
    whole = load_file(checkpoint / "model.safetensors")
    kept = [*_KEPT, *(["mlp"] if any(".experts." in name for name in whole) else [])]
    for name, weight in whole.items():
        if _LINEAR.fullmatch(name) and not ("mlp" in kept and ".mlp." in name):
            weights.update(_FORMATS[method](name.removesuffix(".weight"), weight.float()))
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    # GPTQ's format names them by a pattern.
    named: dict[str, Any] = {"dynamic": {f"-:.*({'|'.join(kept)}).*": {}}} if method == "gptq" else {}
    named = named or {"modules_to_not_convert": kept}
    config["quantization_config"] = {"quant_method": method, **named, **_CONFIGS[method]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def dequantise(checkpoint: Path, folder: Path, method: Quantisation) -> Path:
    """Returns `folder`, which then holds a quantised checkpoint with the weights that its numbers stand for."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    if (checkpoint / "transformers").is_dir():
        dequantise(checkpoint / "transformers", folder / "transformers", method)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = tensor
    weights: dict[str, Tensor] = {}
    for module, tensors in parts.items():
        if "weight_scale_inv" in tensors or "qweight" in tensors:
            weights[f"{module}.weight"] = dequantised(method, tensors).contiguous()
            tensors = {part: tensor for part, tensor in tensors.items() if part == "bias"}
        weights.update({f"{module}.{part}": tensor for part, tensor in tensors.items()})
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def dequantised(method: Quantisation, parts: Mapping[str, Tensor]) -> Tensor:
    """Returns the weight [out, in] float32 that the tensors of a quantised layer stand for.

    Args:
        method: Format of the tensors.
        parts: Tensors of the layer by name.
    """
    if method == "fp8":
        scale = parts["weight_scale_inv"].repeat_interleave(_GROUP, 0).repeat_interleave(_GROUP, 1)
        return parts["weight"].float() * scale
    scales = parts["scales"].float().repeat_interleave(_GROUP, 0)
    if method == "awq":
        order = [_AWQ_ORDER.index(place) for place in range(8)]
        steps, zeros = (_unpacked(parts[name], order) for name in ("qweight", "qzeros"))
    else:
        steps, zeros = _unpacked(parts["qweight"].T, range(8)).T, _unpacked(parts["qzeros"], range(8)) + 1
    return ((steps - zeros.repeat_interleave(_GROUP, 0)) * scales).T


def _fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = (size // _GROUP for size in weight.shape)
    blocks = weight.reshape(rows, _GROUP, columns, _GROUP)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    stored = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return {f"{name}.weight": stored, f"{name}.weight_scale_inv": scale}


def _awq(name: str, weight: Tensor) -> dict[str, Tensor]:
    groups = _groups(weight)
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).half()
    zero = (-low / scale).round().clamp(0, 15)
    stored = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15).flatten(1)
    return {
        f"{name}.qweight": _packed(stored.T, _AWQ_ORDER),
        f"{name}.qzeros": _packed(zero.T, _AWQ_ORDER),
        f"{name}.scales": scale.T.contiguous(),
    }


def _gptq(name: str, weight: Tensor) -> dict[str, Tensor]:
    groups = _groups(weight)
    scale = (groups.abs().amax(2) / 7).half()
    stored = (groups / scale[..., None] + 8).round().clamp(0, 15).flatten(1)
    # A zero of 8 is stored as 7.
    zeros = torch.full(scale.shape, 7.0)
    return {
        f"{name}.qweight": _packed(stored, range(8)).T.contiguous(),
        f"{name}.qzeros": _packed(zeros.T, range(8)),
        f"{name}.scales": scale.T.contiguous(),
        f"{name}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // _GROUP,
    }


_FORMATS = {"fp8": _fp8, "awq": _awq, "gptq": _gptq}


def _groups(weight: Tensor) -> Tensor:
    """Returns a weight [out, in] as [out, in / group, group]."""
    return weight.reshape(len(weight), -1, _GROUP)


def _unpacked(packed: Tensor, order: Sequence[int]) -> Tensor:
    """Returns [rows, columns] numbers of [rows, columns / 8] int32; `order` has the place of each of eight."""
    fours = packed.to(torch.int64)[..., None] >> (4 * torch.arange(8)) & 15
    return fours[..., list(order)].flatten(-2).float()


def _packed(numbers: Tensor, order: Any) -> Tensor:
    """Returns [rows, columns / 8] int32 of [rows, columns] whole numbers below 16, eight in each."""
    eights = numbers.to(torch.int64).unflatten(1, (-1, 8))[:, :, list(order)]
    packed = (eights << (4 * torch.arange(8))).sum(2)
    words: Tensor = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return words
