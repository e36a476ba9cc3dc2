"""MMTok and the methods that it is compared with, one file each: each chooses tokens from the same problems.

For research: on the same server, with the same image and budget, only the choice of tokens differs.
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
    evs,
    otprune,
    random_tokens,
    scope,
    visionzip,
    whole_frames,
)
from mmtok_deploy.problem import Selection, SelectionProblem
from mmtok_deploy.shown import shown

__all__ = [
    "IMAGE_METHODS",
    "Comparator",
    "MethodName",
    "check_method",
    "comparator",
    "coverage_of",
    "is_nested",
    "needs_frames",
    "reads_attention",
    "reads_keys",
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
    "evs",
    "frames",
]

Comparator = Callable[[Sequence[SelectionProblem], SelectionConfig], list[Selection]]
"""Chooses the tokens of a batch of problems on one device; returns the selections in the same order.

`Selection.coverage` is the method's own objective after each pick, zeros if it has none; `total` is not finite if the
features that the method reads are not.
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
        # Without Triton: kernels of this coverage may not be compiled yet, and a request would wait for them.
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
    "evs": evs.select,
    "frames": whole_frames.select,
}


def comparator(name: MethodName) -> Comparator:
    """Returns the method of that name; all run on PyTorch operations alone.

    Raises:
        ValueError: An unknown name.
    """
    return _COMPARATORS[check_method(name)]


def needs_frames(name: MethodName) -> bool:
    """True if the method goes by the frames of a video, and has nothing to choose by in an image."""
    return name in ("evs", "frames")


IMAGE_METHODS: tuple[MethodName, ...] = tuple(name for name in get_args(MethodName) if not needs_frames(name))
"""The methods that choose tokens of an image; all of them but `downsample` choose tokens of a video, too."""


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
    """Returns what the method covers; None for a method that does not maximize coverage."""
    return _COVERAGES.get(name)


def is_nested(name: MethodName) -> bool:
    """True if a budget keeps the first picks of every larger budget, for the same seed."""
    return name not in ("dart", "even", "downsample", "frames")


def reads_question(name: MethodName) -> bool:
    """True if another question about an image may keep other tokens; `random` draws anew for each."""
    return name in ("mmtok", "text-coverage", "cdpruner", "dart", "random")


def reads_attention(name: MethodName) -> bool:
    """True if the method reads `SelectionProblem.attention`: `visionzip` needs it, `scope` also works without it."""
    return name in ("scope", "visionzip")


def reads_keys(name: MethodName) -> bool:
    """True if the method compares image tokens by `SelectionProblem.keys`; the others read the tokens, or nothing."""
    return name in ("mmtok", "vision-coverage", "scope", "apet")
