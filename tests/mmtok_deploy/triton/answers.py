"""What an answer of the Triton backend is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy import Selection, SelectionConfig
from mmtok_deploy.problem import SelectionProblem
from tests.mmtok_deploy.problems import Golden, Problem

__all__ = ["assert_greedy", "assert_same", "problem_of", "problems_of"]

# What float32 may lose in a gain: cosines are good to 1e-7, divided by a temperature of 0.01 in the exponent.
GAIN_TOLERANCE = 1e-4
# Rounding of sums over rows, relative to f of all tokens.
SUM_TOLERANCE = 2e-6


def problem_of(problem: Problem, num_picks: int, device: str = "cpu") -> SelectionProblem:
    tensors = (problem.vision, problem.keys, problem.text)
    vision, keys, text = (tensor.to(device) for tensor in tensors)
    excluded = None if problem.excluded is None else problem.excluded.to(device)
    return SelectionProblem(vision, keys, text, num_picks, excluded)


def problems_of(cases: Sequence[Golden], device: str = "cpu") -> list[SelectionProblem]:
    return [problem_of(case.problem, case.budget, device) for case in cases]


def assert_same(selections: Sequence[Selection], expected: Sequence[Selection]) -> None:
    """The same picks; the same values but for the rounding of sums."""
    assert [each.order.tolist() for each in selections] == [each.order.tolist() for each in expected]
    for selection, other in zip(selections, expected, strict=True):
        assert selection.kept.tolist() == sorted(selection.order.tolist())
        assert (selection.order.dtype, selection.kept.dtype) == (torch.int64, torch.int64)
        assert (selection.coverage.diff() >= 0).all()
        torch.testing.assert_close(selection.coverage, other.coverage, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(selection.total, other.total, rtol=1e-5, atol=1e-6)


def assert_greedy(selection: Selection, problem: SelectionProblem, config: SelectionConfig) -> None:
    """Every pick is the best there was, in float64, or as good as it to float32."""
    matrix = _matrix(problem, config)
    total = matrix.amax(dim=1).sum()
    may_be_picked = torch.ones(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    if problem.excluded is not None:
        may_be_picked &= ~problem.excluded
    covered = matrix.new_zeros(matrix.shape[0])
    assert len(selection) == problem.num_picks
    for pick, value in zip(selection.order.tolist(), selection.coverage.tolist(), strict=True):
        gains = (matrix - covered[:, None]).clamp_min(0).sum(dim=0)
        assert may_be_picked[pick]
        assert gains[pick] >= gains[may_be_picked].max() * (1 - GAIN_TOLERANCE) - total * SUM_TOLERANCE
        may_be_picked[pick] = False
        covered = torch.maximum(covered, matrix[:, pick])
        torch.testing.assert_close(value, covered.sum().item(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(selection.total.item(), total.item(), rtol=1e-4, atol=1e-6)


def _matrix(problem: SelectionProblem, config: SelectionConfig) -> Tensor:
    unit = [
        torch.nn.functional.normalize(each.double(), dim=1, eps=1e-8)
        for each in (problem.text, problem.vision, problem.keys)
    ]
    text, vision, keys = unit
    image_rows = torch.softmax(keys @ keys.T / config.vv_temp, dim=1) / len(keys)
    if config.coverage == "vision" or not len(text):
        return image_rows
    text_rows = torch.softmax(text @ vision.T / config.tv_temp, dim=1) / len(text)
    return text_rows if config.coverage == "text" else torch.cat([text_rows, image_rows * config.alpha])
