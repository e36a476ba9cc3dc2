"""The constants of the selection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["Coverage", "KeySource", "SelectionConfig"]

Coverage = Literal["multimodal", "text", "vision"]
KeySource = Literal["input", "output"]
"""The side of the projector by whose features image tokens are compared; the published selection takes its input."""


@dataclass(frozen=True, slots=True)
class SelectionConfig:
    """The constants of one selection; the defaults are the authors' for LLaVA.

    Args:
        tv_temp: Temperature of the text-to-vision softmax (tau_t in the paper); smaller is sharper.
        vv_temp: Temperature of the vision-to-vision softmax (tau_v).
        alpha: Weight of covering the image against covering the text.
        coverage: What a set of tokens has to cover: the text and the image ("multimodal"), the text alone
            ("text", the paper's Algorithm 1), or the image alone ("vision").

    Raises:
        ValueError: A temperature that is not a positive number, a negative or non-finite alpha, an unknown coverage.
    """

    tv_temp: float = 0.02
    vv_temp: float = 0.2
    alpha: float = 0.5
    coverage: Coverage = "multimodal"

    def __post_init__(self) -> None:
        for name in ("tv_temp", "vv_temp"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is a positive number, got {value!r}")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha is a number of at least 0, got {self.alpha!r}")
        if self.coverage not in get_args(Coverage):
            raise ValueError(f"coverage is one of {', '.join(get_args(Coverage))}, got {self.coverage!r}")
