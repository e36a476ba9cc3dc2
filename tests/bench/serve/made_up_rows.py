"""Rows as a run writes them, from figures that were made up."""

from __future__ import annotations

from dataclasses import replace

from mmtok_bench.results import ResultRow
from mmtok_bench.serve.load import LoadResult
from mmtok_bench.serve.plan import LoadCase, Method, Side
from mmtok_bench.serve.presets import SERVE_PRESETS, Size
from mmtok_bench.serve.rows import Sample, serve_row

PLAN = replace(SERVE_PRESETS["cpu"], output_tokens=3, rounds=1)
MODEL = PLAN.models[0]
NUM_TOKENS = {(1008, 784): 1008, (448, 448): 256, (224, 224): 64}


def load_case(method: Method, budget: str, *, size_px: Size = (1008, 784), concurrency: int = 1) -> LoadCase:
    side = Side("off" if method == "downsample" else budget, "off")
    sent_px = (336, 252) if method == "downsample" else size_px
    return LoadCase(side, method, budget, "photograph", size_px, sent_px, concurrency)


def sample(measured: LoadCase, ttft_ms: float, *, duration_s: float = 2.0) -> Sample:
    num_tokens = NUM_TOKENS[measured.image_px]
    kept = num_tokens if measured.method == "none" else num_tokens // 10
    load = LoadResult((ttft_ms / 1e3,) * 2, ((0.01, 0.03),) * 2, (kept + 40,) * 2, 6, duration_s)
    stages = {} if measured.side.budget == "off" else {"selection_ms": 5.0}
    return Sample(load, stages, 1000, 16384, num_tokens, kept)


def row(method: Method, budget: str, ttft_ms: float, *, size_px: Size = (1008, 784), concurrency: int = 1) -> ResultRow:
    measured = load_case(method, budget, size_px=size_px, concurrency=concurrency)
    # Requests a second follow the time to first token: one at a time.
    samples = {0: sample(measured, ttft_ms, duration_s=ttft_ms / 500)}
    return serve_row(PLAN, MODEL, measured, samples, samples)
