"""What moves cache keys on: other weights, other adapters, and selections that fell back to evenly spaced tokens.

All of it happens between two requests, and between the same two on every rank: weights and adapters change by requests
of their own, and selections that fell back are passed on as one, by the rank that reads requests for all.
"""

from __future__ import annotations

import copy
import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers import io_struct, mm_schedule
from sglang.srt.runtime_context import get_parallel

from mmtok_sglang.cache_key import CacheKeys, keys_of
from mmtok_sglang.feature_cache import FeatureCache
from mmtok_sglang.repeated_warnings import RepeatedWarning
from mmtok_sglang.selection import TokenSelector
from mmtok_sglang.sessions import holds_turns_before

__all__ = ["Invalidation"]

logger = logging.getLogger(__name__)

_WEIGHT_REQUESTS = (
    io_struct.UpdateWeightFromDiskReqInput,
    io_struct.UpdateWeightsFromDistributedReqInput,
    io_struct.UpdateWeightsFromTensorReqInput,
    io_struct.UpdateWeightsFromIPCReqInput,
    io_struct.BeginWeightUpdateReqInput,
    io_struct.EndWeightUpdateReqInput,
    io_struct.ResumeMemoryOccupationReqInput,
    io_struct.CheckWeightsReqInput,  # which may reset them
)
_ADAPTER_REQUESTS = (
    io_struct.LoadLoRAAdapterReqInput,
    io_struct.LoadLoRAAdapterFromTensorsReqInput,
    io_struct.UnloadLoRAAdapterReqInput,
)


@dataclass(frozen=True, slots=True)
class _Fallen:
    """A request of the first rank to itself and all others."""

    bases: list[tuple[bytes, int]]


class Invalidation:
    """Moves keys on; one a scheduler process."""

    def __init__(self, keys: CacheKeys, cache: FeatureCache, selector: TokenSelector) -> None:
        self._keys = keys
        self._cache = cache
        self._selector = selector
        self._warning = RepeatedWarning(logger)

    def init_request_dispatcher(self, original: Callable[..., None], scheduler: Any) -> None:
        """Makes the table of what answers each kind of request; those that change weights move keys on, too.

        Whether they succeed or not: one that fails may have changed some. They may leave the prefix cache as it is
        (`flush_cache=false`, or a flush that is refused while requests run): no new request matches what it holds.
        """
        original(scheduler)
        answers = scheduler._request_dispatcher._mapping
        answers[_Fallen] = lambda request: self._keys.move_on(request.bases)
        for kind in (*_WEIGHT_REQUESTS, *_ADAPTER_REQUESTS):
            answers[kind] = self._changing(scheduler, answers[kind])
        answers[io_struct.AttachHiCacheStorageReqInput] = lambda _: io_struct.AttachHiCacheStorageReqOutput(
            success=False,
            message="MMTok: a server with --mmtok-budget takes no storage backend, which keeps keys and values longer "
            "than the server runs: cache keys count changes of the weights from the server's start",
        )

    def _changing(self, scheduler: Any, answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def change(request: Any) -> Any:
            try:
                return answer(request)
            finally:
                if isinstance(request, _ADAPTER_REQUESTS):
                    self._keys.change_adapter(request.lora_id)
                else:
                    self._keys.change_weights()
                    # Those under way encode their images again; the tokens that they have kept stand.
                    self._cache.clear()
                    if mm_schedule.embedding_cache is not None:
                        mm_schedule.embedding_cache.clear()
                # Before a request is queued, grammars are compiled, and a server for prefills finds its decode server.
                bootstrapping = scheduler.disagg_prefill_bootstrap_queue
                for waiting in (
                    *scheduler.waiting_queue,
                    *scheduler.grammar_manager.grammar_queue,
                    *(bootstrapping.queue if bootstrapping is not None else ()),
                ):
                    self._rename(scheduler, waiting)

        return change

    def namespace_prefix_cache(self, original: Callable[..., None], scheduler: Any, req: Any) -> None:
        """Keeps a request from the prefixes, its text included, that other weights have left in the prefix cache."""
        original(scheduler, req)
        req.mmtok_extra_key = req.extra_key
        if holds_turns_before(scheduler, req):
            # The prefix cache owns the session's first keys and values under the name of its first turn. Under another
            # one, an aborted turn would hand them to the prefix cache a second time.
            [last_turn] = req.session.req_nodes.values()
            req.extra_key = last_turn.req.extra_key
        else:
            req.extra_key = self._keys.namespace(req.lora_id, req.extra_key)

    def pull_requests(self, original: Callable[..., Any], receiver: Any) -> Any:
        """Returns the requests that have come, and before them which selections fell back since."""
        requests = original(receiver)
        # Every rank finds out, each at another time; the first tells all.
        try:
            fallen = self._selector.take_fallen()
        except Exception as error:  # whatever it is, requests go on
            self._warning.log("MMTok: which selections fell back is not known (%s)", error, error=error)
            fallen = []
        if fallen and requests is not None and get_parallel().pp_rank == 0:
            requests.insert(0, _Fallen(fallen))
        return requests

    def _rename(self, scheduler: Any, req: Any) -> None:
        """Gives a request that waits, and has nothing in the caches of its own, the keys of the weights as they are."""
        if not hasattr(req, "mmtok_extra_key"):
            return  # refused before it had a name
        if req.kv.holds_kv or holds_turns_before(scheduler, req):
            return  # a decode server has received, or a session holds, keys and values that the old weights made
        req.extra_key = self._keys.namespace(req.lora_id, req.mmtok_extra_key)
        if req.multimodal_inputs is not None:
            # Copies: a session's turn shares images, and the prompt of a streaming one, with the turns before it, which
            # keep the old keys.
            req.origin_input_ids = req.origin_input_ids[:]
            req.multimodal_inputs = copy.copy(req.multimodal_inputs)
            req.multimodal_inputs.mm_items = [self._renamed(item, req) for item in req.multimodal_inputs.mm_items]
        # Those of a retracted request: SGLang only adds its answer to them, unless there are none.
        req.full_untruncated_fill_ids = array("q")

    def _renamed(self, item: Any, req: Any) -> Any:
        """Returns a copy of a request's item with new keys, by which its placeholders are known from now on."""
        if keys_of(item) is None:
            return item
        item = copy.copy(item)
        item.model_specific_data = dict(item.model_specific_data)
        self._keys.identify(item)
        for start, end in item.offsets:
            req.origin_input_ids[start : end + 1] = array("q", item.padding_sequence(end - start + 1))
        return item
