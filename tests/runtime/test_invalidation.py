from __future__ import annotations

import pickle
from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import io_struct, mm_schedule
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.multimodal_cache import EmbeddingResult, MultiModalStaticCache
from sglang.utils import TypeBasedDispatcher

from mmtok_sglang import invalidation
from mmtok_sglang.cache_key import CacheKeys, keys_of
from mmtok_sglang.feature_cache import FeatureCache, Features
from mmtok_sglang.invalidation import Invalidation
from mmtok_sglang.metrics import SelectionMetrics
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.selection import TokenSelector
from tests.runtime.stand_ins import identified, image_item, image_tokens, make_settings

PLAN = ImagePlan(num_tokens=12, num_kept=5, guidance=[3, 1, 2])
CONTENT = bytes(32)


class Rank:
    """One scheduler process, as far as keys are concerned."""

    def __init__(self) -> None:
        self.keys = CacheKeys(make_settings(5))
        self.cache = FeatureCache(1 << 20, SelectionMetrics())
        self.selector = TokenSelector(make_settings(5), SelectionMetrics())
        self.selector.start(torch.device("cpu"))
        self.invalidation = Invalidation(self.keys, self.cache, self.selector)
        self.answered: list[Any] = []
        self.scheduler = SimpleNamespace(
            waiting_queue=[],
            grammar_manager=SimpleNamespace(grammar_queue=[]),
            disagg_prefill_bootstrap_queue=SimpleNamespace(queue=[]),
            _request_dispatcher=None,
        )
        self.invalidation.init_request_dispatcher(self._init_request_dispatcher, self.scheduler)

    def _init_request_dispatcher(self, scheduler: Any) -> None:
        kinds = (*invalidation._WEIGHT_REQUESTS, *invalidation._ADAPTER_REQUESTS)
        scheduler._request_dispatcher = TypeBasedDispatcher([(kind, self.answer) for kind in kinds])

    def answer(self, request: Any) -> str:
        self.answered.append(request)
        if getattr(request, "model_path", None) == "nowhere":
            raise OSError("no such checkpoint")
        return "answer"

    def ask(self, request: Any) -> Any:
        return self.scheduler._request_dispatcher(request)

    def selection(self) -> bytes | None:
        return self.keys.keys(CONTENT, PLAN).selection


@pytest.fixture(autouse=True)
def embeddings(monkeypatch: pytest.MonkeyPatch) -> MultiModalStaticCache:
    cache = MultiModalStaticCache(1 << 20)
    monkeypatch.setattr(mm_schedule, "embedding_cache", cache)
    return cache


def test_no_storage_is_attached_to_a_running_server() -> None:
    answer = Rank().ask(io_struct.AttachHiCacheStorageReqInput(hicache_storage_backend="file"))
    assert (answer.success, "takes no storage backend" in answer.message) == (False, True)


def test_every_kind_of_request_that_changes_weights_is_one_of_sglangs() -> None:
    """SGLang has no other: a new one has to be read."""
    changing = {
        name
        for name in vars(io_struct)
        if name.endswith("ReqInput")
        and any(word in name for word in ("UpdateWeight", "WeightUpdate", "LoRA", "ResumeMemory", "CheckWeights"))
        and "Group" not in name
    }
    known = {kind.__name__ for kind in (*invalidation._WEIGHT_REQUESTS, *invalidation._ADAPTER_REQUESTS)}
    assert changing - known == {"UpdateWeightVersionReqInput"}
    assert known <= changing


def test_other_weights_move_every_key_on_and_drop_what_the_old_ones_encoded(embeddings: MultiModalStaticCache) -> None:
    rank = Rank()
    item = identified(image_item((0, 4), PLAN), CONTENT, rank.keys)
    rank.cache.recall([item], lambda items: [Features(torch.zeros(12, 8), torch.zeros(12, 6))])
    embeddings.set(item.hash, EmbeddingResult(embedding=torch.zeros(5, 8)))
    before = rank.selection()
    assert rank.ask(io_struct.UpdateWeightFromDiskReqInput(model_path="new", flush_cache=False)) == "answer"
    assert rank.selection() != before
    assert (len(rank.cache), len(embeddings)) == (0, 0)


def test_an_update_that_fails_may_have_changed_weights() -> None:
    rank = Rank()
    before = rank.selection()
    with pytest.raises(OSError, match="no such checkpoint"):
        rank.ask(io_struct.UpdateWeightFromDiskReqInput(model_path="nowhere"))
    assert rank.selection() != before


def test_an_adapter_leaves_the_others_what_they_have() -> None:
    rank = Rank()
    plain, own = rank.selection(), rank.keys.keys(CONTENT, PLAN, "id")
    rank.ask(io_struct.UnloadLoRAAdapterReqInput(lora_name="name", lora_id="id"))
    assert rank.selection() == plain
    assert rank.keys.keys(CONTENT, PLAN, "id") != own


