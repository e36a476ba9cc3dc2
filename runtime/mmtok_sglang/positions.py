"""M-RoPE positions of kept tokens: each token keeps the (t, h, w) position it has without pruning.

Text goes on where it would without pruning, too. So a request may have fewer tokens than positions, of which the model
has as many as its context is long, while SGLang counts tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from torch import Tensor

from mmtok_sglang.cache_key import has_images, keys_of, names_of
from mmtok_sglang.failures import Failures, drop_cached_embedding, refuse
from mmtok_sglang.plan import ImagePlan, joined_parts, places_in_prompt, plan_of
from mmtok_sglang.refusals import count_refusal
from mmtok_sglang.selection import TokenSelector

__all__ = [
    "PositionWriter",
    "bound_by_positions",
    "decode_beams",
    "embed_within_positions",
    "receive_positions",
    "send_positions",
]

_PROXY_KEY = "mmtok_mrope_positions"


@dataclass(frozen=True, slots=True)
class _Span:
    """The part of one pruned image's span that a prefill chunk holds.

    Args:
        key: What the image's selection is remembered by, that of each part with its number.
        item: SGLang's item of the image.
        items: All items of the request.
        plan: Its plan, with the original positions.
        first: [3, 1] int64, where the image's first token stands in the request. A later turn of a session counts on
            from the turns before it, which the plan does not know.
        kept: Which of the K kept tokens, text between runs counted, are in the chunk.
        batch: Where they stand in the batch's tokens.
    """

    key: bytes | None
    item: Any
    items: Sequence[Any]
    plan: ImagePlan
    first: Tensor
    kept: slice
    batch: slice


class PositionWriter:
    """Writes the kept tokens' positions into each prefill batch; one a scheduler process.

    Args:
        selector: Remembers what was kept.
        failures: Ends the requests of an image that was not selected; without it, that is an error.
    """

    def __init__(self, selector: TokenSelector, failures: Failures | None = None) -> None:
        self._selector = selector
        self._failures = failures

    def spans(self, forward_batch: Any) -> list[_Span]:
        """Returns what of a batch's pruned images is to be written; call it before the images are embedded.

        An image whose embedding is held and whose selection is not is encoded again: it would have no positions.
        """
        # The embedding ends by dropping the batch's multimodal inputs.
        spans = list(_spans(forward_batch))
        for span in spans:
            if self._kept(span) is None:
                for name in names_of(span.item, span.items):
                    drop_cached_embedding(name)
        return spans

    def write(self, spans: Sequence[_Span], positions: Tensor) -> None:
        """Writes the kept tokens' positions; call it between the embedding, which selects, and the language model.

        Args:
            spans: What `spans` returned for the batch.
            positions: [3, tokens] int64, the batch's, changed in place.
        """
        for span in spans:
            kept = self._kept(span)
            if kept is None or span.plan.positions is None:
                self._fail(span.item.hash, "is in this batch, but was not selected")
                continue
            # Neither copy waits: the kept indices are on the device, the N positions on the host.
            original = (span.plan.positions - span.plan.positions[:, :1] + span.first).to(
                positions.device, non_blocking=True
            )
            positions[:, span.batch] = original[:, kept[span.kept]]

    def position_draft(self, original: Callable[..., None], forward_batch: Any, model_runner: Any, batch: Any) -> None:
        """Computes a prefill's M-RoPE positions as SGLang does; a draft model's kept tokens get their own.

        The model has selected them just before: a draft model reads what it embedded.
        """
        original(forward_batch, model_runner, batch)
        if model_runner.is_draft_worker:
            self.write(list(_spans(forward_batch)), forward_batch.mrope_positions)

    def _kept(self, span: _Span) -> Tensor | None:
        """Returns which tokens of the unpruned prompt are in an image's span; None where a part is not remembered."""
        parts = [self._selector.remembered((span.key, part)) for part in range(span.plan.num_parts)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        kept = joined_parts(known, span.plan)
        return places_in_prompt(kept, span.plan).sort().values if span.plan.between else kept

    def _fail(self, key: int, why: str) -> None:
        if self._failures is None:
            raise RuntimeError(f"MMTok: the image {key:#x} {why}")
        # One whose features failed has no selection, and is marked already.
        if not self._failures.is_marked(key):
            self._failures.mark(key, f"an image {why}")


def receive_positions(forward_batch: Any, pp_proxy_tensors: Any) -> None:
    """Takes the positions that the pipeline stage before has corrected; only the first one selects."""
    if pp_proxy_tensors is not None and _PROXY_KEY in pp_proxy_tensors.tensors:
        forward_batch.mrope_positions.copy_(pp_proxy_tensors.tensors.pop(_PROXY_KEY))


def send_positions(forward_batch: Any, pp_proxy_tensors: Any) -> None:
    """Hands the corrected positions to the pipeline stage behind, with what else it is sent."""
    if forward_batch.forward_mode.is_extend():
        pp_proxy_tensors.tensors[_PROXY_KEY] = forward_batch.mrope_positions.clone()


def bound_by_positions(original: Callable[..., None], scheduler: Any, req: Any) -> None:
    """Bounds what a request generates as SGLang does, and so that its positions end with the model's context, too.

    A prompt whose positions leave it is refused (HTTP 400): looked up in the rotary embedding's table, they would end
    the server. With speculative decoding, an answer ends two rounds of drafts before the context does.
    """
    inputs, params = req.multimodal_inputs, req.sampling_params
    context = scheduler.model_config.context_len
    end = _end(inputs, len(req.origin_input_ids))
    if end >= context:
        req.set_finish_with_abort(_beyond_context(end, context))
    elif end:
        room = context - 1 - end
        params.max_new_tokens = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        if req.beam_group is not None:
            req.beam_group.max_new_tokens = min(req.beam_group.max_new_tokens, room)
    if getattr(scheduler, "draft_worker", None) is not None:
        # SGLang 0.5.23 reserves two rounds of drafts behind a request, and a request's row in the table of the KV cache
        # has room for one: at the end of the context it writes into the row of another request.
        room = max(1, context - get_alloc_reserve_per_decode() - len(req.origin_input_ids))
        params.max_new_tokens = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
    original(scheduler, req)


def decode_beams(original: Callable[..., None], forward_batch: Any, model_runner: Any, batch: Any) -> None:
    """Computes a decoding batch's M-RoPE positions as SGLang does, those of each beam from its request's images.

    SGLang 0.5.23 looks for images beside the batch's requests, and gives all beams of a request but the first the
    positions of a text.
    """
    if batch.beam_tail is not None:
        inputs = batch.multimodal_inputs
        batch = copy.copy(batch)
        batch.multimodal_inputs = [
            *inputs,
            *(inputs[beams.leader_idx] for beams in batch.beam_tail.entries for _ in range(beams.start, beams.end)),
        ]
    original(forward_batch, model_runner, batch)


def embed_within_positions(
    take_in: Callable[..., None], original: Callable[..., None], scheduler: Any, recv_req: Any, **kwargs: Any
) -> None:
    """Takes in an embedding request, by `take_in(original, ...)`; one whose positions leave the context is refused."""
    context = scheduler.model_config.context_len
    end = _end(recv_req.mm_inputs, len(recv_req.input_ids or ()))
    if end >= context:
        refuse(scheduler, recv_req, FINISH_ABORT(_beyond_context(end, context), 400, "BadRequestError"))
    else:
        take_in(original, scheduler, recv_req, **kwargs)


def _end(inputs: Any, num_tokens: int) -> int:
    """Returns the position after the last token of a prompt with images, 0 where positions are the tokens' numbers."""
    delta = getattr(inputs, "mrope_position_delta", None)
    return 0 if delta is None else num_tokens + int(delta.max())


def _beyond_context(end: int, context: int) -> str:
    count_refusal("positions")
    return (
        f"MMTok: the request's images and text span {end} positions, more than the model's context of {context}: send "
        "fewer or smaller images"
    )


def _spans(forward_batch: Any) -> Iterator[_Span]:
    if not has_images(forward_batch):
        return
    batch_start = 0
    for inputs, chunk_start, chunk_len in zip(
        forward_batch.mm_inputs, forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True
    ):
        items = inputs.mm_items if inputs is not None else []
        for item in items:
            plan, keys = plan_of(item), keys_of(item)
            if plan is None or keys is None:
                continue
            ((start, end),) = item.offsets
            first, stop = max(start, chunk_start), min(end + 1, chunk_start + chunk_len)
            if first < stop:
                shift = batch_start - chunk_start
                yield _Span(
                    *(keys.selection, item, items, plan),
                    first=inputs.mrope_positions[:, start : start + 1],
                    kept=slice(first - start, stop - start),
                    batch=slice(first + shift, stop + shift),
                )
        batch_start += chunk_len
