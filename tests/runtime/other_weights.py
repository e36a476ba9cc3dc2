"""Checkpoints and adapters with other weights than a tiny checkpoint's, and the checkpoints that they amount to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtok_bench.internvl_parts import chat_model_weights

__all__ = ["make_adapter", "with_adapter", "with_other_weights"]

_ALPHA_OVER_RANK, _RANK = 2.0, 4


def with_other_weights(checkpoint: Path, path: Path) -> Path:
    """Returns a copy of the checkpoint whose every weight has moved, those of the vision encoder included."""
    generator = torch.Generator().manual_seed(1)

    def move(_: str, weight: Tensor) -> Tensor:
        spread = weight.float().std() if weight.numel() > 1 else torch.tensor(0.0)
        return weight + (0.5 * spread * torch.randn(weight.shape, generator=generator)).to(weight.dtype)

    return _copy(checkpoint, path, move)


def make_adapter(checkpoint: Path, path: Path, seed: int, modules: tuple[str, ...] = ("o_proj", "down_proj")) -> Path:
    """Returns a LoRA adapter, in PEFT's format, of those modules of the language model."""
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in _weights(checkpoint).items():
        if _is_adapted(name, modules):
            prefix = "base_model.model." + name.removesuffix(".weight")
            rows, columns = weight.shape
            is_embedding = name.endswith("embed_tokens.weight")
            kind = "lora_embedding_" if is_embedding else "lora_"
            suffix = "" if is_embedding else ".weight"
            inner, outer = (rows, columns) if is_embedding else (columns, rows)
            weights[f"{prefix}.{kind}A{suffix}"] = 0.2 * torch.randn(_RANK, inner, generator=generator)
            weights[f"{prefix}.{kind}B{suffix}"] = 0.2 * torch.randn(outer, _RANK, generator=generator)
    save_file(weights, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _ALPHA_OVER_RANK * _RANK, "target_modules": list(modules)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def with_adapter(checkpoint: Path, adapter: Path, path: Path) -> Path:
    """Returns a copy of the checkpoint into which the adapter is merged."""
    parts = load_file(adapter / "adapter_model.safetensors")

    def merge(name: str, weight: Tensor) -> Tensor:
        prefix = "base_model.model." + name.removesuffix(".weight")
        if f"{prefix}.lora_A.weight" not in parts:
            return weight
        return weight + _ALPHA_OVER_RANK * parts[f"{prefix}.lora_B.weight"] @ parts[f"{prefix}.lora_A.weight"]

    return _copy(checkpoint, path, merge)


def _is_adapted(name: str, modules: tuple[str, ...]) -> bool:
    in_encoder = any(part in name for part in ("visual", "vision_tower", "projector"))
    return not in_encoder and name.removesuffix(".weight").rpartition(".")[2] in modules


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    return {
        name: weight for file in sorted(checkpoint.glob("*.safetensors")) for name, weight in load_file(file).items()
    }


def _copy(checkpoint: Path, path: Path, change: object) -> Path:
    if path.exists():
        shutil.rmtree(path)
    shutil.copytree(checkpoint, path)
    # An InternVL is there in two formats.
    inner = path / "transformers"
    for file in (inner if inner.exists() else path).glob("*.safetensors"):
        weights = {name: change(name, weight) for name, weight in load_file(file).items()}  # type: ignore[operator]
        save_file(weights, file, metadata={"format": "pt"})
        if inner.exists():
            save_file(chat_model_weights(weights), path / file.name, metadata={"format": "pt"})
    return path
