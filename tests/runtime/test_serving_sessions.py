"""Sessions: each turn is read behind the tokens that the turns before it have kept."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from mmtok_bench.families import FAMILY_TRAITS
from tests.runtime.chats import Chat, data_url, small
from tests.runtime.conftest import checkpoint
from tests.runtime.hand_pruned import HandPruned
from tests.runtime.other_weights import with_other_weights
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

CHATS = [
    Chat.ask(small(name), question)
    for name, question in (
        ("coffee", "What is in this cup?"),
        ("rocket", "Where does it go?"),
        ("chelsea", "How many cats are on the red table?"),
    )
]


def _opened(served: Served, *, streaming: bool = False) -> str:
    session: str = json.loads(served.post("/open_session", {"capacity_of_str_len": 10_000, "streaming": streaming}))
    return session


def _turns(served: Served) -> list[str]:
    return [served.judge.prompt(chat.for_template()) for chat in CHATS]


def _check(
    judge: HandPruned, prompt: str, chats: list[Chat], account: dict[str, Any], budget: float | list[float] = 0.1
) -> None:
    """Holds a turn against the hand-pruned model of the whole prompt, with the images of the turns in it."""
    images, questions = [image for chat in chats for image in chat.images], [chat.guidance[0] for chat in chats]
    pruned = judge.prune(prompt, images, questions, budget)
    assert account["prompt_tokens"] == len(pruned.embeddings)
    assert judge.max_error(pruned, account) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("streaming", [False, True])
def test_turns(served: Served, streaming: bool) -> None:
    """SGLang numbers a later turn's tokens by themselves, and shifts them behind the turns before."""
    session = _opened(served, streaming=streaming)
    prompt = ""
    account: dict[str, Any] = {}
    for number, turn in enumerate(_turns(served), start=1):
        last_turn = {} if streaming or not account else {"rid": account["id"]}
        account = served.generate(turn, CHATS[number - 1], session={"id": session, **last_turn})
        prompt += turn
        _check(served.judge, prompt, CHATS[:number], account)
        prompt += account["text"]
    served.post("/close_session", {"session_id": session})


@pytest.mark.parametrize("change", ["drop the answer", "replace", "cut the text"])
def test_a_turn_that_changes_what_was_before(served: Served, change: str) -> None:
    session = _opened(served)
    first, second, third = _turns(served)
    answer = served.generate(first, CHATS[0], session={"id": session})
    other = served.generate(second, CHATS[1], session={"id": session, "rid": answer["id"]})
    if change == "drop the answer":
        params: dict[str, Any] = {"rid": other["id"], "drop_previous_output": True}
        prompt, chats = first + answer["text"] + second, CHATS
    elif change == "replace":
        params = {"rid": answer["id"], "replace": True}
        prompt, chats = first + answer["text"], [CHATS[0], CHATS[2]]
    else:
        # Counted in tokens that the language model reads.
        params = {"rid": answer["id"], "offset": answer["prompt_tokens"] - 1}
        prompt, chats = first[:-1], [CHATS[0], CHATS[2]]
    account = served.generate(third, CHATS[2], session={"id": session, **params})
    _check(served.judge, prompt + third, chats, account)
    served.post("/close_session", {"session_id": session})


@pytest.mark.parametrize("keeps", ["no token", "a part"])
def test_an_offset_that_cuts_an_image_is_refused(served: Served, keeps: str) -> None:
    """Without the plugin it ends the server. An image that is not in the prompt would fail a whole batch."""
    session = _opened(served)
    first, second, _ = _turns(served)
    answer = served.generate(first, CHATS[0], session={"id": session})
    before = first.partition(FAMILY_TRAITS[served.family].placeholder)[0]
    num_before = len(served.judge.processor.tokenizer(before).input_ids)
    offset = num_before - 1 if keeps == "no token" else num_before + 3
    with pytest.raises(urllib.error.HTTPError) as refused:
        served.generate(second, CHATS[1], session={"id": session, "rid": answer["id"], "offset": offset})
    assert refused.value.code == 400
    assert "MMTok: the session's offset cuts off an image" in refused.value.read().decode()
    served.check(CHATS[1], served.ask(CHATS[1]))
    served.post("/close_session", {"session_id": session})


