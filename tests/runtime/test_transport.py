from __future__ import annotations

import asyncio
import os
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import mm_utils
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.mm_utils import ShmPointerMMData
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput

from mmtok_sglang import transport
from mmtok_sglang.transport import send_one_request
from tests.runtime.test_metrics import value

PIXELS = torch.arange(4096, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a server of one machine."""
    monkeypatch.setattr(mm_utils, "_is_default_tensor_transport", False)
    monkeypatch.setattr(mm_utils, "get_serving", lambda: SimpleNamespace(skip_tokenizer_init=False))


def request() -> Any:
    names = ("input_text", "input_ids", "input_embeds", "token_type_ids", "sampling_params", "token_ids_logprob")
    return TokenizedGenerateReqInput(
        rid="0",
        mm_inputs=MultimodalProcessorOutput(
            mm_items=[MultimodalDataItem(modality=Modality.IMAGE, feature=PIXELS.clone())]
        ),
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        stream=False,
        **dict.fromkeys(names),
    )


def manager(*, dispatched: bool) -> Any:
    return SimpleNamespace(rid_to_state={"0": SimpleNamespace(dispatched=dispatched)})


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob(f"sgl_shm_mm_{os.getpid()}_*")}


def test_pixels_are_copied_in_another_thread_before_sglang_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    found: list[torch.Tensor] = []

    def copy(obj: Any) -> None:
        threads.append(threading.get_ident())
        mm_utils.wrap_shm_features(obj)

    monkeypatch.setattr(transport, "wrap_shm_features", copy)

    async def original(_manager: Any, obj: Any) -> None:
        pointer = obj.mm_inputs.mm_items[0].feature
        assert isinstance(pointer, ShmPointerMMData)
        mm_utils.wrap_shm_features(obj)
        assert obj.mm_inputs.mm_items[0].feature is pointer
        found.append(pickle.loads(pickle.dumps(pointer)).materialize())

    before = value("image_transport_milliseconds_count")
    asyncio.run(send_one_request(original, manager(dispatched=True), request()))
    assert threads != [threading.get_ident()]
    assert torch.equal(found[0], PIXELS)
    assert segments() == set()
    assert value("image_transport_milliseconds_count") == before + 1


def test_a_request_that_is_cancelled_while_its_pixels_are_copied_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[set[str]] = []

    def slow_copy(obj: Any) -> None:
        begun.set()
        go_on.wait(10)
        mm_utils.wrap_shm_features(obj)
        done.append(segments())

    async def original(_manager: Any, _obj: Any) -> None:
        raise AssertionError("sent after all")

    async def cancelled() -> None:
        task = asyncio.create_task(send_one_request(original, manager(dispatched=False), request()))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        while segments() or not done:
            await asyncio.sleep(0.001)

    monkeypatch.setattr(transport, "wrap_shm_features", slow_copy)
    asyncio.run(asyncio.wait_for(cancelled(), 20))
    assert len(done[0]) == 1


@pytest.mark.parametrize("dispatched", [False, True])
def test_pixels_of_a_request_that_fails_are_left_to_a_scheduler_that_has_it(dispatched: bool) -> None:
    failing = request()

    async def original(_manager: Any, _obj: Any) -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        asyncio.run(send_one_request(original, manager(dispatched=dispatched), failing))
    assert len(segments()) == dispatched
    mm_utils.discard_shm_features(failing)
    assert segments() == set()


def test_a_request_of_text_is_sent_as_it_is() -> None:
    sent = []

    async def original(_manager: Any, obj: Any) -> None:
        sent.append(obj)

    text = SimpleNamespace(mm_inputs=None)
    asyncio.run(send_one_request(original, None, text))
    assert sent == [text]
