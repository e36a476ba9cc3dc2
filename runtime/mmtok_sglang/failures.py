"""Errors in the scheduler process: one that every rank meets ends the requests it belongs to, never the server.

SGLang ends the whole server for any error in a batch. What the plugin adds to a batch can fail for one image alone: no
memory for it, or input that nobody thought of. Then the image's requests are answered with HTTP 500, none of their keys
and values are kept, and the other requests of the batch go on.

With tensor parallelism an error of one rank alone cannot be survived: the others are, or will be, in a collective that
this rank does not enter. So the ranks tell one another after each guarded part. A rank that failed and hears nothing
ends, which ends the server.

With pipeline parallelism the first stage alone encodes and selects. The stages behind learn what failed there with the
request that it refused, or with the batch's hidden states, and end the same requests.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from mmtok_sglang.cache_key import names_of
from mmtok_sglang.disaggregation import fail_transfer
from mmtok_sglang.ranks import num_ranks
from mmtok_sglang.repeated_warnings import RepeatedWarning
from mmtok_sglang.sessions import refused_turn, streaming_session_of

__all__ = ["Failures", "RankError", "drop_cached_embedding", "failed_on_all_ranks", "kill_other_ranks", "refuse"]

logger = logging.getLogger(__name__)

# A rank that failed alone waits for so long; the main process then waits 5 s before it ends itself.
_ANSWER_TIMEOUT_S = 2.0
_POLL_INTERVAL_S = 0.005
_PROXY_KEY = "mmtok_failed_image_"


@dataclass(frozen=True, slots=True)
class _Refused:
    """What the first pipeline stage leaves in the place of a refused request's text, for the stages behind."""

    reason: FINISH_ABORT


class RankError(RuntimeError):
    """One rank failed where others did not: they cannot go on together."""


