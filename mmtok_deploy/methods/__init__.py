"""MMTok and the methods that it is compared with, one file each: the same problems, each its own choice of tokens.

For research: on the same server, image and budget, only the choice differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from mmtok_deploy.config import Coverage, SelectionConfig
from mmtok_deploy.executors import make_executor
from mmtok_deploy.methods import (
    apet,
    cdpruner,
    dart,
    divprune,
    downsample,
    evenly_spaced,
    otprune,
    random_tokens,
    scope,
    visionzip,
)
from mmtok_deploy.problem import Selection, SelectionProblem
from mmtok_deploy.shown import shown

__all__ = [
    "Comparator",
    "MethodName",
    "check_method",
    "comparator",
    "coverage_of",
    "is_nested",
    "reads_attention",
    "reads_question",
]

MethodName = Literal[
    "mmtok",
    "text-coverage",
    "vision-coverage",
    "divprune",
    "cdpruner",
    "dart",
    "scope",
    "apet",
    "otprune",
    "visionzip",
    "random",
    "even",
    "downsample",
]

Comparator = Callable[[Sequence[SelectionProblem], SelectionConfig], list[Selection]]
"""Chooses the tokens of a batch of problems on one device; answers in their order.

`Selection.coverage` is what the method's own objective is after each pick, zeros where it has none, and `total` is not
finite where the features that it read are not.
"""

# Source: MMTok, arXiv 2508.18264: section 3.3; section 3.1 and Algorithm 1; section 3.2.
_COVERAGES: dict[MethodName, Coverage] = {
    "mmtok": "multimodal",
    "text-coverage": "text",
    "vision-coverage": "vision",
}


def _covering(coverage: Coverage) -> Comparator:
    def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
        if not problems:
            return []
        # Not by Triton's kernels: those of this coverage may not have been compiled, and a request would wait.
        executor = make_executor("torch", problems[0].vision.device, replace(config, coverage=coverage))
        return executor.select(problems)

    return select


_COMPARATORS: dict[MethodName, Comparator] = {
    **{name: _covering(coverage) for name, coverage in _COVERAGES.items()},
    "divprune": divprune.select,
    "cdpruner": cdpruner.select,
    "dart": dart.select,
    "scope": scope.select,
    "apet": apet.select,
    "otprune": otprune.select,
    "visionzip": visionzip.select,
    "random": random_tokens.select,
    "even": evenly_spaced.select,
    "downsample": downsample.select,
}


def comparator(name: MethodName) -> Comparator:
    """Returns the method of that name, by PyTorch's operations alone.

    Raises:
        ValueError: An unknown name.
    """
    return _COMPARATORS[check_method(name)]


def check_method(name: object) -> MethodName:
    """Returns the name if it is one of `MethodName`.

    Raises:
        ValueError: It is not; the message lists them.
    """
    for known in get_args(MethodName):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"method is one of {', '.join(get_args(MethodName))}, got {shown(name)}")


def coverage_of(name: MethodName) -> Coverage | None:
    """Returns what the tokens that the method keeps cover; None for a method that does not go by coverage."""
    return _COVERAGES.get(name)


def is_nested(name: MethodName) -> bool:
    """True if what a budget keeps is the first picks of every larger budget, for the same seed."""
    return name not in ("dart", "even", "downsample")


def reads_question(name: MethodName) -> bool:
    """True if another question about an image may have other tokens kept; `random` draws anew for each."""
    return name in ("mmtok", "text-coverage", "cdpruner", "dart", "random")


def reads_attention(name: MethodName) -> bool:
    """True if the method goes by `SelectionProblem.attention`: `visionzip` needs it, `scope` does without."""
    return name in ("scope", "visionzip")
