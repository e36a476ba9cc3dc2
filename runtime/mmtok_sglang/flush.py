"""Forgetting what was made of images when SGLang flushes its caches: the model's weights may have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers import mm_schedule
from sglang.srt.platforms import current_platform

from mmtok_sglang.feature_cache import FeatureCache
from mmtok_sglang.selection import TokenSelector

__all__ = ["flushing"]


def flushing(cache: FeatureCache, selector: TokenSelector) -> Callable[..., bool]:
    """Returns what flushes SGLang's caches and, if it does, ours and the one of embeddings, which SGLang leaves.

    No request runs then, so no image changes its mind in the middle of its prefill.
    """

    def flush_cache(original: Callable[..., bool], scheduler: Any, empty_cache: bool = True) -> bool:
        flushed = original(scheduler, empty_cache=empty_cache)
        if flushed:
            cache.clear()
            selector.clear()
            if mm_schedule.embedding_cache is not None:
                mm_schedule.embedding_cache.clear()
            if empty_cache:
                # SGLang did so before there was anything to give back.
                current_platform.empty_cache()
        return flushed

    return flush_cache
