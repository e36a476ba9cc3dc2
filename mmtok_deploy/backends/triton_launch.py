"""The kernels compiled for a device: loaded before they are needed, and launched without Triton's look-up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
import triton
from torch import Tensor

from mmtok_deploy.backends.triton_kernels import coverage_columns, greedy_picks, row_weights, similarity
from mmtok_deploy.backends.triton_plan import Launch, Variant

__all__ = ["IS_INTERPRETED", "KERNELS", "launch", "load", "tell_of_compiles"]

logger = logging.getLogger(__name__)

KERNELS: dict[str, Any] = {
    "similarity": similarity,
    "row_weights": row_weights,
    "coverage_columns": coverage_columns,
    "greedy_picks": greedy_picks,
}

IS_INTERPRETED = not isinstance(greedy_picks, triton.runtime.JITFunction)
"""Whether the kernels run on the CPU, for tests: TRITON_INTERPRET=1 was set when they were loaded."""

_LOG_EVERY_S = 5.0

# Device index and variant -> the compiled kernel, and the constants that it takes after a launch's arguments.
_loaded: dict[tuple[int, Variant], tuple[Any, tuple[int | str, ...]]] = {}
# Devices for which `load` has been called.
_are_loaded: set[int] = set()


def launch(what: Launch, device: torch.device, *arguments: Tensor | int | float) -> None:
    """Launches a kernel on the device's current stream; the device is the current one.

    A variant that is not loaded is compiled first, which takes about a second.

    Args:
        what: Variant and grid.
        device: Device of the arguments.
        arguments: The kernel's arguments before its constants, as in the variant.
    """
    variant = what.variant
    if IS_INTERPRETED:
        KERNELS[variant.kernel][what.grid](*arguments, **dict(variant.constants), **dict(variant.options))
        return
    try:
        kernel, constants = _loaded[device.index, variant]
    except KeyError:
        level = logging.WARNING if device.index in _are_loaded else logging.DEBUG
        logger.log(level, "compiling a Triton kernel that was not loaded before: %s", variant)
        kernel, constants = _load(variant, device.index)
    kernel[*what.grid, 1](*arguments, *constants)


def load(variants: Sequence[Variant], device: torch.device) -> None:
    """Compiles the variants for the device, or loads them from Triton's cache, in parallel; logs progress.

    Args:
        variants: The kernels to load.
        device: A CUDA device with an index.
    """
    start = last_log = time.monotonic()
    num_threads = min(len(variants), len(os.sched_getaffinity(0)))
    logger.info("Triton: loading %d kernels for %s with %d threads", len(variants), device, num_threads)
    for kernel in KERNELS.values():
        # Creates the kernel's entry for the device here: two threads would each create their own.
        kernel.device_caches[device.index]
    # A new thread's current device is the first one.
    with ThreadPoolExecutor(num_threads, initializer=torch.cuda.set_device, initargs=(device,)) as threads:
        loads = [threads.submit(_load, variant, device.index) for variant in variants]
        for num_done, done in enumerate(as_completed(loads), 1):
            done.result()
            if time.monotonic() - last_log > _LOG_EVERY_S:
                last_log = time.monotonic()
                logger.info("Triton: %d of %d kernels loaded", num_done, len(variants))
    _are_loaded.add(device.index)
    logger.info("Triton: %d kernels loaded in %.1f s", len(variants), time.monotonic() - start)


def tell_of_compiles(tell: Callable[[bool], None]) -> None:
    """Calls `tell` for each kernel that Triton compiles, or loads from its cache, in this process from now on.

    Args:
        tell: Called with True for a kernel of this project, with False for any other.
    """
    before = triton.knobs.runtime.jit_post_compile_hook

    def on_compile(*arguments: Any, **about: Any) -> Any:
        tell(about["fn"].module.startswith("mmtok_"))
        return None if before is None else before(*arguments, **about)

    triton.knobs.runtime.jit_post_compile_hook = on_compile


def _load(variant: Variant, device_index: int) -> tuple[Any, tuple[int | str, ...]]:
    kernel = KERNELS[variant.kernel].warmup(
        *variant.arguments, grid=(1, 1), **dict(variant.constants), **dict(variant.options)
    )
    # This loads the kernel to the device; before 3.8, Triton also compiles its launcher here.
    kernel[1, 1, 1]
    loaded = kernel, tuple(value for _, value in variant.constants)
    _loaded[device_index, variant] = loaded
    return loaded
