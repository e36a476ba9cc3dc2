from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmtok_bench.results import append_row, read_rows
from mmtok_bench.serve.load import LoadResult
from mmtok_bench.serve.rows import Sample, serve_row
from tests.bench.serve.made_up_rows import MODEL, PLAN, load_case, row, sample

# (0.1, 0.3) s to the first token, then 10 and 30 ms; 2 s in all.
FIRST = LoadResult((0.1, 0.3), ((0.01, 0.03), (0.01, 0.03)), (140, 140), 6, 2.0)
SECOND = LoadResult((0.2,), ((0.02, 0.02),), (140,), 3, 1.0, num_failed=1, first_error="refused")


def test_rounds_are_one_row() -> None:
    stages = ({"selection_ms": 4.0, "num_fallbacks": 1.0}, {"selection_ms": 6.0, "num_fallbacks": 2.0})
    samples = [
        Sample(load, stage, peak, 1000, 1008, 100)
        for load, stage, peak in zip((FIRST, SECOND), stages, (10, 30), strict=True)
    ]
    made = serve_row(PLAN, MODEL, load_case("mmtok", "10%"), samples)
    assert made.num_runs == 3
    assert made.case == {
        "model": "qwen2.5-vl-0.5b",
        "family": "qwen2.5-vl",
        "weights": "dummy",
        "image_kind": "photograph",
        "image_px": "1008x784",
        "budget": "10%",
        "method": "mmtok",
        "concurrency": 1,
        "prefix_cache": "off",
        "text_tokens": 40,
        "output_tokens": 3,
        "preset": "cpu",
    }
    expected = {
        "ttft_p50_ms": 200,
        "ttft_p90_ms": 280,
        "itl_p50_ms": 20,
        "e2e_p50_ms": 240,
        "requests_per_s": 1,
        "input_tokens_per_s": 140,
        "output_tokens_per_s": 3,
        "duration_s": 3,
        "num_failed": 1,
        "selection_ms": 5,
        "num_fallbacks": 3,
        "image_tokens_in": 1008,
        "image_tokens_kept": 100,
        "kv_tokens_per_request": 142,
        "max_requests_at_once": 7,
        "peak_memory_bytes": 30,
    }
    assert {name: made.metrics[name] for name in expected} == pytest.approx(expected)


def test_what_was_not_measured_is_absent() -> None:
    without = row("none", "off", 100)
    assert not {"vision_encoder_ms", "selection_ms", "language_prefill_ms", "num_fallbacks"} & set(without.metrics)
    one_token = replace(sample(load_case("none", "off"), 100), load=replace(FIRST, itls_s=((), ())))
    metrics = serve_row(PLAN, MODEL, load_case("none", "off"), [one_token]).metrics
    assert not any(name.startswith("itl") for name in metrics)
    assert metrics["e2e_p50_ms"] == metrics["ttft_p50_ms"]


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [row("none", "off", 300), row("mmtok", "10%", 100)]
    for each in written:
        append_row(tmp_path / "rows.jsonl", each)
    assert read_rows(tmp_path / "rows.jsonl") == written
