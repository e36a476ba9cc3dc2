"""The selection's backends, one file each: the same problems, the same answer, at different speeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from mmtok_deploy.backends import blocked, reference
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["Backend", "BackendName", "get_backend"]

BackendName = Literal["auto", "reference", "blocked"]
"""`auto` is the fastest exact backend for the features' device, within the memory that `blocked` states."""

Backend = Callable[[Sequence[SelectionProblem], SelectionConfig], list[Selection]]
"""Selects for a batch of problems on one device; answers in their order, and is exact: the reference's picks."""


def get_backend(name: BackendName, device: torch.device) -> Backend:
    """Returns the backend of that name for features on `device`.

    Raises:
        ValueError: An unknown name, or a backend that cannot run on the device.
    """
    if name not in get_args(BackendName):
        raise ValueError(f"backend is one of {', '.join(get_args(BackendName))}, got {name!r}")
    if name == "blocked":
        return blocked.select
    return reference.select if name == "reference" else blocked.within_memory(reference.select)
