"""An SGLang plugin for tests alone: makes functions of the plugin under test raise when a file says so.

Every process of a server loads it, by an entry point that `fault_environment` writes into a folder on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmtok_soak.second_plugin import plugin_environment

__all__ = ["POINTS", "Faults", "fault_environment", "register"]

_CONTROL = "MMTOK_TEST_FAULTS"
_PACKAGE = "mmtok_sglang"

POINTS = {
    "namespace": f"{_PACKAGE}.cache_key.CacheKeys.namespace",
    "key": f"{_PACKAGE}.cache_key.CacheKeys.keys",
    "bound": f"{_PACKAGE}.positions._end",
    "owners": f"{_PACKAGE}.model.check_embeddings",
    "spans": f"{_PACKAGE}.positions.PositionWriter.spans",
    "encode": f"{_PACKAGE}.stages.StageMetrics.encode",
    "clone": f"{_PACKAGE}.feature_cache._without_batch",
    "embed": f"{_PACKAGE}.selection._embed_guidance",
    "select": "mmtok_deploy.executors.TorchExecutor.select",
    "count": f"{_PACKAGE}.metrics.SelectionMetrics._count",
    "features": f"{_PACKAGE}.failures.Failures.guard_features",
    "write": f"{_PACKAGE}.positions.PositionWriter.write",
    "fallen": f"{_PACKAGE}.selection.TokenSelector.take_fallen",
    "counts": f"{_PACKAGE}.account.plan_of",
    "account": f"{_PACKAGE}.account.image_account",
}
"""What can be made to raise, in the order in which a request meets it. `features` is outside of the inner guard."""


def fault_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a server whose faults are told by `Faults(folder)`."""
    plugin = plugin_environment(folder, "mmtok_test_faults", f"{__name__}:register", Path(__file__).parents[2])
    return {_CONTROL: str(folder)} | plugin


class Faults:
    """Says which calls fail next."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    def set(self, point: str, calls: list[int], rank: int | None = None, *, is_nan: bool = False) -> None:
        """Makes calls of a point fail, counted from 1 from now on, in place of those before.

        They fail on one rank (of the world: a pipeline stage is one, too) or on all.

        With `is_nan` they return, in place of raising, a tensor whose first value is NaN.
        """
        self._number += 1
        fault = {"number": self._number, "point": point, "calls": calls, "rank": rank, "is_nan": is_nan}
        written = self._folder / "next.json"
        written.write_text(json.dumps(fault))
        written.replace(self._folder / "fault.json")

    def clear(self) -> int:
        """Lets nothing fail any more; returns how many calls failed."""
        (self._folder / "fault.json").unlink(missing_ok=True)
        return len(list(self._folder.glob(f"met-{self._number}-*")))

    def last_met_s(self) -> float:
        """Returns when the last call failed, as of `time.time()`."""
        return max(path.stat().st_mtime for path in self._folder.glob("met-*"))


def register() -> None:
    """Wraps every point."""
    if _CONTROL in os.environ:
        for point, path in POINTS.items():
            owner_path, _, name = path.rpartition(".")
            owner = pkgutil.resolve_name(owner_path)
            setattr(owner, name, _faulty(point, getattr(owner, name), Path(os.environ[_CONTROL])))


def _faulty(point: str, function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    number, num_calls = 0, 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal number, num_calls
        try:
            fault = json.loads((folder / "fault.json").read_text())
        except FileNotFoundError:
            return function(*args, **kwargs)
        if fault["number"] != number:
            number, num_calls = fault["number"], 0
        if fault["point"] == point and fault["rank"] in (None, _rank()):
            num_calls += 1
            if num_calls in fault["calls"]:
                (folder / f"met-{number}-{os.getpid()}-{num_calls}").touch()
                if not fault["is_nan"]:
                    raise RuntimeError(f"injected at {point}")
                result = function(*args, **kwargs)
                # In place: the plugin reads features where they were computed.
                (result[0] if isinstance(result, list | tuple) else result).view(-1)[0] = float("nan")
                return result
        return function(*args, **kwargs)

    return faulty


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
