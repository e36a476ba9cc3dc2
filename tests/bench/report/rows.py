"""Made-up rows of every bench: schema-valid, and of no machine that exists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mmtok_bench.results import CaseValue, ResultRow, append_row

CPU = "Made-up CPU, 2 cores"
GPU = "Made-up GPU"
OLD, NEW = "aaaaaaa", "bbbbbbb"


def row(
    bench: str,
    case: Mapping[str, CaseValue],
    metrics: Mapping[str, float],
    *,
    backend: str = "sglang",
    device: str = CPU,
    commit: str = NEW,
    time: str = "2026-11-21T10:00:00+00:00",
) -> ResultRow:
    versions = {"python": "3.11.7", "mmtok-deploy": "0.1.0", "torch": "2.14.1", "sglang": "0.5.23"}
    return ResultRow(bench, case, backend, metrics, 20, device, 2, versions, commit, time)


def serve_case(budget: str, method: str, **changes: CaseValue) -> dict[str, CaseValue]:
    case: dict[str, CaseValue] = {
        "preset": "cpu",
        "model": "qwen2.5-vl-0.5b",
        "family": "qwen2.5-vl",
        "weights": "dummy",
        "image_kind": "photograph",
        "image_px": "1008x672",
        "budget": budget,
        "method": method,
        "concurrency": 1,
        "prefix_cache": "off",
        "text_tokens": 30,
        "output_tokens": 16,
    }
    return {**case, **changes}


def serve_metrics(tokens_in: int, kept: int, load: int, selection_ms: float) -> dict[str, float]:
    vision_ms, prefill_ms = 0.11 * tokens_in, 20 + 0.9 * kept
    ttft_ms = (vision_ms + prefill_ms + selection_ms + 12) * (0.4 + 0.6 * load)
    decode_ms = 16 * (18 + 0.004 * kept)
    return {
        "ttft_p50_ms": ttft_ms,
        "ttft_p90_ms": 1.2 * ttft_ms,
        "ttft_p99_ms": 1.5 * ttft_ms,
        "itl_p50_ms": decode_ms / 16,
        "e2e_p50_ms": ttft_ms + decode_ms,
        "requests_per_s": 1e3 * load / (ttft_ms + decode_ms),
        "output_tokens_per_s": 16e3 * load / (ttft_ms + decode_ms),
        "vision_encoder_ms": vision_ms,
        "selection_ms": selection_ms,
        "language_prefill_ms": prefill_ms,
        "image_tokens_in": tokens_in,
        "image_tokens_kept": kept,
        "kv_tokens_per_request": kept + 46,
        "peak_memory_bytes": 2.5 * 2**30 + 2**18 * kept,
        "max_requests_at_once": 60000 // (kept + 46),
        "num_failed": 0,
        "duration_s": 30.5,
    }


def serve_rows(
    device: str = CPU, model: str = "qwen2.5-vl-0.5b", commit: str = NEW, speed: float = 1
) -> list[ResultRow]:
    """Returns two image sizes x three loads x the unpruned server, two budgets, each with its downsampled image."""
    rows = []
    for px, num_tokens in (("1008x672", 864), ("504x336", 216)):
        for load in (1, 4, 16):
            tenth = num_tokens // 10
            variants = [("off", "none", num_tokens, num_tokens, 0), ("all", "none", num_tokens, num_tokens, 0)]
            for budget, kept in (("20%", 2 * tenth), ("10%", tenth)):
                variants.append((budget, "mmtok", num_tokens, kept, 6))
                variants.append((budget, "downsample", kept + 2, kept + 2, 0))
            for budget, method, tokens_in, kept, selection_ms in variants:
                metrics = serve_metrics(tokens_in, kept, load, selection_ms)
                metrics = {name: value / speed if name.endswith("_ms") else value for name, value in metrics.items()}
                case = serve_case(budget, method, image_px=px, concurrency=load, model=model)
                rows.append(row("serve", case, metrics, device=device, commit=commit))
    return rows


def selector_rows(device: str = CPU, commit: str = NEW, speed: float = 1) -> list[ResultRow]:
    rows = []
    for num_tokens, num_picks in ((2880, 160), (2880, 80), (576, 32), (576, 16)):
        case = {"num_tokens": num_tokens, "num_picks": num_picks, "num_words": 24, "batch": 1}
        for backend, slower in (("dense", 4.0), ("lazy", 1.0)):
            middle = slower * (num_tokens * num_picks / 4000 + 2) / speed
            latencies = {"latency_p20_ms": 0.9 * middle, "latency_p50_ms": middle, "latency_p80_ms": 1.3 * middle}
            rows.append(row("selector", case, latencies, backend=backend, device=device, commit=commit))
    return rows


def write(path: Path, rows: Iterable[ResultRow]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for each in rows:
        append_row(path, each)
    return path
