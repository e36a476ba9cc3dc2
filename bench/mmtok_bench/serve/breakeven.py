"""Where a budget pays and where it does not, said from measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmtok_bench.results import ResultRow

__all__ = ["Gain", "break_even", "gains_of"]

_NEEDED = {"ttft_p50_ms", "requests_per_s", "image_tokens_in"}
_WORKLOAD = ("model", "image_kind", "image_px", "concurrency", "prefix_cache")


@dataclass(frozen=True, slots=True)
class Gain:
    """What a budget gains over the server without the plugin, on one workload.

    Args:
        model: The model's name.
        budget: What `--mmtok-budget` was.
        prefix_cache: Off or on.
        image_tokens: Of the unpruned image.
        concurrency: Requests under way at a time.
        ttft: How many times shorter the median time to first token is.
        throughput: How many times as many requests a second are answered.
    """

    model: str
    budget: str
    prefix_cache: str
    image_tokens: int
    concurrency: int
    ttft: float
    throughput: float

    @property
    def pays(self) -> bool:
        """Neither the first token comes later nor fewer requests are answered, and one of them is better."""
        return min(self.ttft, self.throughput) >= 1 and max(self.ttft, self.throughput) > 1


def gains_of(rows: Iterable[ResultRow]) -> list[Gain]:
    """Returns the gain of each row of a pruning server whose workload was also measured without the plugin.

    A row that lacks one of the figures that are compared says nothing of it.
    """
    rows = [row for row in rows if row.metrics.keys() >= _NEEDED]
    without = {_workload(row.case): row for row in rows if row.case["budget"] == "off"}
    gains = []
    for row in rows:
        base = without.get(_workload(row.case))
        if row.case["method"] != "mmtok" or base is None:
            continue
        gains.append(
            Gain(
                model=str(row.case["model"]),
                budget=str(row.case["budget"]),
                prefix_cache=str(row.case["prefix_cache"]),
                image_tokens=int(row.metrics["image_tokens_in"]),
                concurrency=int(row.case["concurrency"]),
                ttft=base.metrics["ttft_p50_ms"] / row.metrics["ttft_p50_ms"],
                throughput=row.metrics["requests_per_s"] / base.metrics["requests_per_s"],
            )
        )
    return gains


def break_even(rows: Iterable[ResultRow]) -> list[str]:
    """Returns a sentence for each model, prefix cache and budget: where it pays, and the flag to set where not.

    The flag's number is the smallest measured image from which on pruning pays at every load, so it is on the safe
    side by up to the distance to the next smaller image that was measured.
    """
    groups: dict[tuple[str, str, str], list[Gain]] = {}
    for gain in gains_of(rows):
        groups.setdefault((gain.model, gain.prefix_cache, gain.budget), []).append(gain)
    return [
        f"{model}, prefix cache {prefix_cache}, budget {budget}: {_sentence(gains)}"
        for (model, prefix_cache, budget), gains in groups.items()
    ]


def _workload(case: Mapping[str, int | float | str]) -> tuple[int | float | str, ...]:
    return tuple(case.get(name, "") for name in _WORKLOAD)


def _sentence(gains: Sequence[Gain]) -> str:
    losses = [gain for gain in gains if not gain.pays]
    measured = f"{_range(gain.image_tokens for gain in gains)} image tokens, concurrency " + _range(
        gain.concurrency for gain in gains
    )
    if not losses:
        return f"it paid everywhere measured ({measured})."
    worst = min(losses, key=lambda gain: min(gain.ttft, gain.throughput))
    example = (
        f"the worst is {worst.image_tokens} image tokens at concurrency {worst.concurrency}: time to first token "
        f"{worst.ttft:.2f}x as good, requests a second {worst.throughput:.2f}x"
    )
    if len(losses) == len(gains):
        return f"it paid nowhere measured ({measured}); {example}. Serve this without a budget."
    largest_loss = max(gain.image_tokens for gain in losses)
    larger = [gain.image_tokens for gain in gains if gain.image_tokens > largest_loss]
    if larger:
        return (
            f"below {min(larger)} image tokens it does not pay at every load measured; {example}. "
            f"Set --mmtok-min-tokens-in {min(larger)}."
        )
    loads = sorted({gain.concurrency for gain in losses})
    return (
        f"it does not pay at concurrency {', '.join(map(str, loads))} with the largest images measured "
        f"({largest_loss} tokens), so no --mmtok-min-tokens-in helps there; {example}."
    )


def _range(values: Iterable[int]) -> str:
    numbers = sorted(set(values))
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
