"""What `make gpu-check` runs on a GPU, on the CPU: the same code, with tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtok_bench import served_checks
from mmtok_bench.results import read_rows
from mmtok_bench.server import make_server
from tests.runtime import device_logprobs
from tests.runtime.conftest import checkpoint, judge_of
from tests.runtime.serving import Served


def test_a_new_server_is_held_against_the_judge_and_asked_at_random() -> None:
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
    assert compared["control_error"] > 10 * compared["max_error"]


def test_a_row_is_what_the_gpu_check_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"max_error": 1e-5, "control_error": 5e-5}
    monkeypatch.setattr(device_logprobs, "measure", lambda served, chats: measured)
    monkeypatch.setattr("mmtok_bench.server.SglangServer.start", lambda server: None)
    monkeypatch.setattr("mmtok_bench.server.SglangServer.wait_until_ready", lambda server: None)
    arguments = [str(tmp_path), "--family=llava-1.5", "--device=cpu"]
    # The control is not ten times as far away.
    assert device_logprobs.main(arguments) == 1
    (row,) = read_rows(tmp_path / "device-logprobs.jsonl")
    assert dict(row.case) == {"family": "llava-1.5", "prefill": "eager"}
    assert dict(row.metrics) == {**measured, "num_prefills": 0, "num_replayed": 0}
