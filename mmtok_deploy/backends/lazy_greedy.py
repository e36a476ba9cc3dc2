"""Lazy greedy maximum coverage: the dense loop's picks from a fraction of its gains."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["Columns", "LazyAnswer", "lazy_greedy", "select_lazily"]

# Tokens evaluated first at each pick, at least. Measured on two CPU cores at 576 to 2,880 tokens: half as many need a
# second round more often, and twice as many are evaluated in vain.
_FIRST_TOKENS = 16


class Columns(Protocol):
    """The columns of C, one a token, of which few are looked at.

    Args:
        num_rows: R.
        chunk_tokens: Gains are computed for so many tokens at a time.
        bounds: [N] float32, at least each token's first gain.
    """

    num_rows: int
    chunk_tokens: int
    bounds: Tensor

    def gains(self, tokens: Tensor, covered: Tensor) -> Tensor:
        """Returns the gains [n] of `tokens` [n] over what is `covered` [R]; n is whole chunks, or all tokens."""

    def column(self, token: int) -> Tensor:
        """Returns one column, [R]."""


class LazyAnswer(NamedTuple):
    """A greedy answer and what it took.

    Args:
        order: [K] int64, tokens as picked.
        coverage: [K] float32, f(S) after each pick; never falls.
        num_evaluations: Gains computed, a token at a time; a dense loop computes K x N.
    """

    order: Tensor
    coverage: Tensor
    num_evaluations: int


def select_lazily(columns: Columns, total: Tensor, problem: SelectionProblem) -> Selection:
    """Returns a problem's selection; the first tokens that may be picked where the features are not finite.

    Args:
        columns: The columns of the problem's C; their bounds are changed.
        total: [] float32, f of all tokens.
        problem: Whose tokens are picked.
    """
    if torch.isfinite(total):
        order, coverage, _ = lazy_greedy(columns, problem.num_picks, problem.excluded)
    else:
        tokens = torch.arange(len(problem.vision), device=total.device)
        order = (tokens if problem.excluded is None else tokens[~problem.excluded])[: problem.num_picks]
        coverage = total.expand(len(order))
    return Selection(order, order.sort().values, coverage, total)


def lazy_greedy(columns: Columns, num_picks: int, excluded: Tensor | None = None) -> LazyAnswer:
    """Returns the tokens as picked: the answer of `reference.greedy_maximum_coverage`, ties included.

    A token's gain only falls as tokens are added, so a gain computed earlier is an upper bound of today's. A pick
    computes anew the tokens with the largest bounds, ever more of them, until the largest of all is a new one.

    Args:
        columns: The columns of C; their bounds are changed.
        num_picks: Tokens to pick; fewer are picked where fewer may be.
        excluded: [N] bool, tokens never to pick.

    Source: Minoux, Accelerated greedy algorithms for maximizing submodular set functions, 1978.
    """
    bounds = columns.bounds
    num_tokens = len(bounds)
    num_picks = min(num_picks, num_tokens)
    if excluded is not None:
        bounds.masked_fill_(excluded, -math.inf)
        num_picks = min(num_picks, num_tokens - int(excluded.sum()))
    most = num_tokens // columns.chunk_tokens * columns.chunk_tokens
    first = min(most, -(-_FIRST_TOKENS // columns.chunk_tokens) * columns.chunk_tokens)
    order: list[int] = []
    coverage: list[Tensor] = []
    covered = bounds.new_zeros(columns.num_rows)
    num_evaluations = 0
    for _ in range(num_picks):
        fresh: set[int] = set()
        num_computed = first
        old_bounds, tokens = bounds.topk(first, sorted=False)
        while True:
            # The minimum keeps what may not be picked at minus infinity.
            bounds.index_copy_(0, tokens, torch.minimum(columns.gains(tokens, covered), old_bounds))
            fresh.update(tokens.tolist())
            num_evaluations += len(tokens)
            # argmax is the first of equals: a tie with a token of lower index is not won before that one is computed.
            best = int(bounds.argmax())
            if best in fresh:
                break
            stale = bounds.index_fill(0, bounds.new_tensor([*fresh], dtype=torch.int64), -math.inf)
            tokens = stale.topk(num_computed, sorted=False).indices
            # Among equals topk takes any: with the first one, each round settles at least that.
            tokens[-1] = best
            old_bounds = bounds.index_select(0, tokens)
            num_computed = min(2 * num_computed, most)
        order.append(best)
        bounds[best] = -math.inf
        torch.maximum(covered, columns.column(best), out=covered)
        coverage.append(covered.sum())
    curve = torch.stack(coverage) if coverage else bounds.new_empty(0)
    # Sums are rounded, so that a pick which gains nothing could lower the value by its last bit.
    return LazyAnswer(bounds.new_tensor(order, dtype=torch.int64), curve.cummax(dim=0).values, num_evaluations)
