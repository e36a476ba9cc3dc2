"""Prefill and decoding on two servers: one prunes, and the other goes on at the same positions."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from mmtok_bench.families import FamilyName
from mmtok_bench.server import running
from tests.runtime.chats import CHATS, QUESTION, Chat, small
from tests.runtime.conftest import FAMILIES
from tests.runtime.disaggregated import Disaggregated, Transfer, make_pair, obstacle_to
from tests.runtime.films import film, has_ffmpeg
from tests.runtime.hook_faults import Faults, fault_environment
from tests.runtime.serving import prunes_videos

ARGUMENTS = ("--mmtok-budget=10%", "--chunked-prefill-size=64")

pytestmark = pytest.mark.slow
NEEDS_MOONCAKE = pytest.mark.skipif(obstacle_to("mooncake") is not None, reason=str(obstacle_to("mooncake")))
PAIRS: list[tuple[FamilyName, Transfer]] = [*((name, "mooncake") for name in FAMILIES), ("qwen2.5-vl", "nixl")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(each, id="-".join(each), marks=() if each[0] == "qwen2.5-vl" else pytest.mark.exhaustive)
        for each in PAIRS
    ],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disaggregated]:
    """A pair with a budget of 10%, chunks of 64 tokens, and a retraction at every seventh step of decoding."""
    family, transfer = request.param
    if obstacle := obstacle_to(transfer):
        pytest.skip(obstacle)
    folder = tmp_path_factory.mktemp(family)
    environment: dict[str, Any] = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    environment |= fault_environment(folder)
    servers = make_pair(folder / "pair", family, *ARGUMENTS, transfer=transfer, **environment)
    with running(*servers):
        yield Disaggregated.of(family, servers, Faults(folder))


def test_answers(pair: Disaggregated) -> None:
    for chat in CHATS:
        prefilled, decoded = pair.ask(chat, max_tokens=8)
        pair.decode.check(chat, decoded)
        for account in (prefilled, decoded) if chat.images else ():
            (counts,) = account["mmtok"]
            assert counts["image_tokens_kept"] == account["image_tokens"] < counts["image_tokens_in"]
            # The decode server selects nothing.
            assert all((each["coverage"] is None) == (account is decoded) for each in counts["images"])


def test_budgets_of_requests(pair: Disaggregated) -> None:
    chat = CHATS[0]
    for fields, budget in (({"mmtok_budget": "all"}, None), ({"mmtok_budget": "25%"}, 0.25)):
        _, decoded = pair.ask(chat, **fields)
        pair.decode.check(chat, decoded, budget)
    # An answer of one token, which the prefill server makes.
    _, decoded = pair.ask(chat, max_tokens=1)
    pair.decode.check(chat, decoded)
    # The share that `auto` finds on each server by itself.
    prefilled, decoded = pair.ask(chat, mmtok_budget="auto")
    assert prefilled["prompt_tokens"] == decoded["prompt_tokens"]
    if pair.family != "llava-next":  # the judge takes the tokens of one tile
        pair.decode.check(chat, decoded, decoded["mmtok"][0]["images"][0]["tokens_kept"])


def test_retracted_requests(pair: Disaggregated) -> None:
    chats = [Chat.ask(small("coffee"), f"{QUESTION} {number}") for number in range(4)]
    with ThreadPoolExecutor(len(chats)) as pool:
        answers = list(pool.map(lambda chat: pair.ask(chat, max_tokens=24)[1], chats))
    for chat, decoded in zip(chats, answers, strict=True):
        pair.decode.check(chat, decoded)
    assert sum(decoded["num_retractions"] for decoded in answers) > 0


@pytest.mark.parametrize("point", ["encode", "features"])
def test_an_image_that_fails(pair: Disaggregated, point: str) -> None:
    """Both servers answer at once; SGLang alone would have the decode server wait for 5 minutes."""
    chat = Chat.ask(small("chelsea"), f"What fails at {point}?")
    pair.prefill.flush_cache()
    pair.faults.set(point, list(range(1, 20)))
    for error in pair.errors(chat):
        assert error.status_code == 500
    assert pair.faults.clear() > 0
    assert "MMTok: " in pair.decode.server.log_text()
    pair.decode.check(chat, pair.ask(chat)[1])


@pytest.mark.skipif(not has_ffmpeg(), reason="needs ffmpeg")
def test_a_film_and_an_image(pair: Disaggregated) -> None:
    if not prunes_videos(pair.family):
        pytest.skip(f"{pair.family} prunes no videos")
    chat = Chat.ask(film(), small("coffee"), QUESTION)
    _, decoded = pair.ask(chat)
    pair.decode.check(chat, decoded)


@NEEDS_MOONCAKE
@pytest.mark.exhaustive
def test_another_budget_fails_its_requests_alone(tmp_path: Path) -> None:
    servers = make_pair(tmp_path, "qwen2.5-vl", "--mmtok-budget=10%", of_decode=("--mmtok-budget=25%",))
    with running(*servers):
        other = Disaggregated.of("qwen2.5-vl", servers, Faults(tmp_path))
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="Decode handshake failed"):
                other.ask_decode(CHATS[0])
        log = servers[1].log_text()
        assert "does not fit this decode server, and its requests fail" in log
        assert "budget 10%" in log
        assert "budget 25%" in log
        assert all(server.is_alive() for server in servers)


@NEEDS_MOONCAKE
@pytest.mark.exhaustive
def test_a_decode_server_without_a_budget_ends(tmp_path: Path) -> None:
    """SGLang's own comparison ends it; else it would read keys and values that do not exist."""
    prefill, _ = make_pair(tmp_path, "qwen2.5-vl", "--mmtok-budget=10%")
    port = Disaggregated.bootstrap_port(prefill)
    _, decode = make_pair(tmp_path, "qwen2.5-vl", of_decode=(f"--disaggregation-bootstrap-port={port}",))
    with running(prefill, decode):
        with pytest.raises(openai.OpenAIError):
            Disaggregated.of("qwen2.5-vl", (prefill, decode), Faults(tmp_path)).ask_decode(CHATS[0])
        assert "KV cache dtype mismatch" in decode.log_text()
        assert "MMTok (budget 10%" in decode.log_text()
        assert prefill.is_alive()
