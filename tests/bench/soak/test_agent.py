"""The agent that misbehaves: each mode is what its name says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import httpx
import pytest

from mmtok_soak.agent import MODES, Agent


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent() as agent:
        yield agent


def ask(agent: Agent, mode: str, *, follow: bool = False) -> httpx.Response:
    agent.mode = mode
    with httpx.Client(trust_env=False, timeout=30, follow_redirects=follow) as client:
        return client.post(agent.url + "/chat/completions", json={"messages": []})


def test_a_good_answer(agent: Agent) -> None:
    assert ask(agent, "good").json()["choices"][0]["message"]["content"] == "a red cat"
    assert agent.asked == {"good": 1}


@pytest.mark.parametrize("status", [302, 308])
def test_a_redirect_that_is_followed_is_counted(agent: Agent, status: int) -> None:
    assert ask(agent, f"redirect {status}").status_code == status
    assert "redirected" not in agent.asked
    assert ask(agent, f"redirect {status}", follow=True).status_code == 200
    assert agent.asked == {f"redirect {status}": 2, "redirected": 1}


@pytest.mark.parametrize("mode", ["slow", "drip", "endless body"])
def test_answers_that_do_not_end(agent: Agent, mode: str) -> None:
    agent.mode = mode
    pieces = 0
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.Client(trust_env=False, timeout=0.5) as client,
        client.stream("POST", agent.url + "/chat/completions", json={}) as answer,
    ):
        for _ in answer.iter_raw():
            pieces += 1
            if pieces == 3:
                break
    assert agent.asked[mode] == 1
    assert pieces == (0 if mode == "slow" else 3)


def test_answers_that_end_wrongly(agent: Agent) -> None:
    with pytest.raises(httpx.HTTPError):
        ask(agent, "reset")
    assert ask(agent, "HTTP 500").status_code == 500
    with pytest.raises(ValueError, match=r"codec|JSON|Expecting"):
        ask(agent, "no JSON").json()
    with pytest.raises(RecursionError):
        json.loads(ask(agent, "deep JSON").text)
    assert len(ask(agent, "gzip bomb").content) == 200 << 20


def test_every_mode_is_one_of_these() -> None:
    assert set(MODES) == {
        *("redirect 302", "redirect 308", "endless body", "gzip bomb", "deep JSON"),
        *("no JSON", "HTTP 500", "slow", "drip", "reset"),
    }
