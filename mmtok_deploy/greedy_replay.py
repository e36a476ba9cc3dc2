"""Checks that picks are greedy: replays them in double precision, and allows for float32 rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.problem import SelectionProblem

__all__ = ["GreedyReplay", "WrongPickError", "replay_greedy"]

# The error of a cosine of two unit vectors in float32, whatever the order of the sum; a softmax divides it by its
# temperature. Measured over the golden cases and on features of LLaVA's width: at most 5.4e-7.
_COSINE_ERROR = 6e-7
# The relative error that exponential and normalisation add to an entry of C, and that the sum adds to a gain.
_ENTRY_ERROR = 1e-6
# Tokens that gain less than this share of the pick's gain are not compared with it.
_RIVAL_SHARE = 0.99


class WrongPickError(Exception):
    """A pick is not greedy: another token gains more, by more than float32 rounding."""


@dataclass(frozen=True, slots=True)
class GreedyReplay:
    """A replay in double precision of picks that are greedy.

    Args:
        coverage: [K] float64, f(S) after each pick.
        total: [] float64, f of all N tokens.
        num_close_calls: Picks whose gain another token exceeds, but by less than float32 rounding.
        smallest_lead: Over all picks, the least by which the pick's gain exceeds another token's gain, as a multiple
            of the float32 rounding of the two; infinite if no other token gains 99% of a pick's gain. Above 1,
            float32 arithmetic gives these picks on any processor.
    """

    coverage: Tensor
    total: Tensor
    num_close_calls: int
    smallest_lead: float


def replay_greedy(
    problem: SelectionProblem, config: SelectionConfig, order: Sequence[int], *, coverage_error: float = 0.0
) -> GreedyReplay:
    """Returns the replay of `order`, the picks of some backend for `problem`.

    Each pick must have the largest gain after the picks before it, in double precision, or one that float32 cannot
    tell from the largest. A gain is a sum over rows of C of entry minus covered value, where that is positive, and is
    known to the sum of (entry + covered value) * (1e-6 + 6e-7 / temperature of the row) over the same rows. So two
    gains within the sum of their errors are a close call: which is picked may depend on the processor, the number of
    threads and the batch.

    Args:
        problem: What was selected from.
        config: Temperatures, weight, coverage.
        order: [K] token indices as picked.
        coverage_error: Two gains that differ by less than this share of the coverage so far are a close call, too.
            In an image of nearly equal parts, gains are small compared with the coverage, and a sum in another order
            is rounded on the scale of the coverage.

    Raises:
        WrongPickError: A token that may not be picked, a number of tokens other than `problem.num_picks`, or a gain
            that is not the largest by more than its rounding. Features that are not finite make every pick wrong.
    """
    if len(order) != problem.num_picks:
        raise WrongPickError(f"{len(order)} tokens were picked, expected {problem.num_picks}")
    matrix = coverage_matrix(problem.vision, problem.keys, problem.text, config, dtype=torch.float64)
    columns = matrix.T.contiguous()
    entry_errors = _entry_errors(problem, config).to(matrix)
    num_tokens, num_rows = columns.shape
    is_open = torch.ones(num_tokens, dtype=torch.bool, device=matrix.device)
    if problem.excluded is not None:
        is_open &= ~problem.excluded
    covered = matrix.new_zeros(num_rows)
    # A gain only falls as tokens are picked, so an earlier one is an upper bound: few are computed again.
    bounds = columns.sum(dim=1)
    coverage = matrix.new_empty(len(order))
    num_close_calls, smallest_lead = 0, math.inf
    for place, token in enumerate(order):
        if not (0 <= token < num_tokens and is_open[token]):
            raise WrongPickError(f"pick {place} is token {token}, which is picked already, excluded or not there")
        is_open[token] = False
        gain, error = (each[0] for each in _gains(columns[token, None], covered, entry_errors))
        if not torch.isfinite(gain):
            raise WrongPickError(f"pick {place} is token {token}, whose gain is not finite")
        rivals = (is_open & (bounds >= _RIVAL_SHARE * gain)).nonzero()[:, 0]
        if len(rivals):
            bounds[rivals], errors = _gains(columns[rivals], covered, entry_errors)
            leads = (gain - bounds[rivals]) / (error + errors + coverage_error * covered.sum()).clamp_(min=1e-300)
            closest = int(leads.argmin())
            lead = float(leads[closest])
            if lead < -1:
                rival = int(rivals[closest])
                raise WrongPickError(
                    f"pick {place} is token {token}, which gains {gain:.6g}; token {rival} gains {bounds[rival]:.6g}"
                )
            num_close_calls += lead < 0
            smallest_lead = min(smallest_lead, lead)
        covered = torch.maximum(covered, columns[token])
        coverage[place] = covered.sum()
    total = matrix.amax(dim=1).sum() if num_tokens else matrix.new_zeros(())
    return GreedyReplay(coverage, total, num_close_calls, smallest_lead)


def _gains(columns: Tensor, covered: Tensor, entry_errors: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gain of each column [n, R], given `covered` [R], and its float32 rounding error, both [n]."""
    may_gain = columns * (1 + entry_errors) > covered * (1 - entry_errors)
    errors = ((columns + covered) * entry_errors * may_gain).sum(dim=1)
    return (columns - covered).clamp_(min=0).sum(dim=1), errors


def _entry_errors(problem: SelectionProblem, config: SelectionConfig) -> Tensor:
    """Returns [R] the relative error of an entry in each row of C."""
    num_words = 0 if config.coverage == "vision" else len(problem.text)
    num_keys = 0 if config.coverage == "text" else len(problem.keys)
    temperatures = torch.tensor([config.tv_temp, config.vv_temp], dtype=torch.float64)
    errors = _ENTRY_ERROR + _COSINE_ERROR / temperatures
    return errors.repeat_interleave(torch.tensor([num_words, num_keys]))
