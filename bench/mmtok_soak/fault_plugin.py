"""A second SGLang plugin, which only servers of the soak load: it injects faults into the hooks of MMTok's plugin.

SGLang loads it by the entry point that `injected.fault_environment` writes into a folder on PYTHONPATH. It wraps
hooks that the plugin under test registers, and methods of its classes. A file names the next fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CONTROL", "register"]

CONTROL = "MMTOK_SOAK_FAULTS"
"""Environment variable: folder of `fault.json`, which the soak writes, and `met.json`, which this plugin writes."""

_VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def register() -> None:
    """Wraps the hooks of the plugin under test as they are registered, and methods of its classes."""
    folder = os.environ.get(CONTROL)
    if folder is None:
        return
    _wrap_get_image_feature(Path(folder))
    writer = pkgutil.resolve_name("mmtok_sglang.positions.PositionWriter")
    writer.write = _method_with_faults("write_positions", writer.write, Path(folder))
    registry = pkgutil.resolve_name("sglang.srt.plugins.hook_registry.HookRegistry")
    original = registry.register

    def register_with_faults(path: str, hook: Callable[..., Any], hook_type: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(hook_type, "name", "") == "AROUND":
            hook = _with_faults(path.rpartition(".")[2], hook, Path(folder))
        return original(path, hook, hook_type, *args, **kwargs)

    registry.register = register_with_faults


def _wrap_get_image_feature(folder: Path) -> None:
    """Wraps a pruned model's method, and the call of the encoder inside it."""
    model = pkgutil.resolve_name("mmtok_sglang.model.PrunedModel")
    stages = pkgutil.resolve_name("mmtok_sglang.stages.StageMetrics")
    get_image_feature, encode = model.get_image_feature, stages.encode
    inside: list[Callable[..., Any]] = []

    def around(original: Callable[..., Any], *args: Any) -> Any:
        inside.append(original)
        try:
            return get_image_feature(*args)
        finally:
            inside.pop()

    def encode_inside(metrics: Any, original: Callable[..., Any], *args: Any) -> Any:
        return encode(metrics, partial(inside[-1], original) if inside else original, *args)

    faulty = _with_faults("get_image_feature", around, folder)
    stages.encode = encode_inside
    # A function in a class becomes a method; the encoder is called as `original(encoder, model, items)`.
    model.get_image_feature = lambda self, items: faulty(_call, self, items)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _method_with_faults(name: str, method: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    faulty = _with_faults(name, _call, folder)
    return lambda *args: faulty(method, *args)


def _with_faults(name: str, around: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Returns a hook that carries out the next fault in `folder` if the fault is for the hook of this name."""

    def faulty(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        fault = _read(folder / "fault.json")
        if fault is None or fault["hook"] != name:
            return around(original, *args, **kwargs)
        # Only once: the next call has no fault.
        (folder / "fault.json").unlink(missing_ok=True)
        if fault["kind"] == "raise":
            _write(folder, fault, 1, met=True)
            raise RuntimeError("injected: the hook fails")
        mode = _Allocations(fault["at"]) if fault["kind"] == "memory" else None
        num_poisoned = 0

        def changed(*inner_args: Any, **inner_kwargs: Any) -> Any:
            nonlocal num_poisoned
            if mode is not None:
                # Allocations of SGLang's own function do not count.
                with mode.paused():
                    return original(*inner_args, **inner_kwargs)
            result = original(*inner_args, **inner_kwargs)
            for features in result if isinstance(result, list | tuple) else [result]:
                num_poisoned += 1
                values = features.view(-1)
                step = {"one": max(1, values.numel()), "some": 97, "all": 1}[fault["where"]]
                # In place, since the hook reads features before and after the projector in the same memory.
                values[::step] = _VALUES[fault["value"]]
            return result

        try:
            with mode or contextlib.nullcontext():
                return around(changed, *args, **kwargs)
        finally:
            num_seen = num_poisoned if mode is None else mode.num_seen
            _write(folder, fault, num_seen, met=num_seen >= fault.get("at", 1))

    return faulty


class _Allocations(TorchDispatchMode):
    """Counts the operations that allocate their result, and raises an error at the operation number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_seen = 0
        self._is_paused = False
        self._at = at

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the operations of the block."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_paused or not _is_new(func, result):
            return result
        self.num_seen += 1
        if self.num_seen == self._at:
            raise torch.OutOfMemoryError(f"injected: no memory at allocation {self._at}, {func}")
        return result


def _is_new(func: Any, result: Any) -> bool:
    if func.is_view or func._schema.is_mutable:
        return False
    results = result if isinstance(result, list | tuple) else [result]
    return any(isinstance(each, torch.Tensor) and each.numel() > 0 for each in results)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        fault: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return fault


def _write(folder: Path, fault: dict[str, Any], num_seen: int, *, met: bool) -> None:
    written = folder / f".met-{os.getpid()}.json"
    written.write_text(json.dumps({"id": fault["id"], "num_seen": num_seen, "met": met}), encoding="utf-8")
    written.replace(folder / "met.json")
