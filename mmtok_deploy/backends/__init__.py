"""The selection's backends, one file each: the same problems, the same answer, at different speeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch

from mmtok_deploy.backends import lazy, reference
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["Backend", "BackendName", "get_backend"]

BackendName = Literal["auto", "lazy", "reference"]
"""`auto` is the fastest exact backend for the features' device."""

Backend = Callable[[Sequence[SelectionProblem], SelectionConfig], list[Selection]]
"""Selects for a batch of problems on one device; answers in their order, and is exact: the reference's picks."""


class _Entry(NamedTuple):
    select: Backend
    device_types: tuple[str, ...] | None
    """What it runs on; None is everything."""


# The fastest first: `auto` is the first that runs on the device.
_BACKENDS = {
    "lazy": _Entry(lazy.select, ("cpu",)),
    "reference": _Entry(reference.select, None),
}


def get_backend(name: BackendName, device: torch.device) -> Backend:
    """Returns the backend of that name for features on `device`.

    Raises:
        ValueError: An unknown name, or a backend that cannot run on the device.
    """
    if name not in get_args(BackendName):
        raise ValueError(f"backend is one of {', '.join(get_args(BackendName))}, got {name!r}")
    if name == "auto":
        return next(entry.select for entry in _BACKENDS.values() if _runs_on(entry, device))
    entry = _BACKENDS[name]
    if not _runs_on(entry, device):
        raise ValueError(
            f"backend {name!r} runs on {', '.join(entry.device_types or ())}, the features are on {device}"
        )
    return entry.select


def _runs_on(entry: _Entry, device: torch.device) -> bool:
    return entry.device_types is None or device.type in entry.device_types