@contextmanager
def _answering(served: Served, chat: Chat, **fields: Any) -> Iterator[IO[bytes]]:
    """A request of 400 tokens that has its first one."""
    body = {
        "text": served.judge.prompt(chat.for_template()),
        "image_data": [data_url(image) for image in chat.images] or None,
        "sampling_params": {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True},
        "stream": True,
        **fields,
    }
    request = urllib.request.Request(
        f"{served.server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as stream:
        assert b'"text"' in stream.readline()
        yield stream


def test_a_streaming_session_has_one_turn_at_a_time(served: Served) -> None:
    """SGLang, too, refuses another; the images of that one end a server of a Qwen without the plugin."""
    session = _opened(served, streaming=True)
    with _answering(served, CHATS[0], rid="first", session_params={"id": session}) as stream:
        with pytest.raises(urllib.error.HTTPError) as refused:
            served.generate(_turns(served)[1], CHATS[1], session={"id": session})
        assert refused.value.code == 400
        assert "Streaming session already has an active request." in refused.value.read().decode()
        served.post("/abort_request", {"rid": "first"})
        assert b'"abort"' in stream.read()
    account = served.generate(_turns(served)[2], CHATS[2], session={"id": session})
    _check(served.judge, _turns(served)[2], [CHATS[2]], account)
    served.post("/close_session", {"session_id": session})


def test_a_turn_of_a_streaming_session_is_retracted_twice(served: Served) -> None:
    """SGLang takes a retracted turn for finished: this turn, or the one after it, would be answered wrongly."""
    session = _opened(served, streaming=True)
    first, second, _ = _turns(served)
    with _answering(served, CHATS[0], session_params={"id": session}) as stream:
        events = (json.loads(line[6:]) for line in stream if line.startswith(b"data: {"))
        for number in (1, 2):
            served.post("/pause_generation", {"mode": "retract"})
            served.post("/continue_generation")
            # Behind what was on its way: a token of the turn that goes on.
            while next(events)["meta_info"]["num_retractions"] < number:
                pass
        *_, answer = events
    assert answer["meta_info"]["num_retractions"] == 2
    account = served.generate(second, CHATS[1], session={"id": session})
    _check(served.judge, first + answer["text"] + second, CHATS[:2], account)
    served.post("/close_session", {"session_id": session})


@pytest.fixture
def other_weights(served: Served, tmp_path: Path) -> Iterator[tuple[Path, HandPruned]]:
    """A checkpoint of other weights, with its judge; the server has its own weights again after the test."""
    path = with_other_weights(checkpoint(served.family), tmp_path / "new")
    yield path, HandPruned(served.family, path)
    assert served.post("/update_weights_from_disk", {"model_path": str(checkpoint(served.family))})["success"]
    served.check(CHATS[0], served.ask(CHATS[0]))


@pytest.mark.parametrize("retracts", [False, True])
def test_an_aborted_turn_of_a_streaming_session_under_other_weights(
    served: Served, other_weights: tuple[Path, HandPruned], retracts: bool
) -> None:
    """Where one is aborted, SGLang hands the session's keys and values to the prefix cache, which owns some already.

    One that is retracted while the weights change gets new keys, and the turn before it keeps the old ones.
    """
    _skip_budgets_by_image(served)
    new, other_judge = other_weights
    session = _opened(served, streaming=True)
    first, _, third = _turns(served)
    # All of its tokens, since the session keeps those that the old weights have selected.
    answer = served.generate(first, CHATS[0], session={"id": session}, mmtok_budget="all")
    served.check(CHATS[0], answer, None)
    update = {"model_path": str(new), "flush_cache": False}
    if not retracts:
        assert served.post("/update_weights_from_disk", update)["success"]
    # SGLang has the prompt of a turn without images in the array of the turn before.
    aborted = Chat.ask("What else is there?") if retracts else CHATS[1]
    with _answering(served, aborted, rid="aborted", session_params={"id": session}) as stream:
        if retracts:
            served.post("/pause_generation", {"mode": "retract"})
            assert served.post("/update_weights_from_disk", update)["success"]
            served.post("/continue_generation")
        served.post("/abort_request", {"rid": "aborted"})
        assert b'"abort"' in stream.read()
    account = served.generate(third, CHATS[2], session={"id": session})
    _check(other_judge, first + answer["text"] + third, [CHATS[0], CHATS[2]], account, [1.0, 0.1])
    served.post("/close_session", {"session_id": session})


def test_two_answers_to_a_turn_of_which_one_waits_for_other_weights(
    served: Served, other_weights: tuple[Path, HandPruned]
) -> None:
    """The one that waits gets new keys for the image of the turn before, which is the other one's as well."""
    _skip_budgets_by_image(served)
    new, other_judge = other_weights
    session = _opened(served)
    first, second, _ = _turns(served)
    answer = served.generate(first, CHATS[0], session={"id": session}, mmtok_budget="all")
    turn = {"id": session, "rid": answer["id"]}
    with _answering(served, CHATS[1], session_params=turn) as waits, ThreadPoolExecutor(1) as pool:
        served.post("/pause_generation", {"mode": "retract"})
        assert served.post("/update_weights_from_disk", {"model_path": str(new), "flush_cache": False})["success"]
        other = pool.submit(served.generate, second, CHATS[1], session=turn)
        time.sleep(0.1)
        served.post("/continue_generation")
        _check(other_judge, first + answer["text"] + second, CHATS[:2], other.result(60), [1.0, 0.1])
        assert b'"length"' in waits.read()
    served.post("/close_session", {"session_id": session})


def _skip_budgets_by_image(served: Served) -> None:
    if served.family == "llava-next":
        pytest.skip("its path is the one of LLaVA-1.5, and the judge has no budget for an image with its newlines")
