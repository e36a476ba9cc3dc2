"""Updates the weights between requests: answers must be those of the loaded weights."""

from __future__ import annotations

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


def update_weights(trial: Trial, server: SglangServer, num_updates: int) -> None:
    """Changes the weights to those of another checkpoint and back, alternately with and without a flush of the caches.

    A refused update must leave the old weights. After each update, the answers to three chats about earlier images must
    equal those of the loaded checkpoint with empty caches.
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


def _update(server: SglangServer, path: str, *, flush: bool) -> Reply:
    body: dict[str, Any] = {"model_path": path, "flush_cache": flush}
    return send(server, "/update_weights_from_disk", body, timeout_s=_TIMEOUT_S)
