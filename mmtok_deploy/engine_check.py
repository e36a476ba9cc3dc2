"""Checks that an exported file selects as the reference does, on the device that it will run on."""

from __future__ import annotations

import torch

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.greedy_replay import GreedyReplay, WrongPickError, replay_greedy
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.problem import Selection, SelectionProblem
from mmtok_deploy.synthetic import synthetic_features

__all__ = ["hold_to_reference", "sample_problems"]

# Relative. Matrix products and sums of thousands of terms, in another order; 1.1e-5 was seen.
_COVERAGE_TOLERANCE = 1e-4
# Relative: twice the float32 rounding error of the coverage. Gains that differ by less are a close call.
_COVERAGE_ROUNDING = 2**-23
# The sample's largest sizes, which keep a server's start short.
_MAX_TOKENS, _MAX_WORDS = 1024, 8
# Larger than any image or question: a file whose smallest size is larger still cannot be tried.
_MAX_SMALLEST = 1 << 15


def sample_problems(manifest: Manifest, device: torch.device) -> list[SelectionProblem]:
    """Returns two synthetic images, the second with a shorter text and with excluded tokens.

    Args:
        manifest: Manifest of the file that will select from them.
        device: Device of the features.

    Raises:
        ValueError: The smallest image or text that the file takes is too large to try.
    """
    sizes = manifest.dimensions
    for name in ("N", "M"):
        if sizes[name].minimum > _MAX_SMALLEST:
            raise ValueError(f"it takes no {name} below {sizes[name].minimum}, expected at most {_MAX_SMALLEST}")
    num_tokens = max(sizes["N"].minimum, min(sizes["N"].optimum, _MAX_TOKENS))
    num_words = max(sizes["M"].minimum, min(sizes["M"].maximum, _MAX_WORDS))
    widths = [int(manifest.input(name).shape[-1]) for name in ("vision", "keys")]
    problems = []
    for seed, (num_named, is_masked) in enumerate(((num_words, False), (max(1, num_words // 2), True))):
        vision, keys, text = (
            feature.to(device, getattr(torch, manifest.input(name).dtype))
            for name, feature in zip(
                ("vision", "keys", "text"), synthetic_features(num_tokens, num_named, *widths, seed=seed), strict=True
            )
        )
        excluded = None
        if is_masked and num_tokens > 1:
            excluded = torch.arange(num_tokens, device=device) < num_tokens // 8
            # The token that would be picked first is excluded, to detect a file that ignores the mask.
            excluded[coverage_matrix(vision, keys, text, manifest.constants).sum(dim=0).argmax()] = True
        num_pickable = num_tokens - (0 if excluded is None else int(excluded.sum()))
        problems.append(SelectionProblem(vision, keys, text, min(manifest.budget, num_pickable), excluded))
    return problems


def hold_to_reference(problem: SelectionProblem, config: SelectionConfig, selection: Selection) -> GreedyReplay:
    """Returns the replay of a selection after checking it against the reference; `replay_greedy` judges the picks.

    Raises:
        WrongPickError: The selection is wrong; the message says where.
    """
    order: list[int] = selection.order.tolist()
    replay = replay_greedy(problem, config, order, coverage_error=_COVERAGE_ROUNDING)
    if selection.kept.tolist() != sorted(order):
        raise WrongPickError(f"kept is not order sorted: {selection.kept.tolist()}, {order}")
    for name, found, expected in (
        ("coverage", selection.coverage.double(), replay.coverage),
        ("total", selection.total.double(), replay.total),
    ):
        if not torch.allclose(found, expected, rtol=_COVERAGE_TOLERANCE, atol=0):
            largest = ((found - expected).abs() / expected).max()
            raise WrongPickError(
                f"{name} differs from double precision by {largest:.1e}, allowed {_COVERAGE_TOLERANCE}"
            )
    return replay
