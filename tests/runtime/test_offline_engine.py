"""The budget and the encoder scale as arguments of sgl.Engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image

from tests.conftest import RunPython
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import CHECKPOINTS, checkpoint, judge_of
from tests.runtime.serving import LOGPROB_TOLERANCE

PROGRAM = Path(__file__).with_name("offline_engine.py")


@pytest.fixture
def run_engine(run_python: RunPython, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CompletedProcess[str]]:
    def run(budget: str, image: Path, prompt: str) -> CompletedProcess[str]:
        model_path = checkpoint("qwen2.5-vl")
        monkeypatch.chdir(CHECKPOINTS)
        return run_python(str(PROGRAM), str(model_path), str(image), prompt, budget)

    return run


@pytest.mark.slow
def test_engine_with_a_budget(run_engine: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    chat = Chat.ask(small("coffee"), "What is in this cup?")
    image = tmp_path / "coffee.png"
    small("coffee").save(image)
    judge = judge_of("qwen2.5-vl")
    prompt = judge.prompt(chat.for_template())
    run = run_engine("10%", image, prompt)
    results = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == 4, run.stderr[-3000:]
    # First the server's budget and scale, then three ways to ask for others.
    smaller = small("coffee").resize((168, 112), Image.Resampling.BICUBIC)
    read = [([smaller], 0.1), *[(chat.images, 0.5)] * 3]
    for result, (images, budget) in zip(results, read, strict=True):
        account = json.loads(result.removeprefix("RESULT "))
        pruned = judge.prune(prompt, images, chat.guidance, budget)
        assert account["prompt_tokens"] == len(pruned.embeddings)
        assert account["mmtok"][0]["image_tokens_kept"] == pruned.num_image_tokens
        assert judge.max_error(pruned, account) < LOGPROB_TOLERANCE
    assert "REFUSED mm_processor_kwargs.mmtok_budget: budget 'ten' is not understood" in run.stdout


@pytest.mark.slow
def test_engine_refuses_a_bad_budget(run_engine: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    run = run_engine("150%", tmp_path / "none.png", "hello")
    assert run.returncode != 0
    assert "budget '150%' is not understood: expected a whole number of tokens (64)" in run.stderr
