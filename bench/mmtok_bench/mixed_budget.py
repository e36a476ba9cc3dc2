"""A budget and what the encoder leaves out as one value, `10%@0.5~8`, in the benchmarks' command lines and rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mmtok_deploy.auto_budget import AutoBudget, parse_budget
from mmtok_deploy.budget import Budget

__all__ = ["MixedBudget"]

_FORM = re.compile(r"(?P<budget>[^@~]*)(?:@(?P<scale>\d*\.?\d+))?(?:~(?P<difference>\d+))?")


@dataclass(frozen=True, slots=True)
class MixedBudget:
    """A budget, an encoder scale and a limit of repetitions.

    `10%@0.5` keeps 10% of the tokens of an image whose sides are halved; `10%~8` as many as 10% of the image, of the
    tokens that do not repeat a neighbour within a difference of 8.

    Args:
        budget: Value of `--mmtok-budget`.
        encoder_scale: Value of `--mmtok-encoder-scale`.
        skip_repeats: Value of `--mmtok-skip-repeats`.
    """

    budget: Budget | AutoBudget
    encoder_scale: float = 1.0
    skip_repeats: int = -1

    @classmethod
    def parse(cls, text: str) -> MixedBudget:
        """Returns the value of a text such as `10%`, `64`, `all` or `auto`, possibly followed by `@0.5`, `~8` or both.

        Raises:
            ValueError: The text holds no budget, a scale that is not above 0 and at most 1, or a difference above 255.
        """
        found = _FORM.fullmatch(text)
        scale = float(found["scale"] or 1) if found else 0.0
        difference = int(found["difference"] or -1) if found else -1
        if found is None or not 0 < scale <= 1 or difference > 255:
            raise ValueError(
                f"{text!r} is not understood: expected a budget, then possibly @ and an encoder scale above 0 and at "
                "most 1, and ~ and a difference of repeated pixels of at most 255, as 10%, 10%@0.5 or 10%@0.5~8"
            )
        return cls(parse_budget(found["budget"], AutoBudget()), scale, difference)

    def __str__(self) -> str:
        scale = f"@{self.encoder_scale:g}" if self.encoder_scale < 1 else ""
        return f"{self.budget}{scale}" + (f"~{self.skip_repeats}" if self.skip_repeats >= 0 else "")

    @property
    def encodes_less(self) -> bool:
        """True if images are made smaller, or parts of them are left out, before the encoder."""
        return self.encoder_scale < 1 or self.skip_repeats >= 0

    @property
    def is_all(self) -> bool:
        """True if all is kept that is encoded."""
        return isinstance(self.budget, Budget) and self.budget.is_all

    @property
    def of_all(self) -> MixedBudget:
        """The value that encodes as much and keeps all of it."""
        return replace(self, budget=Budget.parse("all"))

    @property
    def is_auto(self) -> bool:
        """True if the number of kept tokens depends on the question and the image."""
        return isinstance(self.budget, AutoBudget)

    @property
    def flags(self) -> tuple[str, ...]:
        """Server arguments that apply this to every image."""
        return tuple(f"--{name.replace('_', '-')}={value}" for name, value in self.fields.items())

    @property
    def fields(self) -> dict[str, str | int | float]:
        """Fields of `mm_processor_kwargs` that apply this to one request."""
        fields: dict[str, str | int | float] = {"mmtok_budget": str(self.budget)}
        if self.encoder_scale < 1:
            fields["mmtok_encoder_scale"] = self.encoder_scale
        if self.skip_repeats >= 0:
            fields["mmtok_skip_repeats"] = self.skip_repeats
        return fields