class Failures:
    """Turns errors of guarded parts into ended requests; one a scheduler process."""

    def __init__(self) -> None:
        self._why: dict[int, str] = {}
        self._warning = RepeatedWarning(logger)

    def guard_forward(
        self,
        run: Callable[[Tensor], Any],
        input_ids: Tensor,
        forward_batch: Any,
        vocab_size: int,
        can_run_again: Callable[[], bool] = lambda: True,
    ) -> Any:
        """Returns `run(input_ids)`; if that fails, once more without the batch's images.

        What `guard_features` is not around can fail, too: the positions, or what another plugin wraps around the
        encoder. The images' requests end; those of text alone are not concerned.

        Args:
            run: Runs the model on the batch.
            input_ids: The batch's.
            forward_batch: SGLang's batch.
            vocab_size: Ids from it on stand for images.
            can_run_again: Asked after an error, whether the model is as it was before.

        Raises:
            RankError: Some ranks failed and others did not, or the batch cannot be run once more.
        """
        hashes = _images_of(forward_batch)
        if not hashes or get_parallel().pp_rank > 0:
            return run(input_ids)
        output, error = None, None
        try:
            output = run(input_ids)
        except RankError:
            raise
        except Exception as caught:  # whatever it is, the batch has requests without images
            error = f"{type(caught).__name__}: {caught!s:.500}"
            self._warning.log("MMTok: a batch with images failed (%s)", error, error=caught)
            if not can_run_again():
                raise RankError(f"MMTok: a batch failed that has changed the model's state: {error}") from caught
        if not failed_on_all_ranks(error):
            return output
        for item_hash in hashes:
            self.mark(item_hash, f"a batch with its image failed ({error})")
        forward_batch.mm_inputs = None
        forward_batch.input_ids = input_ids.clamp(0, vocab_size - 1)
        return run(forward_batch.input_ids)

    def guard_features(
        self, features_of: Callable[[list[Any]], Any], items: Sequence[Any], empty: Callable[[Any, int], Tensor]
    ) -> Any:
        """Returns `features_of(items)`; if it fails, each item's by itself, and zeros for one whose requests end.

        Args:
            features_of: Encodes and selects, on all ranks alike.
            items: SGLang's items.
            empty: Returns [number of placeholders, D] zeros for an item.

        Raises:
            RankError: Some ranks failed and others did not.
        """
        features, error = None, None
        try:
            features = features_of(list(items))
        except RankError:
            raise
        except Exception as caught:  # whatever it is, it may be one image's; the server has others
            error = f"{type(caught).__name__}: {caught!s:.500}"
            self._warning.log("MMTok: features of %d images failed (%s)", len(items), error, error=caught)
        # After the handler, to whose end the error holds the memory of the call that failed.
        if not failed_on_all_ranks(error):
            return features
        if len(items) > 1:
            return [self._alone(features_of, item, empty) for item in items]
        return [self._give_up(items[0], error or "", empty)]

    def mark(self, item_hash: int, why: str) -> None:
        """Ends the requests that read this image in the batch that runs, once it has run."""
        self._why[item_hash] = why

    def is_marked(self, item_hash: int) -> bool:
        """True for an image whose requests will end with this batch."""
        return item_hash in self._why

    def send(self, pp_proxy_tensors: Any) -> None:
        """Hands the images that failed in the batch that runs to the pipeline stage behind, with its hidden states."""
        # In the names, which arrive on the host: nothing waits for a device. A replayed graph's dictionary may be an
        # earlier batch's.
        tensors = {name: value for name, value in pp_proxy_tensors.tensors.items() if not name.startswith(_PROXY_KEY)}
        failed = {f"{_PROXY_KEY}{item_hash:x}": torch.empty(0) for item_hash in self._why}
        pp_proxy_tensors.tensors = tensors | failed

    def receive(self, pp_proxy_tensors: Any) -> None:
        """Marks the images that failed on the pipeline stage before."""
        received = pp_proxy_tensors.tensors if pp_proxy_tensors is not None else {}
        for name in [name for name in received if name.startswith(_PROXY_KEY)]:
            del received[name]
            self.mark(int(name.removeprefix(_PROXY_KEY), 16), "an image failed on the first pipeline stage")

    def run_batch(self, original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a batch, and ends those of its requests whose images failed in it.

        SGLang drops a request's output and keeps nothing of it in the prefix cache where its `discard_output_reason`
        and `skip_radix_cache_insert` say so, as for keys and values that could not be loaded. Beams end as those of a
        request that is aborted.
        """
        self._why.clear()
        try:
            result = original(scheduler, batch, *args, **kwargs)
        except RankError as error:
            end_server(error)
            raise
        if not self._why:
            return result
        for req, prefix_len, extend_len in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            why = self._failure_of(req, prefix_len, prefix_len + extend_len)
            if why is None:
                continue
            req.skip_radix_cache_insert = True
            fail_transfer(req, why)
            reason = FINISH_ABORT(f"MMTok: {why}", 500, "InternalServerError")
            if req is scheduler.chunked_req:
                req.discard_output_reason = reason
                scheduler._pending_chunked_abort_req = req
            elif req.beam_group is not None:
                # Its other beams hold memory by now, which only their group gives back.
                req.to_finish = reason
            else:
                req.discard_output_reason = reason
        for name in self._names_of_failed(batch.reqs):
            drop_cached_embedding(name)
        return result

    def take_in(self, original: Callable[..., None], scheduler: Any, recv_req: Any, **kwargs: Any) -> None:
        """Takes in a request; it is answered with HTTP 500 if that fails on all ranks, with 400 if it is refused.

        Raises:
            RankError: It failed on some ranks alone, or on a pipeline stage behind the first one.
        """
        if isinstance(recv_req.input_text, _Refused):
            refuse(scheduler, recv_req, recv_req.input_text.reason)
            return
        has_images, reason = recv_req.mm_inputs is not None, refused_turn(scheduler, recv_req)
        if reason is None:
            session = streaming_session_of(scheduler, recv_req)
            is_busy = session is not None and session._inflight
            try:
                original(scheduler, recv_req, **kwargs)
            except RankError:
                raise
            except Exception as caught:  # whatever it is, it is this request's; the server has others
                error = f"{type(caught).__name__}: {caught!s:.500}"
                self._warning.log("MMTok: a request could not be taken in (%s)", error, error=caught)
                message = f"MMTok: the request could not be taken in ({error})"
                reason = FINISH_ABORT(message, 500, "InternalServerError")
                if session is not None and not is_busy:
                    # The session waits for the end of this turn, which has none.
                    session.abort_req()
        if reason is None and not has_images:
            # Of texts the ranks tell one another only where one fails: if all do, all say so.
            return
        try:
            failed = failed_on_all_ranks(reason and reason.message)
            if failed and get_parallel().pp_rank > 0:
                raise RankError(
                    f"MMTok: a pipeline stage failed where the stage before did not: {reason and reason.message}"
                )
        except RankError as rank_error:
            end_server(rank_error)
            raise
        if failed:
            assert reason is not None
            # The same object goes on to the next stage.
            recv_req.input_text, recv_req.mm_inputs = _Refused(reason), None
            refuse(scheduler, recv_req, reason)

    def _alone(self, features_of: Callable[[list[Any]], Any], item: Any, empty: Callable[[Any, int], Tensor]) -> Tensor:
        features = self.guard_features(features_of, [item], empty)
        return features if isinstance(features, Tensor) else features[0]

    def _give_up(self, item: Any, error: str, empty: Callable[[Any, int], Tensor]) -> Tensor:
        self.mark(item.hash, f"the features of an image could not be computed ({error})")
        return empty(item, sum(end - start + 1 for start, end in item.offsets))

    def _names_of_failed(self, reqs: Sequence[Any]) -> set[int]:
        """Returns the names in SGLang's cache of embeddings under which the zeros of a failed image may stand."""
        requests = [req.multimodal_inputs.mm_items for req in reqs if req.multimodal_inputs is not None]
        failed = [(item, items) for items in requests for item in items if item.hash in self._why]
        return {*self._why, *(name for item, items in failed for name in names_of(item, items))}

    def _failure_of(self, req: Any, first: int, stop: int) -> str | None:
        """Returns why an image failed that a request reads between two of its tokens, None if none did."""
        if req.multimodal_inputs is None:
            return None
        for item in req.multimodal_inputs.mm_items:
            if item.hash in self._why and any(start < stop and end >= first for start, end in item.offsets):
                return self._why[item.hash]
        return None


def refuse(scheduler: Any, recv_req: Any, reason: FINISH_ABORT) -> None:
    """Answers a request that the scheduler has not taken in."""
    abort = AbortReq(rid=recv_req.rid, finished_reason=reason.to_json())
    abort.http_worker_ipc = recv_req.http_worker_ipc
    scheduler.send_abort_output(abort, recv_req)


def _images_of(forward_batch: Any) -> list[int]:
    """Returns the images of which a prefill batch has placeholders."""
    if not forward_batch.forward_mode.is_extend() or not forward_batch.contains_mm_inputs():
        return []
    spans = zip(
        forward_batch.mm_inputs, forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True
    )
    return [
        item.hash
        for inputs, first, length in spans
        for item in (inputs.mm_items if inputs is not None else ())
        if any(start < first + length and end >= first for start, end in item.offsets)
    ]


def end_server(error: RankError) -> None:
    """Ends this server: says why, tells the main process, and ends the ranks, which are stuck in a collective.

    SGLang would first take the call stacks of ranks that are still there, by py-spy and without a time limit, which
    took more than 20 s on 2 cores. This rank ends at once, too: on the usual way out it would wait for the others.
    """
    logger.error("MMTok ends the server: %s", error, exc_info=error)
    parent = psutil.Process().parent()
    if parent is not None:
        parent.send_signal(signal.SIGQUIT)
    kill_other_ranks()
    os._exit(1)


def kill_other_ranks() -> None:
    """Kills the other scheduler processes that this one's parent has started."""
    this = psutil.Process()
    parent = this.parent()
    for process in parent.children() if parent is not None else ():
        with suppress(psutil.Error):  # it may be gone by itself
            if process.pid != this.pid and "sglang::scheduler" in " ".join(process.cmdline()):
                process.kill()


def drop_cached_embedding(key: int) -> None:
    """Has SGLang encode an image again that it has an embedding of."""
    cache = mm_schedule.embedding_cache
    if cache is not None and cache.get_single(key) is not None:
        cache.free(key, None)


def failed_on_all_ranks(error: str | None) -> bool:
    """Returns whether this rank and all others failed; every rank of a tensor-parallel group must call it.

    Args:
        error: Why this rank failed, None if it did not.

    Raises:
        RankError: Some failed and others did not, or did not come here.
    """
    if num_ranks() == 1:
        return error is not None
    group = get_parallel().tp_group
    num_failed = torch.tensor([int(error is not None)])
    # On the host: nothing waits for a device.
    work = torch.distributed.all_reduce(num_failed, group=group.cpu_group, async_op=True)
    if error is None:
        work.wait()
    else:
        deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
        while not work.is_completed():
            if time.monotonic() > deadline_s:
                raise RankError(f"MMTok: rank {group.rank_in_group} failed while the others wait for it: {error}")
            time.sleep(_POLL_INTERVAL_S)
    if 0 < int(num_failed) < group.world_size:
        why = f"failed: {error}" if error is not None else "did not fail where another rank did"
        raise RankError(f"MMTok: rank {group.rank_in_group} of {group.world_size} {why}")
    return error is not None
