"""An error anywhere in the hooks ends the requests that it belongs to; the server goes on, and answers exactly."""

from __future__ import annotations

import json
import os
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from mmtok_bench.families import FamilyName
from tests.runtime.chats import Chat, data_url, small
from tests.runtime.conftest import judge_of, make_server
from tests.runtime.hook_faults import POINTS, Faults, fault_environment
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

pytestmark = pytest.mark.slow

# A call fails, then a later one, then whatever is tried.
CALLS = ([1], [2], list(range(1, 20)))
TEXT = Chat.ask("Tell me about cats.")


@pytest.fixture(
    scope="module",
    params=[("qwen2.5-vl", 1, 1), ("qwen3-vl", 1, 1), ("llava-1.5", 2, 1), ("qwen2.5-vl", 1, 2)],
    ids=lambda param: "{}-tp{}-pp{}".format(*param),
)
def faulty(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, Faults, int]]:
    """A server, its faults, and how many ranks meet one: of a pipeline those of its first stage."""
    family, tp_size, pp_size = request.param
    if tp_size * pp_size > (os.cpu_count() or 1):
        pytest.skip("two ranks need two cores")
    folder = tmp_path_factory.mktemp("faults")
    yield from _served(family, tp_size, pp_size, folder)


def _served(family: FamilyName, tp_size: int, pp_size: int, folder: Path) -> Iterator[tuple[Served, Faults, int]]:
    flags = ["--mmtok-budget=10%", "--enable-metrics", f"--tp-size={tp_size}", f"--pp-size={pp_size}"]
    flags.append("--enable-streaming-session")
    if family == "llava-1.5":
        # What it needs without a budget may stay.
        flags.append("--model-impl=transformers")
    with make_server(family, *flags, num_ranks=tp_size * pp_size, **fault_environment(folder)) as server:
        yield Served(family, server, judge_of(family)), Faults(folder), tp_size


def _asked(served: Served, chat: Chat) -> tuple[dict[str, Any] | None, int, str]:
    """Returns the account of an answer, and the status and message of a refusal."""
    try:
        return served.ask(chat), 200, ""
    except openai.APIStatusError as error:
        return None, error.status_code, error.message


@pytest.mark.parametrize("point", POINTS)
def test_an_error_at_any_call_leaves_the_server_exact(faulty: tuple[Served, Faults, int], point: str) -> None:
    served, faults, num_ranks = faulty
    if point in ("spans", "write") and served.family != "qwen2.5-vl":
        pytest.skip("the family has no M-RoPE positions")
    num_met = 0
    for number, calls in enumerate(CALLS):
        # Another question each time, so that nothing is in a cache.
        chat = Chat.ask(small("coffee"), small("chelsea"), f"Which of them is at {point} number {number}?")
        served.flush_cache()
        fallbacks = served.metric("selection_fallbacks_total")
        faults.set(point, calls)
        account, status, message = _asked(served, chat)
        assert (status, "MMTok" in message) in ((200, False), (500, True)), message
        num_met += faults.clear()
        if account is not None and served.metric("selection_fallbacks_total") == fallbacks:
            served.check(chat, account)
        if point == "select":
            # Evenly spaced tokens stood in: the answer is one of the selection that could not be made.
            assert status == 200
        served.ask(TEXT)
        served.check(chat, served.ask(chat))
    # Of some points a request makes one call; the first rank alone answers. A pipeline's first stage tells the second.
    assert num_met >= (1 if point == "account" else num_ranks) * (len(CALLS) - 1)


@pytest.mark.parametrize("point", ["namespace", "bound"])
def test_an_error_for_a_text_leaves_the_server_exact(faulty: tuple[Served, Faults, int], point: str) -> None:
    served, faults, num_ranks = faulty
    faults.set(point, [1])
    _, status, message = _asked(served, TEXT)
    assert (status, "MMTok: the request could not be taken in" in message) == (500, True), message
    assert faults.clear() == num_ranks
    served.check(TEXT, served.ask(TEXT))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("point", ["key", "bound", "owners", "select", "features"])
