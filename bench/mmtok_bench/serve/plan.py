"""Which servers run, what is measured on each, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.serve.presets import ImageKind, PrefixCache, ServedModel, ServePlan, Size

__all__ = ["OFF", "LoadCase", "Method", "Side", "Turn", "are_side_by_side", "plan_cases", "plan_turns", "sides_of"]

OFF = "off"
"""The budget of a server without the plugin's flags."""

Method = Literal["none", "mmtok", "downsample"]


@dataclass(frozen=True, slots=True)
class Side:
    """One server of a model: without the plugin's flags (`OFF`), or with a budget."""

    budget: str
    prefix_cache: PrefixCache

    @property
    def arguments(self) -> tuple[str, ...]:
        """What sets this server apart from the others of its model."""
        cache = () if self.prefix_cache == "on" else ("--disable-radix-cache",)
        return cache if self.budget == OFF else (*cache, *MixedBudget.parse(self.budget).flags)


@dataclass(frozen=True, slots=True)
class LoadCase:
    """One row's worth of requests.

    Args:
        side: The server that answers.
        method: How image tokens are saved: not at all, by the plugin, or by a smaller image.
        budget: What `--mmtok-budget` is (10%@0.5: with `--mmtok-encoder-scale`), or for a smaller image the budget that
            it is to be compared with.
        image_kind: What the images show.
        image_px: The image's size.
        sent_px: The size at which it is sent; `image_px` but for an image that the client makes smaller.
        concurrency: Requests under way at a time.
        questions: Questions about each image.
    """

    side: Side
    method: Method
    budget: str
    image_kind: ImageKind
    image_px: Size
    sent_px: Size
    concurrency: int
    questions: int = 1

    @property
    def workload(self) -> tuple[str, Size, int, int]:
        """What all sides are given alike."""
        return self.image_kind, self.image_px, self.concurrency, self.questions

    @property
    def is_unpruned(self) -> bool:
        """Whether the others of its workload are held against it."""
        return self.side.budget == OFF and self.method == "none"

    @property
    def request_fields(self) -> dict[str, Any]:
        """What its requests carry beside the chat: the plugin's method, where the server makes images smaller."""
        if self.method == "downsample" and self.side.budget != OFF:
            return {"mm_processor_kwargs": {"mmtok_method": "downsample"}}
        return {}


@dataclass(frozen=True, slots=True)
class Turn:
    """Cases that one server measures before another has its turn."""

    round_idx: int
    side: Side
    cases: tuple[LoadCase, ...]


def sides_of(model: ServedModel, prefix_cache: PrefixCache) -> list[Side]:
    """Returns the servers of a model: without the plugin, at budget `all`, and at each of its budgets."""
    budgets = dict.fromkeys([OFF, "all", *model.budgets])
    return [Side(budget, prefix_cache) for budget in budgets]


def plan_cases(
    model: ServedModel,
    plan: ServePlan,
    prefix_cache: PrefixCache,
    downsample: Callable[[Size, str], Size | None],
) -> list[LoadCase]:
    """Returns what is measured of a model, workload by workload, in each the sides in order.

    With the prefix cache on, or several questions an image, there are photographs only: the load generator's random
    images never come twice.

    Args:
        model: The model.
        plan: Loads and kinds of images.
        prefix_cache: Off or on.
        downsample: The size at which an image of this size has about the tokens that this budget keeps; its own where
            the client cannot send it so, but the plugin can make it; or None.
    """
    cases = []
    for kind, size_px, concurrency, questions in itertools.product(
        plan.image_kinds, model.sizes_px, plan.concurrencies, plan.questions_per_image
    ):
        if kind == "random" and (prefix_cache == "on" or questions > 1):
            continue
        sides = sides_of(model, prefix_cache)
        for side in sides:
            method: Method = "none" if side.budget in (OFF, "all") else "mmtok"
            cases.append(LoadCase(side, method, side.budget, kind, size_px, size_px, concurrency, questions))
        for side in sides[2:]:
            sent_px = downsample(size_px, side.budget)
            if sent_px is not None:
                asked = side if sent_px == size_px else sides[0]
                cases.append(LoadCase(asked, "downsample", side.budget, kind, size_px, sent_px, concurrency, questions))
    return cases


def are_side_by_side(plan: ServePlan, model: ServedModel) -> bool:
    """Returns whether all servers of a model run at once."""
    return plan.side_by_side or len(sides_of(model, "off")) <= model.most_at_once


def plan_turns(cases: Sequence[LoadCase], *, rounds: int, side_by_side: bool) -> list[Turn]:
    """Returns the order in which servers are asked: every other time backwards, so that drift hits all alike.

    Args:
        cases: What `plan_cases` returns.
        rounds: How often each case is measured.
        side_by_side: Take turns after every workload; otherwise after everything that a server is to measure, since
            another one has to be started for it.
    """
    turns: list[Turn] = []
    backwards = False
    for round_idx in range(rounds):
        workloads = [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.workload)]
        for group in workloads if side_by_side else [list(cases)]:
            sides = list(dict.fromkeys(case.side for case in group))
            for side in reversed(sides) if backwards else sides:
                turns.append(Turn(round_idx, side, tuple(case for case in group if case.side == side)))
            backwards = not backwards
    return turns
