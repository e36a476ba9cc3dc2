"""Backends of the selection, one file each. All give the same picks up to rounding; they differ in speed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from mmtok_deploy.backends import blocked, lazy, reference
from mmtok_deploy.backends.triton_plan import MIN_CAPABILITY
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["Backend", "BackendName", "fastest_backend", "get_backend"]

BackendName = Literal["auto", "blocked", "lazy", "reference", "triton"]
"""`auto` is the fastest exact backend measured on the features' device: `lazy` on a CPU, `triton` on NVIDIA GPUs that
it supports, `reference` elsewhere. `auto` bounds its memory by `blocked`."""

Backend = Callable[[Sequence[SelectionProblem], SelectionConfig], list[Selection]]
"""Selects tokens for a batch of problems on one device; returns the selections in the same order. Picks are greedy up
to float32 rounding (`greedy_replay.py`)."""


def get_backend(name: BackendName, device: torch.device) -> Backend:
    """Returns the backend of that name for features on `device`.

    Raises:
        ValueError: An unknown name, or a backend that cannot run on the device.
    """
    match name:
        case "auto":
            fastest = get_backend(_fastest_on(device), device)
            return blocked.within_memory(fastest, max_bytes=blocked.max_matrix_bytes(device))
        case "blocked":
            return blocked.select
        case "lazy":
            if device.type != "cpu":
                raise ValueError(f"backend 'lazy' runs on cpu, the features are on {device}")
            return lazy.select
        case "reference":
            return reference.select
        case "triton":
            return _triton(device)
    raise ValueError(f"backend is one of {', '.join(get_args(BackendName))}, got {name!r}")


def fastest_backend(
    device_type: str, capability: tuple[int, int] | None, has_triton: bool
) -> Literal["lazy", "reference", "triton"]:
    """Returns the backend that `auto` stands for.

    Args:
        device_type: Type of the features' device, such as "cuda".
        capability: Compute capability of an NVIDIA GPU; None for any other device.
        has_triton: Whether Triton is installed.
    """
    if device_type == "cpu":
        return "lazy"
    is_for_triton = has_triton and capability is not None and capability >= MIN_CAPABILITY
    return "triton" if is_for_triton else "reference"


def _fastest_on(device: torch.device) -> Literal["lazy", "reference", "triton"]:
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    capability = torch.cuda.get_device_capability(device) if is_nvidia else None
    return fastest_backend(device.type, capability, importlib.util.find_spec("triton") is not None)


def _triton(device: torch.device) -> Backend:
    try:
        from mmtok_deploy.backends import triton
    except ImportError as error:
        raise ValueError(
            f"backend 'triton' needs Triton, which comes with PyTorch for CUDA ({error}): "
            "install it, or choose backend 'auto' or 'reference'"
        ) from error
    triton.check_device(device)
    return triton.select
