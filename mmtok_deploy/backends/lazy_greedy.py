"""Lazy greedy maximum coverage: the picks of the dense loop, with a fraction of its gains computed."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["Columns", "LazyAnswer", "lazy_greedy", "select_lazily"]

# The fewest tokens evaluated in the first round of a pick. Measured on two CPU cores at 576 to 2,880 tokens: half as
# many need a second round more often, and of twice as many, more are evaluated without need.
_FIRST_TOKENS = 16


class Columns(Protocol):
    """The columns of C, one for each token; few of them are read.

    Args:
        num_rows: R, rows of C.
        chunk_tokens: Number of tokens whose gains are computed at a time.
        bounds: [N] float32, at least each token's first gain.
    """

    num_rows: int
    chunk_tokens: int
    bounds: Tensor

    def gains(self, tokens: Tensor, covered: Tensor) -> Tensor:
        """Returns the gains [n] of `tokens` [n], given `covered` [R]; n is a multiple of `chunk_tokens`, or N."""

    def column(self, token: int) -> Tensor:
        """Returns one column, [R]."""


class LazyAnswer(NamedTuple):
    """A greedy selection, and how many gains were computed for it.

    Args:
        order: [K] int64, tokens as picked.
        coverage: [K] float32, f(S) after each pick; never falls.
        num_evaluations: Number of gains computed; a dense loop computes K x N.
    """

    order: Tensor
    coverage: Tensor
    num_evaluations: int


def select_lazily(columns: Columns, total: Tensor, problem: SelectionProblem) -> Selection:
    """Returns a problem's selection; if features are not finite, the first tokens that may be picked.

    Args:
        columns: The columns of the problem's C; their bounds are changed.
        total: [] float32, f of all tokens.
        problem: What to select from.
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

    A token's gain only falls as tokens are added, so a gain computed earlier is an upper bound of the current one. Each
    pick computes the gains of the tokens with the largest bounds again, in rounds of growing size, until the largest
    bound of all is a gain of this pick.

    Args:
        columns: The columns of C; their bounds are changed.
        num_picks: Tokens to pick; at most as many as are not excluded.
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
            # The minimum keeps excluded and picked tokens at minus infinity.
            bounds.index_copy_(0, tokens, torch.minimum(columns.gains(tokens, covered), old_bounds))
            fresh.update(tokens.tolist())
            num_evaluations += len(tokens)
            # argmax returns the first of equals: a token with an equal bound and a lower index is computed first.
            best = int(bounds.argmax())
            if best in fresh:
                break
            stale = bounds.index_fill(0, bounds.new_tensor([*fresh], dtype=torch.int64), -math.inf)
            tokens = stale.topk(num_computed, sorted=False).indices
            # topk takes any of equal bounds; with `best` among them, each round computes at least that one.
            tokens[-1] = best
            old_bounds = bounds.index_select(0, tokens)
            num_computed = min(2 * num_computed, most)
        order.append(best)
        bounds[best] = -math.inf
        torch.maximum(covered, columns.column(best), out=covered)
        coverage.append(covered.sum())
    curve = torch.stack(coverage) if coverage else bounds.new_empty(0)
    # Sums are rounded: without cummax, a pick that gains nothing could lower the value by its last bit.
    return LazyAnswer(bounds.new_tensor(order, dtype=torch.int64), curve.cummax(dim=0).values, num_evaluations)
