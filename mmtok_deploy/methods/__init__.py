"""MMTok and the methods that it is compared with, one file each: the same problems, each its own choice of tokens.

For research: on the same server, image and budget, only the choice differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from mmtok_deploy.config import Coverage, SelectionConfig
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
    text_coverage,
    vision_coverage,
    visionzip,
)
from mmtok_deploy.problem import Selection, SelectionProblem

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

_COMPARATORS: dict[MethodName, Comparator] = {
    "text-coverage": text_coverage.select,
    "vision-coverage": vision_coverage.select,
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
    """Returns the method of that name; `mmtok` itself is what `mmtok_deploy.backends` compute.

    Raises:
        ValueError: An unknown name, or "mmtok".
    """
    if name not in _COMPARATORS:
        raise ValueError(f"a method to compare with is one of {', '.join(_COMPARATORS)}, got {name!r}")
    return _COMPARATORS[name]


def check_method(name: object) -> MethodName:
    """Returns the name if it is one of `MethodName`.

    Raises:
        ValueError: It is not; the message lists them.
    """
    for known in get_args(MethodName):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"method is one of {', '.join(get_args(MethodName))}, got {name!r:.100}")


def coverage_of(name: MethodName, config: SelectionConfig) -> Coverage | None:
    """Returns what the method covers, None for one that is no coverage."""
    if name == "mmtok":
        return config.coverage
    return {"text-coverage": "text", "vision-coverage": "vision"}.get(name)  # type: ignore[return-value]


def is_nested(name: MethodName) -> bool:
    """True if what a budget keeps is the first picks of every larger budget, for the same seed."""
    return name not in ("dart", "even", "downsample")


def reads_question(name: MethodName) -> bool:
    """True if another question about an image may have other tokens kept; `random` draws anew for each."""
    return name in ("mmtok", "text-coverage", "cdpruner", "dart", "random")


def reads_attention(name: MethodName) -> bool:
    """True if the method goes by `SelectionProblem.attention`: `visionzip` needs it, `scope` does without."""
    return name in ("scope", "visionzip")
