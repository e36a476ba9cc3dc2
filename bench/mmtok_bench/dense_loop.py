"""The published selection: every pick computes the gain of every token. What faster ones are held to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.problem import SelectionProblem

__all__ = ["BASELINES", "Baseline"]

Baseline = Callable[[Sequence[SelectionProblem], SelectionConfig], list[Tensor]]
"""Selects for a batch, one problem after another, as published; answers with the picks alone."""


def _dense_loop(matrix: Tensor, num_picks: int) -> Tensor:
    """Returns the picks [K] from C [M + N, N].

    Source: MMTok, arXiv 2508.18264, Algorithm 2, in the operations that its authors use.
    """
    covered = torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    picked = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    order = torch.zeros(num_picks, dtype=torch.int64, device=matrix.device)
    for pick in range(num_picks):
        gains = (matrix - covered.unsqueeze(1)).clamp(min=0).sum(dim=0)
        best = gains.masked_fill(picked, -float("inf")).argmax()
        order[pick] = best
        picked[best] = True
        covered = torch.maximum(covered, matrix[:, best])
    return order


def _baseline(loop: Callable[[Tensor, int], Tensor]) -> Baseline:
    @torch.no_grad()
    def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Tensor]:
        return [
            loop(coverage_matrix(problem.vision, problem.keys, problem.text, config), problem.num_picks)
            for problem in problems
        ]

    return select


def _scripted() -> Callable[[Tensor, int], Tensor]:
    with warnings.catch_warnings():
        # TorchScript is what the authors compile with; that PyTorch advises against it now is no news here.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: Callable[[Tensor, int], Tensor] = torch.jit.script(_dense_loop)
    return scripted


BASELINES: dict[str, Baseline] = {"dense": _baseline(_dense_loop), "torchscript": _baseline(_scripted())}
"""The loop as PyTorch operations, and compiled by TorchScript as the authors do; no token may be excluded."""
