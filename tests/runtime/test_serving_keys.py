"""Servers that compare tokens by the projector's output, against a model pruned by hand that does so, too."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from mmtok_bench.families import FamilyName
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import judge_of, make_server
from tests.runtime.engine_files import export_for
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

CHAT = Chat.ask(small("astronaut", 336, 336), "Who is it?")

pytestmark = pytest.mark.slow


def held_to_the_output(served: Served) -> None:
    judge = served.judge
    prompt = judge.prompt(CHAT.for_template())
    by_input, by_output = (
        judge.prune(prompt, CHAT.images, CHAT.guidance, 0.1, keys=keys) for keys in ("input", "output")
    )
    account = served.ask(CHAT)
    assert judge.max_error(by_output, account) < LOGPROB_TOLERANCE
    assert judge.max_error(by_input, account) > LOGPROB_TOLERANCE
    assert served.server.server_info()["mmtok_keys"] == "output"
    assert served.metric("selection_fallbacks_total") == 0


@pytest.mark.parametrize("family", ["qwen2.5-vl"])
def test_a_request_asks_for_the_input_again(family: FamilyName) -> None:
    with make_server(family, "--mmtok-budget=10%", "--mmtok-keys=output", "--enable-metrics") as server:
        served = Served(family, server, judge_of(family))
        held_to_the_output(served)
        # The features of the image are held already; tokens, and all that is cached behind them, are others.
        misses = served.metric("feature_cache_misses_total")
        served.check(CHAT, served.ask(CHAT, mmtok_keys="input"))
        assert served.metric("feature_cache_misses_total") == misses
        held_to_the_output(served)


@pytest.mark.parametrize("family", ["llava-1.5"])
def test_an_exported_file_compares_by_the_output(family: FamilyName, tmp_path: Path) -> None:
    file = export_for(family, tmp_path / "selection.onnx", 57, keys="output")
    flags = ("--mmtok-budget=10%", "--mmtok-keys=output", f"--mmtok-engine={file}", "--enable-metrics")
    with make_server(family, *flags) as server:
        served = Served(family, server, judge_of(family))
        held_to_the_output(served)
        with pytest.raises(openai.BadRequestError, match=r"mmtok_keys input is not what selection\.onnx runs"):
            served.ask(CHAT, mmtok_keys="input")
