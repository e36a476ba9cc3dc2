"""Result rows of served models: one a case, from everything that was seen while it was measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmtok_bench.results import CaseValue, ResultRow, make_row
from mmtok_bench.serve.load import LoadResult
from mmtok_bench.serve.plan import LoadCase
from mmtok_bench.serve.presets import ServedModel, ServePlan

__all__ = ["BENCH", "Sample", "known_case", "serve_row"]

BENCH = "serve"


@dataclass(frozen=True, slots=True)
class Sample:
    """One case in one round.

    Args:
        load: What the load generator saw.
        stages: What `stage_metrics` returns.
        peak_memory_bytes: What `PeakMemory` saw.
        max_total_tokens: Tokens of KV cache that the server has.
        image_tokens_in: Tokens of the image at its own size, unpruned.
        image_tokens_kept: Tokens of the image that the language model read.
    """

    load: LoadResult
    stages: Mapping[str, float]
    peak_memory_bytes: int
    max_total_tokens: int
    image_tokens_in: int
    image_tokens_kept: int


def known_case(plan: ServePlan, model: ServedModel, measured: LoadCase) -> dict[str, CaseValue]:
    """Returns the row's case as far as it is known before it is measured."""
    return {
        "model": model.name,
        "family": model.family,
        "weights": "dummy" if model.model_path is None else "checkpoint",
        "image_kind": measured.image_kind,
        "image_px": "x".join(map(str, measured.image_px)),
        "budget": measured.budget,
        "method": measured.method,
        "concurrency": measured.concurrency,
        "prefix_cache": measured.side.prefix_cache,
        "output_tokens": plan.output_tokens,
        "preset": plan.preset,
    }


def serve_row(plan: ServePlan, model: ServedModel, measured: LoadCase, samples: Sequence[Sample]) -> ResultRow:
    """Returns the row of a case: the requests of all rounds together.

    Args:
        plan: What is measured.
        model: Which model was served.
        measured: What was measured of it.
        samples: Of each round, at least one.
    """
    loads = [sample.load for sample in samples]
    prompt_tokens = [count for load in loads for count in load.prompt_tokens]
    text_tokens = round(float(np.mean(prompt_tokens)) - samples[0].image_tokens_kept)
    return make_row(
        BENCH,
        {**known_case(plan, model, measured), "text_tokens": text_tokens},
        "sglang",
        _latencies(loads) | _throughput(loads) | _stages(samples) | _tokens_and_memory(samples, plan),
        num_runs=sum(len(load.ttfts_s) for load in loads),
        device=torch.device(plan.device),
        num_threads=len(os.sched_getaffinity(0)),
    )


def _latencies(loads: Sequence[LoadResult]) -> dict[str, float]:
    ttfts_s = [ttft_s for load in loads for ttft_s in load.ttfts_s]
    itls_s = [itl_s for load in loads for answer in load.itls_s for itl_s in answer]
    e2es_s = [ttft_s + sum(answer) for load in loads for ttft_s, answer in zip(load.ttfts_s, load.itls_s, strict=True)]
    metrics = {}
    for name, times_s in (("ttft", ttfts_s), ("itl", itls_s), ("e2e", e2es_s)):
        # Answers of one token have no time between tokens.
        if times_s:
            for percent in (50, 90, 99):
                metrics[f"{name}_p{percent}_ms"] = 1e3 * float(np.percentile(times_s, percent))
    return metrics


def _throughput(loads: Sequence[LoadResult]) -> dict[str, float]:
    duration_s = sum(load.duration_s for load in loads)
    return {
        "requests_per_s": sum(len(load.ttfts_s) for load in loads) / duration_s,
        "input_tokens_per_s": sum(sum(load.prompt_tokens) for load in loads) / duration_s,
        "output_tokens_per_s": sum(load.output_tokens for load in loads) / duration_s,
        "duration_s": duration_s,
        "num_failed": sum(load.num_failed for load in loads),
    }


def _stages(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns each stage's milliseconds a request, means over the rounds; fallbacks are added up."""
    names = set.intersection(*(set(sample.stages) for sample in samples))
    metrics = {name: float(np.mean([sample.stages[name] for sample in samples])) for name in sorted(names)}
    if "num_fallbacks" in metrics:
        metrics["num_fallbacks"] *= len(samples)
    return metrics


def _tokens_and_memory(samples: Sequence[Sample], plan: ServePlan) -> dict[str, float]:
    prompt_tokens = [count for sample in samples for count in sample.load.prompt_tokens]
    # The last token of an answer is never read.
    kv_tokens = float(np.mean(prompt_tokens)) + plan.output_tokens - 1
    first = samples[0]
    return {
        "image_tokens_in": first.image_tokens_in,
        "image_tokens_kept": first.image_tokens_kept,
        "kv_tokens_per_request": kv_tokens,
        "peak_memory_bytes": max(sample.peak_memory_bytes for sample in samples),
        "max_requests_at_once": int(first.max_total_tokens // kv_tokens),
    }
