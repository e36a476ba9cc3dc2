"""What the plugin's caches and workspaces take of the device's memory, and leaving room for it beside the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.platforms import current_platform
from torch import Tensor

from mmtok_deploy.backends.blocked import MAX_BYTES
from mmtok_sglang.metrics import SelectionMetrics
from mmtok_sglang.start_errors import ends_scheduler_start

__all__ = ["MAX_SELECTION_BYTES", "allocated_bytes", "reserved_bytes", "reserving", "room_for_keys_and_values"]

MAX_SELECTION_BYTES = 64 << 20
"""The most that remembered selections take, on device and host together: 44,000 of up to 64 tokens, 508 of 16,384."""

# PyTorch's allocator of device memory gives out whole blocks of this size.
_BLOCK_BYTES = 512
# What a selection holds at its peak, over the bytes of its coverage matrices: measured for the reference at N = 2000
# and a budget of 95%; 2.9 at 10%.
_PEAK_OVER_MATRIX = 4.8


def allocated_bytes(tensor: Tensor) -> int:
    """Returns what the allocator gives out for a tensor that is alone in its memory."""
    return -(-tensor.nbytes // _BLOCK_BYTES) * _BLOCK_BYTES


def reserved_bytes(feature_cache_bytes: int, *, on_host: bool) -> int:
    """Returns the memory of the model's device that the plugin takes at most beside SGLang's.

    Args:
        feature_cache_bytes: The bound of the feature cache.
        on_host: The model is in the host's memory, of which SGLang leaves the workspaces' share free by itself.
    """
    workspace = 0 if on_host else int(MAX_BYTES * _PEAK_OVER_MATRIX)
    return feature_cache_bytes + MAX_SELECTION_BYTES + workspace


def reserving(feature_cache_bytes: int, metrics: SelectionMetrics) -> Callable[..., float]:
    """Returns what keeps the plugin's memory from the KV cache.

    Args:
        feature_cache_bytes: The bound of the feature cache.
        metrics: Where the reserved bytes are reported.
    """

    def mm_runtime_reservation_gb(original: Callable[..., float], **arguments: Any) -> float:
        """Returns the GiB that SGLang's KV cache leaves to multimodal work, with the plugin's added."""
        ours = reserved_bytes(feature_cache_bytes, on_host=current_platform.device_type == "cpu")
        metrics.set_reserved(ours)
        return original(**arguments) + ours / 2**30

    return mm_runtime_reservation_gb


def room_for_keys_and_values(feature_cache_mb: int, original: Callable[..., int], configurator: Any, *args: Any) -> int:
    """Returns the bytes that SGLang's KV cache may take; a start ends where nothing is left beside the plugin's.

    Args:
        feature_cache_mb: The bound of the feature cache, in MiB.
        original: SGLang's method; a ValueError says that nothing is left, and that weights are why.
        configurator: Its object.
        *args: Its arguments.
    """
    num_bytes = 0
    with ends_scheduler_start(
        configurator.server_args.__dict__.get("_mmtok_on_command_line", False), "--mmtok-feature-cache-mb"
    ):
        try:
            num_bytes = original(configurator, *args)
        except ValueError as error:
            reserved = reserved_bytes(feature_cache_mb << 20, on_host=current_platform.device_type == "cpu")
            raise ValueError(
                f"the model, and {reserved / 2**30:,.2f} GiB for features and selections (--mmtok-feature-cache-mb "
                f"{feature_cache_mb}), leave no memory for the KV cache: lower it, or raise --mem-fraction-static "
                f"({error})"
            ) from error
    return num_bytes
