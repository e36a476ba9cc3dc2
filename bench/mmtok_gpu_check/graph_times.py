"""Times of the selection replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from mmtok_bench.results import CaseValue, ResultRow, make_latency_row
from mmtok_bench.selector.timing import make_problem
from mmtok_deploy.backends import get_backend
from mmtok_deploy.config import SelectionConfig

__all__ = ["time_graphs"]


def time_graphs() -> list[ResultRow]:
    """Returns a row for each shape and dtype."""
    device = torch.device("cuda")
    select = get_backend("triton", device)
    rows = []
    for num_tokens, num_picks, batch in ((2880, 160, 1), (576, 32, 1), (576, 64, 1), (576, 64, 32)):
        for dtype in (torch.bfloat16, torch.float32):
            problems = [
                replace(problem, **{name: getattr(problem, name).to(dtype) for name in ("vision", "keys", "text")})
                for problem in (make_problem(num_tokens, num_picks, seed, device) for seed in range(batch))
            ]
            times_ms = _replays_ms(lambda problems=problems: select(problems, SelectionConfig()))  # type: ignore[misc]
            case: dict[str, CaseValue] = {"num_tokens": num_tokens, "num_picks": num_picks, "batch": batch}
            case["dtype"] = str(dtype).removeprefix("torch.")
            rows.append(make_latency_row("selector-graph", case, "triton", times_ms, device))
    return rows


def _replays_ms(call: Callable[[], object]) -> list[float]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times_ms = []
    for run in range(33):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if run >= 3:
            times_ms.append(start.elapsed_time(end))
    return times_ms
