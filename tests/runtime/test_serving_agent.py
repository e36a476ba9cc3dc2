"""A server whose guidance an agent enriches: another real server."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest

from mmtok_bench.families import FamilyName
from mmtok_bench.process_tree import process_tree
from mmtok_bench.server import running
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import make_server
from tests.runtime.serving import Served

# Guided by whole texts: whatever noise the agent answers, it counts.
FAMILY: FamilyName = "qwen2.5-vl"
CUP = "What is in this cup?"
CATS = "How many cats are on the red table?"
TIMEOUT_MS = 15_000


@pytest.fixture(scope="module")
def agent(servers: tuple[Served, Served]) -> Served:
    """The session's server without the plugin."""
    if servers[1].family != FAMILY:
        pytest.skip(f"the agent is the same to every family: seen once, with {FAMILY}")
    return servers[1]


@pytest.fixture(scope="module")
def guided(agent: Served) -> Iterator[Served]:
    server = make_server(
        FAMILY,
        "--mmtok-budget=10%",
        f"--mmtok-agent-url={agent.server.url.replace('//', '//me:s3cret-word@')}/v1?key=t0ken-abc",
        f"--mmtok-agent-timeout-ms={TIMEOUT_MS}",
        "--enable-metrics",
    )
    with running(server):
        yield Served(FAMILY, server, agent.judge)


def answer_of(agent: Served, chat: Chat) -> str:
    completion = agent.server.client().chat.completions.create(
        model="default",
        messages=chat.for_server(),  # type: ignore[arg-type]
        max_tokens=32,
        temperature=0,
    )
    text = (completion.choices[0].message.content or "").strip()
    assert text
    return text


def num_asked(served: Served) -> float:
    return served.metric("agent_milliseconds_count")


def test_the_agents_answer_guides(guided: Served, agent: Served) -> None:
    before = num_asked(guided)
    chat = Chat.ask(small("coffee"), CUP)
    account = guided.ask(chat)
    guided.check(chat, account, guidance=[f"{CUP} {answer_of(agent, chat)}"])
    assert num_asked(guided) - before == 1
    assert guided.metric("agent_milliseconds_sum") > 0
    assert guided.metric("agent_timeouts_total") == guided.metric("agent_errors_total") == 0
    # What it would have kept by the question alone is something else.
    prompt = guided.judge.prompt(chat.for_template())
    by_question = guided.judge.prune(prompt, chat.images, [CUP], 0.1)
    assert guided.judge.max_error(by_question, account) > 1e-3


def test_a_later_turn_is_guided_alike_and_asks_no_more(guided: Served, agent: Served) -> None:
    first = Chat.ask(small("rocket"), CUP)
    account, before = guided.ask(first), num_asked(guided)
    later = first.then("assistant", "A rocket.").then("user", CATS)
    later_account = guided.ask(later)
    assert num_asked(guided) == before
    assert later_account["cached_tokens"] >= guided.from_cache(account["prompt_tokens"])
    guided.check(later, later_account, guidance=[f"{CUP} {answer_of(agent, first)}"])


def test_only_what_the_text_guides_is_asked_about(guided: Served) -> None:
    before = num_asked(guided)
    chat = Chat.ask(small("chelsea"), CATS)
    guided.check(chat, guided.ask(chat, mmtok_budget="all"), None)
    guided.ask(chat, mmtok_method="even")
    guided.ask(chat, mmtok_method="vision-coverage")
    guided.check(Chat.ask("No image."), guided.ask(Chat.ask("No image.")))
    without_text = Chat.ask(small("chelsea"))
    guided.check(without_text, guided.ask(without_text))
    assert num_asked(guided) == before


def test_a_flush_forgets_the_answers(guided: Served, agent: Served) -> None:
    chat = Chat.ask(small("rocket"), CATS)
    guided.ask(chat)
    before = num_asked(guided)
    guided.flush_cache()
    guided.check(chat, guided.ask(chat), guidance=[f"{CATS} {answer_of(agent, chat)}"])
    assert num_asked(guided) - before == 1


@pytest.mark.slow
def test_a_flush_reaches_every_tokenizer_worker_and_all_end_with_the_scheduler(agent: Served) -> None:
    """Each connection goes to one of two workers, as the kernel decides; one that remembers does not ask again."""
    url = f"--mmtok-agent-url={agent.server.url}/v1"
    flags = ["--mmtok-budget=10%", url, f"--mmtok-agent-timeout-ms={TIMEOUT_MS}", "--enable-metrics"]
    with make_server(FAMILY, *flags, "--tokenizer-worker-num=2") as server:
        served = Served(FAMILY, server, agent.judge)
        chat = Chat.ask(small("rocket"), CATS)

        def ask_until_both_have_asked() -> None:
            before = num_asked(served)
            for _ in range(60):
                served.ask(chat)
                if num_asked(served) - before == 2:
                    return
            pytest.skip("the kernel gave all connections to one worker")

        ask_until_both_have_asked()
        # Whichever of them answers, its hooks are there.
        served.check(chat, served.ask(chat), guidance=[f"{CATS} {answer_of(agent, chat)}"])
        served.flush_cache()
        ask_until_both_have_asked()
        (scheduler,) = (
            each
            for each in process_tree(server.process_id)
            if any("sglang::scheduler" in part for part in each.cmdline())
        )
        scheduler.kill()
        deadline_s = time.monotonic() + 30.0
        while server.is_alive() and time.monotonic() < deadline_s:
            time.sleep(0.2)
        assert not server.is_alive(), "a server without a scheduler answers nothing, and says that it is ready"


def test_a_question_for_an_agent_is_refused(guided: Served) -> None:
    client = guided.server.client().with_options(default_headers={"X-MMTok-Agent": "1"})
    with pytest.raises(openai.BadRequestError, match="answers no question that is for an agent"):
        client.chat.completions.create(
            model="default",
            messages=Chat.ask(small("rocket"), CATS).for_server(),  # type: ignore[arg-type]
        )


def test_credentials_are_shown_nowhere(guided: Served) -> None:
    shown = guided.get("/server_info") + guided.server.log_text()
    assert "//***@127.0.0.1:" in shown
    assert "s3cret" not in shown
    assert "t0ken" not in shown


def test_an_agent_that_hangs_is_not_waited_for(guided: Served, agent: Served) -> None:
    before = guided.metric("agent_timeouts_total")
    chat = Chat.ask(small("astronaut"), CUP)
    with stopped(agent):
        guided.check(chat, guided.ask(chat))
    assert guided.metric("agent_timeouts_total") - before == 1
    assert "the question alone guides" in guided.server.log_text()
    assert agent.server.is_alive()


@contextmanager
def stopped(served: Served) -> Iterator[None]:
    """The server's HTTP process, which neither answers nor refuses."""
    assert served.server._process is not None
    os.kill(served.server._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(served.server._process.pid, signal.SIGCONT)
