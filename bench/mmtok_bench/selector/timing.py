"""Synthetic features in the shapes of LLaVA-7B, timing of calls in turns, and lower bounds of a selection's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from mmtok_deploy.problem import SelectionProblem
from mmtok_deploy.synthetic import synthetic_features

__all__ = ["NUM_WORDS", "make_problem", "measure_bandwidth", "measure_floors_ms", "time_in_turns"]

NUM_WORDS = 24

# LLaVA-1.5 and LLaVA-NeXT 7B: the language model's width, and CLIP ViT-L's.
_VISION_WIDTH, _KEY_WIDTH = 4096, 1024
_COPY_BYTES = 256 * 2**20


def make_problem(num_tokens: int, num_picks: int, seed: int, device: torch.device) -> SelectionProblem:
    """Returns synthetic features in the shapes of LLaVA-7B, float32 on the device."""
    vision, keys, text = (
        feature.to(device)
        for feature in synthetic_features(num_tokens, NUM_WORDS, _VISION_WIDTH, _KEY_WIDTH, seed=seed)
    )
    return SelectionProblem(vision, keys, text, num_picks)


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    num_runs: int,
    device: torch.device,
    on_run: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Returns the milliseconds of `num_runs` runs of each call, after one run that is not timed.

    The calls take turns, in reverse order every other round, so that other load on the machine affects all alike.

    Args:
        calls: What to time, by name.
        num_runs: Number of rounds.
        device: Where the calls compute; a run ends when the device has finished.
        on_run: Called after each timed run.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for round_idx in range(num_runs):
        for name in list(calls)[:: 1 if round_idx % 2 == 0 else -1]:
            times_ms[name].append(_time_ms(calls[name], device))
            on_run()
    return times_ms


def measure_bandwidth(device: torch.device) -> float:
    """Returns the device's memory bandwidth in bytes per second, by the fastest of 10 copies of 256 MiB."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    best_ms = min(_time_ms(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * _COPY_BYTES / (best_ms / 1e3)


def measure_floors_ms(
    num_tokens: int, num_picks: int, batch: int, bandwidth: float, device: torch.device
) -> dict[str, float]:
    """Returns lower bounds of the time of an exact greedy selection, in milliseconds.

    `bandwidth_floor_ms`: the features read once and C written and read once, at `bandwidth` bytes a second.
    `chain_floor_ms`: K times an argmax over the gains and a maximum with a column of C, one after another.
    """
    num_rows = NUM_WORDS + num_tokens
    num_bytes = num_tokens * 4 * (_VISION_WIDTH + _KEY_WIDTH) + 2 * 4 * num_tokens * num_rows
    gains, covered, column = (torch.rand(size, device=device) for size in (num_tokens, num_rows, num_rows))

    def hundred_picks() -> None:
        for _ in range(100):
            gains.argmax()
            torch.maximum(covered, column, out=covered)

    pick_ms = min(_time_ms(hundred_picks, device) for _ in range(10)) / 100
    return {"bandwidth_floor_ms": 1e3 * batch * num_bytes / bandwidth, "chain_floor_ms": num_picks * pick_ms}


def _time_ms(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
