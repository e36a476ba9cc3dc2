"""The selection's backends, one file each: the same problems, the same picks up to rounding, at different speeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from mmtok_deploy.backends import blocked, lazy, reference
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["Backend", "BackendName", "get_backend"]

BackendName = Literal["auto", "blocked", "lazy", "reference", "triton"]
"""`auto` is the fastest exact backend for the features' device, of those measured there, within the memory that
`blocked` states: `lazy` on a CPU, `reference` elsewhere."""

Backend = Callable[[Sequence[SelectionProblem], SelectionConfig], list[Selection]]
"""Selects for a batch of problems on one device; answers in their order. Picks are greedy up to what float32 rounds
(`greedy_replay.py`)."""

_AUTO_ON_CPU = blocked.within_memory(lazy.select, max_bytes=blocked.MAX_HOST_BYTES)
_AUTO_ELSEWHERE = blocked.within_memory(reference.select)


def get_backend(name: BackendName, device: torch.device) -> Backend:
    """Returns the backend of that name for features on `device`.

    Raises:
        ValueError: An unknown name, or a backend that cannot run on the device.
    """
    match name:
        case "auto":
            return _AUTO_ON_CPU if device.type == "cpu" else _AUTO_ELSEWHERE
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
