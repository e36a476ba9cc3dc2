"""The budget and the encoder scale as arguments of sgl.Engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmtok_bench.server import cpu_environment
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import CHECKPOINTS, checkpoint, judge_of
from tests.runtime.serving import LOGPROB_TOLERANCE

PROGRAM = Path(__file__).with_name("offline_engine.py")


def _run(budget: str, image: Path, prompt: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), str(checkpoint("qwen2.5-vl")), str(image), prompt, budget],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | cpu_environment(),
        cwd=CHECKPOINTS,
    )


@pytest.mark.slow
def test_engine_with_a_budget(tmp_path: Path) -> None:
    chat = Chat.ask(small("coffee"), "What is in this cup?")
    image = tmp_path / "coffee.png"
    small("coffee").save(image)
    judge = judge_of("qwen2.5-vl")
    prompt = judge.prompt(chat.for_template())
    run = _run("10%", image, prompt)
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
def test_engine_refuses_a_bad_budget(tmp_path: Path) -> None:
    run = _run("150%", tmp_path / "none.png", "hello")
    assert run.returncode != 0
    assert "budget '150%' is not understood: expected a whole number of tokens (64)" in run.stderr
