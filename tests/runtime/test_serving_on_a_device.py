"""What `make gpu-check` runs on a GPU, on the CPU: the same code, with tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtok_bench.results import read_rows
from mmtok_bench.server import make_server
from mmtok_gpu_check import served_checks
from tests.runtime import device_logprobs
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import checkpoint, judge_of
from tests.runtime.hand_pruned import HandPruned
from tests.runtime.serving import Served


def test_a_new_server_is_held_against_the_judge_and_asked_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    # The encoder takes a core over 1 s for an image of the size that is measured on a GPU.
    monkeypatch.setattr(served_checks, "_SIZE_PX", (336, 224))
    flags = ("--mmtok-budget=10%", "--enable-cache-report", "--enable-metrics")
    with make_server(checkpoint("qwen2.5-vl"), "qwen2.5-vl", *flags) as server:
        checked = served_checks.check_server(server, num_requests=12, concurrency=4, max_side_px=300)
        compared = device_logprobs.measure(Served("qwen2.5-vl", server, judge_of("qwen2.5-vl")))
    assert checked["num_failed"] == 0
    assert 0 < checked["later_ttft_p50_ms"] <= checked["later_ttft_p90_ms"]
    assert checked["first_ttft_ms"] > 0
    parts = ("image_decode_ms", "image_preprocess_ms", "image_hash_ms", "image_transport_ms", "vision_encoder_ms")
    assert 0 < sum(checked[name] for name in parts) < checked["later_ttft_p90_ms"]
    # Nothing is compiled on a CPU: that is not said to be 0.
    assert "triton_compiles" not in checked
    assert compared["max_error"] < 1e-4
    assert set(compared) == {"num_correct_drafts", "max_error", "question_error", "position_error"}
    assert device_logprobs.is_right("qwen2.5-vl", compared)


def test_a_row_is_what_the_gpu_check_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"max_error": 1e-5, "question_error": 5e-5}
    monkeypatch.setattr(device_logprobs, "measure", lambda served, chats, in_half, more: measured)
    monkeypatch.setattr(Served, "metric", lambda served, name: 0.0)
    monkeypatch.setattr("mmtok_bench.server.SglangServer.start", lambda server: None)
    monkeypatch.setattr("mmtok_bench.server.SglangServer.wait_until_ready", lambda server: None)
    arguments = [str(tmp_path), "--family=llava-1.5", "--device=cpu"]
    # The mistake's is not ten times as large.
    assert device_logprobs.main(arguments) == 1
    (row,) = read_rows(tmp_path / "device-logprobs.jsonl")
    assert dict(row.case) == {"family": "llava-1.5", "prefill": "eager", "encoder": "eager"}
    assert dict(row.metrics) == {**measured, "num_encoder_replays": 0, "num_prefills": 0, "num_replayed": 0}


def test_float16_is_held_against_the_models_own_rounding() -> None:
    """As measured on an H200 for Qwen3-VL, and with the difference of the model itself from the host."""
    rounding = {"max_error": 7.2e-3, "question_error": 0.61, "position_error": 0.19, "half_error": 5.5e-3}
    assert device_logprobs.is_right("qwen3-vl", rounding)
    assert not device_logprobs.is_right("qwen3-vl", {**rounding, "half_error": 3e-3})
    assert not device_logprobs.is_right("qwen3-vl", {**rounding, "question_error": 0.03})
    wrong_positions = {**rounding, "position_error": 0.03}
    assert not device_logprobs.is_right("qwen3-vl", wrong_positions)
    assert device_logprobs.is_right("qwen3.5", wrong_positions)
    # In float32 there is no such excuse.
    assert not device_logprobs.is_right(
        "qwen3-vl", {"max_error": 7.2e-3, "question_error": 0.61, "position_error": 0.05}
    )


def test_the_model_in_float16_rounds() -> None:
    judge = judge_of("qwen2.5-vl")
    in_half = HandPruned("qwen2.5-vl", checkpoint("qwen2.5-vl"))
    in_half.model.half()
    chat = Chat.ask(small("coffee"), "What is in this cup?")
    pruned = judge.prune(judge.prompt(chat.for_template()), chat.images, chat.guidance, 0.1)
    tokens = [17, 5]
    answer = {"output_token_logprobs": [(0.0, token, None) for token in tokens]}
    answer["output_top_logprobs"] = [[(0.0, 3, None)], [(0.0, 4, None)]]  # type: ignore[list-item]
    found = judge.max_error(pruned, device_logprobs._answer_of(in_half, pruned, answer))
    assert 1e-6 < found < 2e-2
