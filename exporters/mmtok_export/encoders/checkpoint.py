"""Reads the configuration and an encoder's weights from a Hugging Face checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mmtok_export.checkpoint_config import EncoderError, read_json
from mmtok_export.encoders.base import Encoder

__all__ = ["fill_with_noise", "load_weights"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_STORED = ("BF16", "F16", "F32")
_NAMES_SHOWN = 3


def load_weights(module: Encoder, checkpoint: Path, dtype: torch.dtype) -> None:
    """Loads the parameters of a module on the meta device from the checkpoint's tensors; reads no other tensors.

    Args:
        module: The module.
        checkpoint: Directory with one safetensors file, or several and their index.
        dtype: Dtype of the loaded parameters.

    Raises:
        EncoderError: There is no safetensors file, or a tensor is missing, has another shape or is quantised.
    """
    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for path in _files(checkpoint, module):
        try:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    names = module.parameters_in(stored)
                    if names[0] in shapes:
                        rows, *others = shapes[names[0]]
                        _check(path, stored, file.get_slice(stored), [len(names) * rows, *others])
                        parts = file.get_tensor(stored).to(dtype).chunk(len(names))
                        found |= zip(names, parts, strict=True)
        except (OSError, SafetensorError) as error:
            raise EncoderError(f"{path} cannot be read as safetensors: {error}; download it again") from error
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise EncoderError(
            f"{checkpoint} lacks {len(missing)} of the vision encoder's {len(shapes)} tensors: "
            f"{', '.join(missing[:_NAMES_SHOWN])}{', ...' if len(missing) > _NAMES_SHOWN else ''}; "
            "expected an unquantised Hugging Face checkpoint of the architecture that config.json names"
        )
    module.load_state_dict(found, strict=False, assign=True)


def fill_with_noise(module: nn.Module, dtype: torch.dtype, *, seed: int = 0) -> None:
    """Sets the parameters of a module on the meta device: norms to 1, biases to 0, others to random N(0, 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        value = torch.zeros(parameter.shape, dtype=dtype)
        if parameter.ndim > 1:
            value.normal_(std=0.02, generator=generator)
        elif name.endswith("weight"):
            value.fill_(1)
        values[name] = value
    module.load_state_dict(values, strict=False, assign=True)


def _files(checkpoint: Path, module: Encoder) -> list[Path]:
    if (checkpoint / _INDEX).is_file():
        shards = read_json(checkpoint, _INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise EncoderError(f"{checkpoint / _INDEX} has no weight_map: download it again")
        # Shards that contain only the language model may be missing.
        names = {shard for stored, shard in shards.items() if not _is_language(module.parameters_in(stored)[0])}
        return [checkpoint / name for name in sorted(names)]
    if (checkpoint / _SINGLE).is_file():
        return [checkpoint / _SINGLE]
    raise EncoderError(
        f"{checkpoint} has no weights: expected {_SINGLE}, or shards and {_INDEX} "
        "(random weights need config.json alone)"
    )


def _is_language(name: str) -> bool:
    return name.startswith(("layers.", "language_model.", "embed_tokens.", "lm_head.", "norm."))


def _check(path: Path, stored: str, tensor: Any, shape: list[int]) -> None:
    if tensor.get_shape() != shape:
        raise EncoderError(
            f"{stored} in {path} has shape {tensor.get_shape()}, and config.json says {shape}: "
            "expected weights and configuration of one model"
        )
    if tensor.get_dtype() not in _STORED:
        raise EncoderError(
            f"{stored} in {path} is stored as {tensor.get_dtype()}: expected float32, float16 or bfloat16; "
            "name the checkpoint that is not quantised"
        )
