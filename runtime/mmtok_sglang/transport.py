"""Hands a request with images over to the scheduler: pixels are copied into shared memory in a thread.

SGLang copies them on the event loop of the tokenizer process. It takes milliseconds an image, in which no other request
is taken in and no answer is sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sglang.srt.managers.mm_utils import discard_shm_features, wrap_shm_features

from mmtok_sglang.stages import observe_image_stage

__all__ = ["send_one_request"]


async def send_one_request(original: Callable[..., Awaitable[None]], manager: Any, tokenized_obj: Any) -> None:
    """Sends a request as SGLang does, whose own copying finds nothing left to copy.

    Args:
        original: Copies the pixels of a request, pickles it and sends it.
        manager: The tokenizer manager.
        tokenized_obj: The request.
    """
    if not tokenized_obj.mm_inputs:
        await original(manager, tokenized_obj)
        return
    copying = asyncio.get_running_loop().run_in_executor(None, _copy_pixels, tokenized_obj)
    try:
        # A thread cannot be interrupted: if this coroutine is cancelled, the copy is there only later.
        copy_ms = await asyncio.shield(copying)
    except asyncio.CancelledError:
        copying.add_done_callback(lambda _: discard_shm_features(tokenized_obj))
        raise
    start_s = time.perf_counter()
    try:
        await original(manager, tokenized_obj)
    except BaseException:
        state = manager.rid_to_state.get(tokenized_obj.rid)
        if state is None or not state.dispatched:
            discard_shm_features(tokenized_obj)
        raise
    observe_image_stage("transport", copy_ms + 1000 * (time.perf_counter() - start_s))


def _copy_pixels(tokenized_obj: Any) -> float:
    """Returns the milliseconds that it took."""
    start_s = time.perf_counter()
    wrap_shm_features(tokenized_obj)
    return 1000 * (time.perf_counter() - start_s)
