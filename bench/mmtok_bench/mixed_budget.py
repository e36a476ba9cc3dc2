"""A budget and an encoder scale as one value, `10%@0.5`, in the benchmarks' command lines and rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmtok_deploy.auto_budget import AutoBudget, parse_budget
from mmtok_deploy.budget import Budget

__all__ = ["MixedBudget"]


@dataclass(frozen=True, slots=True)
class MixedBudget:
    """A budget and an encoder scale: `10%@0.5` keeps 10% of the tokens of an image whose sides are halved.

    Args:
        budget: Value of `--mmtok-budget`.
        encoder_scale: Value of `--mmtok-encoder-scale`.
    """

    budget: Budget | AutoBudget
    encoder_scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> MixedBudget:
        """Returns the value of a text such as `10%`, `64`, `all` or `auto`, or of one of these followed by `@0.5`.

        Raises:
            ValueError: The text holds no budget, or a scale that is not above 0 and at most 1.
        """
        budget, at, scale = text.partition("@")
        try:
            number = float(scale) if at else 1.0
        except ValueError:
            number = math.nan
        if not 0 < number <= 1:
            raise ValueError(f"the scale of {text!r} is not understood: expected one above 0 and at most 1, as 10%@0.5")
        return cls(parse_budget(budget, AutoBudget()), number)

    def __str__(self) -> str:
        return str(self.budget) + (f"@{self.encoder_scale:g}" if self.is_scaled else "")

    @property
    def is_scaled(self) -> bool:
        """True if images are made smaller."""
        return self.encoder_scale < 1

    @property
    def is_all(self) -> bool:
        """True if nothing is pruned."""
        return isinstance(self.budget, Budget) and self.budget.is_all

    @property
    def is_auto(self) -> bool:
        """True if the number of kept tokens depends on the question."""
        return isinstance(self.budget, AutoBudget)

    @property
    def flags(self) -> tuple[str, ...]:
        """Server arguments that apply this to every image."""
        scale = (f"--mmtok-encoder-scale={self.encoder_scale:g}",) if self.is_scaled else ()
        return (f"--mmtok-budget={self.budget}", *scale)

    @property
    def fields(self) -> dict[str, str | int | float]:
        """Fields of `mm_processor_kwargs` that apply this to one request."""
        scale = {"mmtok_encoder_scale": self.encoder_scale} if self.is_scaled else {}
        return {"mmtok_budget": str(self.budget), **scale}
