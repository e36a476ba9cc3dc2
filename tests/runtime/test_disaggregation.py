from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mmtok_deploy.budget import Budget
from mmtok_sglang.disaggregation import announcing, check_prefill_server, fail_transfer
from mmtok_sglang.settings import Settings
from tests.runtime.stand_ins import make_settings


def announced(settings: Settings) -> str:
    """Returns what SGLang compares of a server with these settings, as its manager finds it."""
    found: list[str] = []
    args = SimpleNamespace(kv_cache_dtype_str="auto")
    announcing(settings)(lambda manager, args, mode: found.append(args.kv_cache_dtype_str), None, args, "prefill")
    return found[0]


@pytest.mark.parametrize(
    "change",
    [
        {"budget": Budget.parse("25%")},
        {"min_tokens_in": 7},
        {"encoder_scale": 0.5},
        {"skip_repeats": 0},
        {"method": "even"},
        {"video_budget": "frame"},
    ],
)
def test_settings_that_change_a_prompt_are_compared(change: dict[str, Any]) -> None:
    settings = make_settings(family="qwen2.5-vl")
    assert announced(settings).startswith("auto and MMTok (budget ")
    assert announced(settings) == announced(replace(settings))
    assert announced(settings) != announced(replace(settings, **change))


def test_what_an_own_server_may_have_is_not_compared() -> None:
    settings = make_settings(family="qwen2.5-vl")
    own: dict[str, Any] = {
        "feature_cache_mb": 0,
        "backend": "torch",
        "seed": 3,
        "agent_url": "http://user:secret@agent/v1",
    }
    assert announced(settings) == announced(replace(settings, **own))


def test_a_prefill_server_that_does_not_fit_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def mismatch(manager: object, address: str) -> bool:
        raise RuntimeError("KV cache dtype mismatch")

    with caplog.at_level(logging.WARNING):
        assert check_prefill_server(mismatch, None, "prefill:8998") is False
    assert "the prefill server at prefill:8998 does not fit this decode server" in caplog.text
    assert "KV cache dtype mismatch" in caplog.text
    assert check_prefill_server(lambda manager, address: True, None, "prefill:8998") is True


def test_a_request_of_a_server_by_itself_has_no_transfer() -> None:
    fail_transfer(SimpleNamespace(disagg_kv_sender=None), "no reason")
    told: list[dict[str, Any]] = []
    manager = SimpleNamespace(conclude_failure=lambda **named: told.append(named))
    fail_transfer(SimpleNamespace(disagg_kv_sender=SimpleNamespace(kv_mgr=manager), bootstrap_room=5), "an image")
    assert told == [{"bootstrap_room": 5, "failure_reason": "MMTok: an image"}]
