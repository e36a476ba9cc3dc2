from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmtok_bench.results import append_row, read_rows
from mmtok_bench.serve.load import LoadResult
from mmtok_bench.serve.plan import LoadCase
from mmtok_bench.serve.rows import Sample, median_interval, serve_row
from tests.bench.serve.made_up_rows import MODEL, PLAN, load_case, row, sample

# (0.1, 0.3) s to the first token, then 10 and 30 ms; 2 s in all.
FIRST = LoadResult((0.1, 0.3), ((0.01, 0.03), (0.01, 0.03)), (140, 140), 6, 2.0)
SECOND = LoadResult((0.2,), ((0.02, 0.02),), (140,), 3, 1.0, (1,), num_failed=1, first_error="refused")


def test_rounds_are_one_row() -> None:
    stages = ({"selection_ms": 4.0, "num_fallbacks": 1.0}, {"selection_ms": 6.0, "num_fallbacks": 2.0})
    samples = {
        number: Sample(load, stage, peak, 1000, 1008, 100)
        for number, (load, stage, peak) in enumerate(zip((FIRST, SECOND), stages, (10, 30), strict=True))
    }
    made = serve_row(PLAN, MODEL, load_case("mmtok", "10%"), samples, {})
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
        "questions_per_image": 1,
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
    shared = replace(one_token, peak_memory_bytes=None)
    metrics = serve_row(PLAN, MODEL, load_case("none", "off"), {0: shared}, {0: shared}).metrics
    assert not any(name.startswith("itl") for name in metrics)
    assert metrics["e2e_p50_ms"] == metrics["ttft_p50_ms"]
    assert "peak_memory_bytes" not in metrics


def rounds_of(measured: LoadCase, ttfts_ms: Sequence[float]) -> dict[int, Sample]:
    return {number: sample(measured, ttft, duration_s=ttft / 500) for number, ttft in enumerate(ttfts_ms)}


def test_a_gain_is_the_median_of_the_rounds_ratios_with_its_interval() -> None:
    off, pruned = load_case("none", "off"), load_case("mmtok", "10%")
    # From the third round on the machine is three times as slow, for both servers: the rounds' ratios leave it out.
    unpruned = rounds_of(off, [200, 210, 600, 630, 600])
    metrics = serve_row(PLAN, MODEL, pruned, rounds_of(pruned, [100, 100, 300, 300, 250]), unpruned).metrics
    assert metrics["ttft_p50_gain"] == pytest.approx(2.1)
    assert (metrics["ttft_p50_gain_low"], metrics["ttft_p50_gain_high"]) == pytest.approx((2.0, 2.4))
    assert metrics["requests_per_s_gain"] == pytest.approx(2.1)
    assert metrics["num_rounds"] == 5
    # A round that one of both lacks is no pair.
    del unpruned[4]
    metrics = serve_row(PLAN, MODEL, pruned, rounds_of(pruned, [100, 100, 300, 300, 250]), unpruned).metrics
    assert metrics["ttft_p50_gain_high"] == pytest.approx(2.1)
    assert not any("gain" in name for name in serve_row(PLAN, MODEL, off, unpruned, unpruned).metrics)
    one_round = serve_row(PLAN, MODEL, pruned, rounds_of(pruned, [100]), unpruned)
    assert not any("gain" in name for name in one_round.metrics)


def test_an_interval_narrows_with_more_rounds() -> None:
    draw = np.random.default_rng(1)
    few, many = (median_interval(draw.normal(2, 0.1, number).tolist()) for number in (5, 100))
    assert few[0] < 2 < few[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2


def test_later_questions_about_an_image_are_told_from_the_first() -> None:
    measured = replace(load_case("mmtok", "10%"), questions=3)
    load = LoadResult((0.5, 0.1, 0.2), ((), (), ()), (140,) * 3, 3, 1.0, (0, 1, 2))
    one = replace(sample(measured, 100), load=load, is_later=[False, True, True])
    made = serve_row(replace(PLAN, images_in_turn=2), MODEL, measured, {0: one}, {})
    assert made.metrics["ttft_first_p50_ms"] == pytest.approx(500)
    assert made.metrics["ttft_later_p50_ms"] == pytest.approx(150)
    assert (made.case["questions_per_image"], made.case["images_in_turn"]) == (3, 2)
    assert "images_in_turn" not in row("none", "off", 100).case


def test_arguments_of_the_users_are_named() -> None:
    plan = replace(PLAN, user_arguments=("--tokenizer-worker-num", "4"))
    measured = load_case("none", "off")
    made = serve_row(plan, MODEL, measured, {0: sample(measured, 100)}, {})
    assert made.case["server_arguments"] == "--tokenizer-worker-num 4"


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [row("none", "off", 300), row("mmtok", "10%", 100)]
    for each in written:
        append_row(tmp_path / "rows.jsonl", each)
    assert read_rows(tmp_path / "rows.jsonl") == written
