"""SGLang's real processors, without a server: what is not pruned stays SGLang's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtok_bench.families import FamilyName
from tests.conftest import RunPython
from tests.runtime.conftest import checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "num_spans"), [("qwen2.5-vl", 1), ("qwen3-vl", 2)])
def test_a_video_is_refused_with_a_budget_and_a_broken_image_is_its_requests_alone(
    name: FamilyName, num_spans: int, run_python: RunPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-VL's has a span for each pair of frames, with their time between."""
    monkeypatch.chdir(Path(__file__).parents[2])
    run = run_python("-m", "tests.runtime.processed_requests", str(checkpoint(name)))
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stderr[-3000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert "brings a video, which MMTok does not prune (it prunes " in result["refusal"]
    assert result["refusal"].endswith('send mm_processor_kwargs={"mmtok_budget": "all"} to have it read unpruned')
    assert (result["num_spans"], result["is_planned"], result["is_sglangs"]) == (num_spans, False, True)
    # An image goes on as 8-bit pixels, whichever way SGLang prepares it.
    assert result["image"] == ["torch.uint8", True]
    # The other request with the same image waits for nothing, and does not fail.
    assert result["prepares_what_it_misses"]
    assert "image file is truncated" in result["error_of_the_other"]
    assert result["shares_pixels"]
    # Many images keep no event loop waiting.
    assert result["threads"] == ["MainThread", "mmtok-processor_0"]
    # As SGLang decodes a grey JPEG on a GPU.
    assert result["is_grey_alike"]
