"""Whether picks are the greedy ones: equal to the reference's, but for calls too close for float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmtok_deploy.backends import reference
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.problem import SelectionProblem

__all__ = ["first_wrong_pick"]

# Products summed in another order move an entry of C by its last bits, and a gain is a sum of differences of such
# entries: on features of this bench leads of up to 3e-6 of the gain were seen to go either way.
_CLOSE_CALL = 2e-5


def first_wrong_pick(problem: SelectionProblem, config: SelectionConfig, order: Sequence[int]) -> str | None:
    """Returns what is wrong with a backend's picks; None if they are the greedy ones.

    Where the first pick that differs from the reference's gains as much as that one to within 2e-5 of it, in double
    precision, both are right, and every later pick is then held to the largest gain after the picks before it.
    """
    expected: list[int] = reference.select([problem], config)[0].order.tolist()
    if list(order) == expected:
        return None
    if len(set(order)) != len(expected):
        return f"{len(set(order))} different tokens, expected {len(expected)}"
    matrix = coverage_matrix(problem.vision, problem.keys, problem.text, config).double()
    covered = matrix.new_zeros(len(matrix))
    barred = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    if problem.excluded is not None:
        barred |= problem.excluded
    for pick, token in enumerate(order):
        gains = (matrix - covered[:, None]).clamp_(min=0).sum(dim=0).masked_fill_(barred, -torch.inf)
        best = int(gains.argmax())
        if not gains[token] >= gains[best] * (1 - _CLOSE_CALL):
            return f"pick {pick} is token {token}, which gains {gains[token]:.3g}; token {best} gains {gains[best]:.3g}"
        barred[token] = True
        covered = torch.maximum(covered, matrix[:, token])
    return None
