"""The plan of a run: servers, cases to measure, and their order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.serve.presets import ImageKind, PrefixCache, ServedModel, ServePlan, Size
from mmtok_deploy.methods import MethodName

__all__ = ["OFF", "LoadCase", "Method", "Side", "Turn", "are_side_by_side", "plan_cases", "plan_turns", "sides_of"]

OFF = "off"
"""The budget of a server without the plugin's flags."""

Method = Literal["none"] | MethodName


@dataclass(frozen=True, slots=True)
class Side:
    """One server of a model, without the plugin's flags (`OFF`) or with a budget."""

    budget: str
    prefix_cache: PrefixCache

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments in which this server differs from the others of its model."""
        # If images repeat, all servers cache preprocessed images, which is the default only for a Qwen with a budget.
        cache = ("--mm-preprocess-cache-size-mb=256",) if self.prefix_cache == "on" else ("--disable-radix-cache",)
        return cache if self.budget == OFF else (*cache, *MixedBudget.parse(self.budget).flags)


@dataclass(frozen=True, slots=True)
class LoadCase:
    """The requests of one row.

    Args:
        side: The server that answers; one at `all` is asked for another budget by the request.
        method: How the number of image tokens is reduced: not at all, by a method of the plugin, or by a smaller image
            ("downsample").
        budget: Value of `--mmtok-budget` (10%@0.5: with `--mmtok-encoder-scale`); for a smaller image, the budget that
            it is compared with.
        image_kind: What the images show.
        image_px: Size of the image.
        sent_px: Size at which it is sent; `image_px` unless the client makes the image smaller.
        concurrency: Requests at a time.
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
        """What all sides have in common."""
        return self.image_kind, self.image_px, self.concurrency, self.questions

    @property
    def is_unpruned(self) -> bool:
        """Whether the other cases of its workload are compared with this one."""
        return self.side.budget == OFF and self.method == "none"

    @property
    def request_fields(self) -> dict[str, Any]:
        """Further fields of its requests: a budget and a method other than the server's."""
        fields: dict[str, Any] = {}
        if self.side.budget not in (OFF, self.budget):
            fields |= MixedBudget.parse(self.budget).fields
        if self.method not in ("none", "mmtok") and self.side.budget != OFF:
            fields["mmtok_method"] = self.method
        return {"mm_processor_kwargs": fields} if fields else {}

    @property
    def is_of_another_method(self) -> bool:
        """Whether another method than MMTok selects its tokens."""
        return self.method not in ("none", "mmtok", "downsample")

    @property
    def has_own_images(self) -> bool:
        """Whether it shares its server with other cases, and so has images whose features the server has not cached."""
        return self.is_of_another_method or self.side.budget not in (OFF, self.budget)


@dataclass(frozen=True, slots=True)
class Turn:
    """Cases that are measured on one server before it is another server's turn."""

    round_idx: int
    side: Side
    cases: tuple[LoadCase, ...]


def sides_of(model: ServedModel, prefix_cache: PrefixCache, *, one_server: bool = False) -> list[Side]:
    """Returns the servers of a model: without the plugin, at budget `all`, and at each of its budgets.

    Args:
        model: The model.
        prefix_cache: Off or on.
        one_server: Whether requests to the server at `all` ask for the budgets.
    """
    budgets = dict.fromkeys([OFF, "all", *(() if one_server else model.budgets)])
    return [Side(budget, prefix_cache) for budget in budgets]


def plan_cases(
    model: ServedModel, plan: ServePlan, prefix_cache: PrefixCache, downsample: Callable[[Size, str], Size | None]
) -> list[LoadCase]:
    """Returns the cases of a model, by workload and then by side.

    With the prefix cache on, or several questions per image, there are no random images: the load generator never sends
    one twice.

    Args:
        model: The model.
        plan: Loads and kinds of images.
        prefix_cache: Off or on.
        downsample: Returns the size at which an image has about as many tokens as the budget keeps; the image's own
            size, if only the plugin can make it smaller; or None.
    """
    cases = []
    for kind, size_px, concurrency, questions in itertools.product(
        plan.image_kinds, model.sizes_px, plan.concurrencies, plan.questions_per_image
    ):
        if kind == "random" and (prefix_cache == "on" or questions > 1):
            continue
        off, at_all, *others = sides_of(model, prefix_cache, one_server=plan.one_server)
        servers = {side.budget: side for side in others} or dict.fromkeys(model.budgets, at_all)
        for budget, side in {OFF: off, "all": at_all, **servers}.items():
            method: Method = "none" if budget in (OFF, "all") else "mmtok"
            cases.append(LoadCase(side, method, budget, kind, size_px, size_px, concurrency, questions))
        for (budget, side), other in itertools.product(servers.items(), plan.other_methods):
            if not MixedBudget.parse(budget).is_all:
                cases.append(LoadCase(side, other, budget, kind, size_px, size_px, concurrency, questions))
        for budget, side in servers.items():
            sent_px = downsample(size_px, budget)
            if sent_px is not None:
                asked = side if sent_px == size_px else off
                cases.append(LoadCase(asked, "downsample", budget, kind, size_px, sent_px, concurrency, questions))
    return cases


def are_side_by_side(plan: ServePlan, model: ServedModel) -> bool:
    """Returns whether all servers of a model run at once."""
    return not plan.one_server and (plan.side_by_side or len(sides_of(model, "off")) <= model.most_at_once)


def plan_turns(cases: Sequence[LoadCase], *, rounds: int, side_by_side: bool) -> list[Turn]:
    """Returns the order in which servers are measured; every other time in reverse, so that drift affects all alike.

    Args:
        cases: Result of `plan_cases`.
        rounds: How often each case is measured.
        side_by_side: Whether servers change after every workload; otherwise only after all workloads, since the next
            server has to be started first.
    """
    turns: list[Turn] = []
    backwards = False
    for round_idx in range(rounds):
        workloads = [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.workload)]
        for group in workloads if side_by_side else [list(cases)]:
            sides = list(dict.fromkeys(case.side for case in group))
            order = group[::-1] if backwards else group
            for side in reversed(sides) if backwards else sides:
                turns.append(Turn(round_idx, side, tuple(case for case in order if case.side == side)))
            backwards = not backwards
    return turns
