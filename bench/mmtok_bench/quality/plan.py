"""Which methods, budgets, seeds and kinds of questions `mmtok quality` asks on the pocket tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from mmtok_bench.pocket.questions import KINDS, Kind
from mmtok_bench.quality.rows import UNPRUNED
from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import MethodName, check_method

__all__ = ["METHODS", "WITH_AGENT", "Plan"]

METHODS: tuple[MethodName, ...] = get_args(MethodName)
WITH_AGENT = "mmtok+agent"
"""MMTok on another server, whose guidance an agent's answer joins."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked.

    Args:
        methods: Of choosing the tokens; `WITH_AGENT` is one.
        budgets: As `Budget.parse` reads them; "all" is asked once, whatever the methods, and first.
        seeds: Of the held-out scenes, and of the method `random`.
        kinds: Of questions.
        num_questions: Of each kind and seed.

    Raises:
        ValueError: Nothing to ask, something twice, or a method, a budget or a kind that is not there.
    """

    methods: tuple[str, ...] = METHODS
    budgets: tuple[str, ...] = ("all", "50%", "25%", "11%", "5%", "4")
    seeds: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[Kind, ...] = KINDS
    num_questions: int = 170

    def __post_init__(self) -> None:
        for name in ("methods", "budgets", "seeds", "kinds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"expected at least one of {name}, each once, got {values or 'none'}")
        for method in self.methods:
            if method != WITH_AGENT:
                check_method(method)
        for budget in self.budgets:
            Budget.parse(budget)
        if any(not 0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"a seed is between 0 and 2**32 - 1, got {self.seeds}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or self.num_questions < 1:
            got = unknown or self.num_questions
            raise ValueError(f"expected kinds of {', '.join(KINDS)} and at least 1 question, got {got}")

    def settings(self) -> list[tuple[str, str]]:
        """Returns methods and budgets in the order in which they are asked."""
        pruned = [(method, budget) for budget in self.budgets if budget != "all" for method in self.methods]
        return [*([(UNPRUNED, "all")] if "all" in self.budgets else []), *pruned]

    @property
    def num_requests(self) -> int:
        """Questions of all cells together."""
        return len(self.settings()) * len(self.seeds) * len(self.kinds) * self.num_questions
