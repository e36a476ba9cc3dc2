"""What the plugin's caches and workspaces take of the device's memory, and leaving room for it beside the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.platforms import current_platform
from torch import Tensor

from mmtok_deploy.backends.blocked import MAX_BYTES
from mmtok_sglang.metrics import SelectionMetrics

__all__ = ["MAX_SELECTION_BYTES", "allocated_bytes", "reserved_bytes", "reserving"]

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
