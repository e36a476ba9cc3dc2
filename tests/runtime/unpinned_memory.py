"""An SGLang plugin for tests alone: SGLang's LoRA pins host memory, which takes a GPU; without one, it is not pinned.

Pinned or not, memory holds the same values. Every process of a server loads it, by an entry point that
`unpinned_environment` writes into a folder on PYTHONPATH.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmtok_soak.second_plugin import plugin_environment

__all__ = ["register", "unpinned_environment"]


def unpinned_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a server that pins no memory."""
    return plugin_environment(folder, "mmtok_test_unpinned", f"{__name__}:register", Path(__file__).parents[2])


def register() -> None:
    """Makes PyTorch's constructors ignore `pin_memory`; `Tensor.pin_memory` is a no-op on the plugin's CPU platform."""

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)
            return make(*args, **kwargs)

        return made

    for name in ("empty", "zeros", "ones", "tensor", "full", "arange"):
        setattr(torch, name, unpinned(getattr(torch, name)))