def waiting_request(rank: Rank, extra_key: str | None = None) -> Any:
    """Returns a request as SGLang queues it: two tokens of text around an image of 5, and one behind."""
    item = identified(image_item((2, 6), PLAN), CONTENT, rank.keys)
    ids = array("q", [1, 2, *item.padding_sequence(5), 3])
    req = SimpleNamespace(
        lora_id=None,
        extra_key=extra_key,
        kv=SimpleNamespace(holds_kv=False),
        session=None,
        origin_input_ids=ids,
        output_ids=array("q"),
        full_untruncated_fill_ids=array("q"),
        multimodal_inputs=SimpleNamespace(mm_items=[item]),
    )
    rank.invalidation.namespace_prefix_cache(lambda scheduler, req: None, rank.scheduler, req)
    return req


@pytest.mark.parametrize("queue", ["waiting", "grammar", "bootstrap"])
def test_a_request_that_waits_gets_the_keys_of_the_new_weights(queue: str) -> None:
    rank = Rank()
    req, refused = waiting_request(rank, "a"), SimpleNamespace(extra_key="refused")
    text = waiting_request(rank)
    text.multimodal_inputs = None
    assert req.extra_key == "a"
    before = list(req.origin_input_ids)
    queues = {
        "waiting": rank.scheduler.waiting_queue,
        "grammar": rank.scheduler.grammar_manager.grammar_queue,
        "bootstrap": rank.scheduler.disagg_prefill_bootstrap_queue.queue,
    }
    queues[queue] += [req, text, refused]
    for _ in range(2):
        rank.ask(io_struct.EndWeightUpdateReqInput())
    fresh = waiting_request(rank, "a")
    assert req.extra_key == fresh.extra_key != "a"
    assert list(req.origin_input_ids) == list(fresh.origin_input_ids) != before
    assert (list(req.origin_input_ids[:2]), req.origin_input_ids[-1]) == ([1, 2], 3)
    assert text.extra_key == rank.keys.namespace(None, None) is not None


def test_a_request_keeps_the_keys_of_the_weights_that_made_its_keys_and_values() -> None:
    rank = Rank()
    req = waiting_request(rank)
    before = list(req.origin_input_ids)
    req.kv.holds_kv = True
    rank.scheduler.waiting_queue.append(req)
    rank.ask(io_struct.EndWeightUpdateReqInput())
    assert (list(req.origin_input_ids), req.extra_key) == (before, None)


def test_a_request_leaves_the_images_of_the_turn_before_as_they_are() -> None:
    """Two turns of a session that go on from the same one share its item."""
    rank = Rank()
    waits, runs = waiting_request(rank), waiting_request(rank)
    runs.multimodal_inputs = waits.multimodal_inputs
    ids, padding = list(runs.origin_input_ids), runs.multimodal_inputs.mm_items[0].padding_sequence(5)
    rank.scheduler.waiting_queue.append(waits)
    rank.ask(io_struct.EndWeightUpdateReqInput())
    assert list(waits.origin_input_ids) != ids == list(runs.origin_input_ids)
    assert waits.multimodal_inputs.mm_items[0].padding_sequence(5) != padding
    assert runs.multimodal_inputs.mm_items[0].padding_sequence(5) == padding


def test_a_retracted_request_is_read_again_with_the_new_keys() -> None:
    rank = Rank()
    req = waiting_request(rank)
    req.output_ids.extend([7, 8])
    Req.refresh_fill_ids(req)
    rank.scheduler.waiting_queue.append(req)
    rank.ask(io_struct.EndWeightUpdateReqInput())
    req.output_ids.append(9)
    Req.refresh_fill_ids(req)
    assert list(req.full_untruncated_fill_ids) == [*waiting_request(rank).origin_input_ids, 7, 8, 9]


def pull(rank: Rank, monkeypatch: pytest.MonkeyPatch, requests: list[Any] | None, pp_rank: int = 0) -> Any:
    monkeypatch.setattr(invalidation, "get_parallel", lambda: SimpleNamespace(pp_rank=pp_rank))
    return rank.invalidation.pull_requests(lambda receiver: requests, None)


def fall_back(rank: Rank) -> None:
    names = rank.keys.keys(CONTENT, PLAN)
    image, embed = image_tokens(1, PLAN)
    image.vision.mul_(torch.nan)
    rank.selector.select([replace(image, names=names)], embed)


def test_ranks_move_on_between_the_same_two_requests_whenever_each_finds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Rank(), Rank()
    before = first.selection()
    fall_back(second)
    # The second rank found out alone, and another rank reads no requests of its own.
    assert pull(second, monkeypatch, None) is None
    assert second.selection() == before
    fall_back(first)
    requests = pull(first, monkeypatch, ["request"])
    assert requests[1:] == ["request"]
    fallen = pickle.loads(pickle.dumps(requests[0]))
    for rank in (first, second):
        assert rank.ask(fallen) is None
    assert first.selection() == second.selection() != before
    assert pull(first, monkeypatch, ["next"]) == ["next"]


def test_a_later_stage_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank()
    fall_back(rank)
    assert pull(rank, monkeypatch, ["request"], pp_rank=1) == ["request"]


def test_an_item_keeps_its_keys_while_its_request_runs() -> None:
    rank = Rank()
    item = identified(image_item((0, 4), PLAN), CONTENT, rank.keys)
    keys = keys_of(item)
    rank.ask(io_struct.EndWeightUpdateReqInput())
    assert keys_of(item) == keys