def test_a_session_goes_on_after_an_error(faulty: tuple[Served, Faults, int], point: str, streaming: bool) -> None:
    served, faults, _ = faulty
    session = json.loads(served.post("/open_session", {"capacity_of_str_len": 10_000, "streaming": streaming}))
    fallbacks = served.metric("selection_fallbacks_total")
    prompt = ""
    account: dict[str, Any] = {}
    images: list[Image.Image] = []
    questions: list[str] = []
    for name, calls in (("coffee", []), ("chelsea", [1]), ("rocket", [])):
        chat = Chat.ask(small(name), f"What is in this picture of {point}, {streaming}?")
        turn = served.judge.prompt(chat.for_template())
        last_turn = {} if streaming or not account else {"rid": account["id"]}
        refusal = None
        faults.set(point, calls)
        try:
            account = served.generate(turn, chat, session={"id": session, **last_turn})
        except urllib.error.HTTPError as error:
            refusal = error
        faults.clear()
        if refusal is not None:
            assert calls
            assert (refusal.code, "MMTok" in refusal.read().decode()) == (500, True)
            continue
        prompt, images, questions = prompt + turn, [*images, *chat.images], [*questions, *chat.guidance]
        # Where evenly spaced tokens stood in, the session keeps them.
        if served.metric("selection_fallbacks_total") == fallbacks:
            pruned = served.judge.prune(prompt, images, questions, 0.1)
            assert account["prompt_tokens"] == len(pruned.embeddings)
            assert served.judge.max_error(pruned, account) < LOGPROB_TOLERANCE
        prompt += account["text"]
    served.post("/close_session", {"session_id": session})


@pytest.mark.parametrize("budget", ["10%", "all"])
def test_all_stages_refuse_a_turn_that_cuts_an_image(faulty: tuple[Served, Faults, int], budget: str) -> None:
    """A stage that takes in what another one refuses would wait for it forever."""
    served, _, _ = faulty
    session = json.loads(served.post("/open_session", {"capacity_of_str_len": 10_000}))
    chat = Chat.ask(small("coffee"), "What is in this cup?")
    turn = served.judge.prompt(chat.for_template())
    answer = served.generate(turn, chat, session={"id": session}, mmtok_budget=budget)
    served.check(chat, answer, None if budget == "all" else 0.1)
    with pytest.raises(urllib.error.HTTPError) as refused:
        served.generate(turn, chat, session={"id": session, "rid": answer["id"], "offset": 1})
    assert refused.value.code == 400
    assert "cuts off an image" in refused.value.read().decode()
    served.check(chat, served.ask(chat))
    served.post("/close_session", {"session_id": session})


def test_beams_whose_image_fails_leave_nothing(faulty: tuple[Served, Faults, int]) -> None:
    served, faults, _ = faulty
    if served.server.server_info()["pp_size"] > 1:
        pytest.skip("SGLang has no beams in a pipeline")
    chat = Chat.ask(small("coffee"), "Is this a cup of beams?")
    body = {
        "text": served.judge.prompt(chat.for_template()),
        "image_data": [data_url(image) for image in chat.images],
        "sampling_params": {"max_new_tokens": 4, "beam_width": 5, "n": 5, "ignore_eos": True},
    }
    # More beams than the server runs rows at a time.
    for _ in range(3):
        served.flush_cache()
        faults.set("encode", list(range(1, 20)))
        with pytest.raises(urllib.error.HTTPError) as refusal:
            served.post("/generate", body)
        assert refusal.value.code == 500
        assert "MMTok: the features of an image could not be computed" in refusal.value.read().decode()
        faults.clear()
    assert len(served.post("/generate", body)["meta_info"]["beam_results"]) == 5
    # SGLang looks for memory that nobody holds when it is idle.
    time.sleep(2)
    served.check(chat, served.ask(chat))


def test_features_that_are_not_finite_reach_no_other_request(faulty: tuple[Served, Faults, int]) -> None:
    served, faults, num_ranks = faulty
    if served.token_px is None:
        pytest.skip("what LLaVA selects from is read inside the encoder's call, before the value that is changed here")
    chat = Chat.ask(small("coffee"), "Is this a number?")
    served.flush_cache()
    fallbacks = served.metric("selection_fallbacks_total")
    faults.set("encode", [1], is_nan=True)
    served.ask(chat)
    assert faults.clear() == num_ranks
    assert served.metric("selection_fallbacks_total") == fallbacks + 1
    # The text before the image is in the prefix cache now.
    account = served.ask(chat)
    assert account["cached_tokens"] > 0
    served.check(chat, account)


def test_an_error_of_one_rank_alone_ends_the_server(faulty: tuple[Served, Faults, int]) -> None:
    """Last in this file: the server is gone after it."""
    served, faults, _ = faulty
    if "--tp-size=2" in served.server.args:
        # Within the encoder, whose collectives the other rank waits in.
        point, chat, why = "encode", Chat.ask(small("rocket"), "What is it?"), "MMTok: rank 1"
    elif "--pp-size=2" in served.server.args:
        point, chat, why = "namespace", TEXT, "MMTok: a pipeline stage failed where the stage before did not"
    else:
        pytest.skip("there is one rank")
    served.flush_cache()
    faults.set(point, [1], rank=1)
    with pytest.raises(openai.APIError):
        served.ask(chat)
    failed_s = faults.last_met_s()
    while served.server.is_alive() and time.time() < failed_s + 60:
        time.sleep(0.1)
    assert time.time() - failed_s < 10
    log = served.server.log_text()
    assert why in log
    assert f"injected at {point}" in log
