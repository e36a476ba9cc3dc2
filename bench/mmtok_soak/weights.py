"""Updates the weights between requests: answers must be those of the loaded weights."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmtok_bench.server import SglangServer
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_deploy.photographs import PHOTOGRAPHS
from mmtok_soak.fixed_chats import (
    TOLERANCE,
    Account,
    ask_for_logprobs,
    chat_body,
    largest_difference,
    small_image,
)
from mmtok_soak.trial import Reply, Trial, send

__all__ = ["update_weights"]

_TIMEOUT_S = 180.0
_NUM_WAITING = 3
_WAITING_TOKENS = 300
_ANSWERING_S = 0.5


def update_weights(trial: Trial, server: SglangServer, num_updates: int) -> None:
    """Changes the weights to those of another checkpoint and back, alternately with and without a flush of the caches.

    A refused update must leave the old weights. After each update, the answers to three chats about earlier images must
    equal those of the loaded checkpoint with empty caches. Half of the updates come while other chats are retracted and
    wait; these must be answered.
    """
    paths = [
        server.model_path,
        str(make_tiny_checkpoint(trial.family, trial.folder / "checkpoints" / f"{trial.family}-1", seed=1)),
    ]
    bodies = [
        chat_body([small_image(name)], "How many cats are on the red table?", {"mmtok_budget": "20%"})
        for name in list(PHOTOGRAPHS)[:3]
    ]
    known: list[list[Account]] = []
    for path in paths:
        reply = _update(server, path, flush=True)
        if reply.status != 200:
            trial.fail("an update of the weights with a flush is refused", f"{reply.status} {reply.text[:300]}")
            return
        known.append([ask_for_logprobs(server, body) for body in bodies])
    if largest_difference(known[0], known[1]) < 1e-3:
        trial.fail("the two checkpoints give the same answers, so the test shows nothing", " and ".join(paths))
    loaded = 1
    for number in range(num_updates):
        if trial.is_over() or not server.is_alive():
            break
        flush = number % 2 == 0
        with _retracted_chats(trial, server) if number % 4 >= 2 else contextlib.nullcontext():
            reply = _update(server, paths[1 - loaded], flush=flush)
        trial.count("updates_with_flush" if flush else "updates_without_flush")
        if reply.status == 200:
            loaded = 1 - loaded
        elif flush or not 400 <= reply.status < 500:
            trial.fail("an update of the weights failed", f"update {number}: {reply.status} {reply.text[:300]}")
            break
        else:
            trial.count("refused_without_flush")
        difference = largest_difference(known[loaded], [ask_for_logprobs(server, body) for body in bodies])
        trial.count("answers", len(bodies))
        if not difference <= TOLERANCE:
            kind = "with a flush" if flush else "without a flush"
            trial.fail(
                f"answers after an update {kind} are not those of the loaded weights",
                f"update {number} to {paths[loaded]}, flush_cache={flush}: logprobs differ by {difference:.3g}",
            )
            _update(server, paths[loaded], flush=True)
        trial.step(f"update {number + 1} of {num_updates}")
    _update(server, paths[0], flush=True)


@contextlib.contextmanager
def _retracted_chats(trial: Trial, server: SglangServer) -> Iterator[None]:
    """Retracts chats that are being answered for as long as the context is open, and has them answered afterwards."""
    bodies = [
        chat_body([small_image(name)], "What is in this cup?", {"mmtok_budget": "30%"}, max_tokens=_WAITING_TOKENS)
        for name in list(PHOTOGRAPHS)[:_NUM_WAITING]
    ]
    with ThreadPoolExecutor(_NUM_WAITING) as pool:
        asked = [pool.submit(send, server, "/v1/chat/completions", body, timeout_s=_TIMEOUT_S) for body in bodies]
        time.sleep(_ANSWERING_S)
        paused = send(server, "/pause_generation", {"mode": "retract"})
        try:
            yield
        finally:
            send(server, "/continue_generation", {})
        for reply in (paused, *(each.result() for each in asked)):
            if reply.status != 200:
                trial.fail("a chat that was retracted for an update failed", f"{reply.status} {reply.text[:300]}")
    trial.count("retracted_chats", _NUM_WAITING)


def _update(server: SglangServer, path: str, *, flush: bool) -> Reply:
    body: dict[str, Any] = {"model_path": path, "flush_cache": flush}
    return send(server, "/update_weights_from_disk", body, timeout_s=_TIMEOUT_S)
