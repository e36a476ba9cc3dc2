"""A server whose selection is an exported file, run by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator

import openai
import pytest

from mmtok_bench.families import FamilyName
from mmtok_bench.server import ServerError, running
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import FAMILIES, judge_of, make_server
from tests.runtime.engine_files import export_for
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

# 10% of 576 patches, of a square or a tile, and of the largest image that a file of another family takes.
BUDGETS = {**{name: 51 if name.startswith("qwen") else 57 for name in FAMILIES}, "internvl3": 83}


@pytest.fixture(scope="module")
def exported(family: FamilyName, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with the budget of the session's, which selects by PyTorch."""
    file = export_for(family, tmp_path_factory.mktemp("engine") / "selection.onnx", BUDGETS[family])
    server = make_server(
        family, "--mmtok-budget=10%", "--mmtok-backend=onnxruntime", f"--mmtok-engine={file}", "--enable-metrics"
    )
    with running(server):
        yield Served(family, server, judge_of(family))


CHATS = [
    Chat.ask(small("astronaut"), "Who is on the photograph?"),
    Chat.ask(small("chelsea"), "What is it?", small("rocket"), "Is it higher than the cat?"),
    Chat.ask(small("coffee")),
]


def test_tokens_and_logprobs_are_those_of_pytorch(exported: Served, served: Served) -> None:
    for chat in CHATS:
        account, expected = exported.ask(chat), served.ask(chat)
        exported.check(chat, account)
        assert account["prompt_tokens"] == expected["prompt_tokens"]
        for ours, theirs in zip(account["output_token_logprobs"], expected["output_token_logprobs"], strict=True):
            assert ours[1] == theirs[1]
            assert abs(ours[0] - theirs[0]) < LOGPROB_TOLERANCE
    assert exported.metric("selection_fallbacks_total") == 0
    assert "MMTok: tokens are selected by selection.onnx by onnxruntime" in exported.server.log_text()
    assert exported.server.server_info()["mmtok_backend"] == "onnxruntime"


def test_a_smaller_budget_is_the_first_picks(exported: Served) -> None:
    chat = Chat.ask(small("astronaut"), "Who is on the photograph?")
    exported.check(chat, exported.ask(chat, mmtok_budget="5%"), budget=0.05)


def test_a_larger_budget_is_refused(exported: Served) -> None:
    chat = Chat.ask(small("astronaut"), "Who is on the photograph?")
    with pytest.raises(openai.BadRequestError, match=r"keeps at most .* tokens, asked for were"):
        exported.ask(chat, mmtok_budget="90%")
    exported.check(chat, exported.ask(chat))


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--tp=1", "--tp=2", "--dp-size=2"])
def test_a_provider_that_cannot_run_ends_the_start_by_one_message(
    flag: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    num_ranks = int(flag[-1])
    if num_ranks > (os.cpu_count() or 1):
        pytest.skip(f"needs {num_ranks} cores")
    file = export_for("qwen2.5-vl", tmp_path_factory.mktemp("engine") / "selection.onnx", 51)
    server = make_server(
        "qwen2.5-vl",
        "--mmtok-budget=10%",
        f"--mmtok-engine={file}",
        "--mmtok-onnxruntime-provider=CUDAExecutionProvider",
        flag,
        num_ranks=num_ranks,
    )
    with pytest.raises(ServerError, match=r"exit status 2"), server:
        pass
    log = server.log_text()
    assert log.count("CUDAExecutionProvider works on cuda tensors, these are on cpu") == 1
    assert "error: --mmtok-engine: " in log
    assert "Traceback" not in log
