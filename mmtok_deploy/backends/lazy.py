"""The exact selection on a CPU: lazy greedy, which evaluates the few tokens that can still win."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import unit_rows
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["LazyAnswer", "lazy_maximum_coverage", "select"]

# Measured on 2 cores of an AMD EPYC (Zen 5), 576 to 2,880 tokens: smaller blocks cost calls, larger ones the cache.
_BLOCK_TOKENS = 384
# PyTorch splits an operation on this many elements or more among its threads. On work this small they wait for one
# another longer than it takes, and for milliseconds where other processes have the cores.
_NUM_PARALLEL = 32768
_CHUNK_TOKENS = 16


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


@torch.no_grad()
def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns the selection of each problem, made one after another; the features are on the CPU.

    The picks are the reference's, but for close calls: values agree to float32's rounding, since products are summed in
    another order.

    Memory: one problem at a time holds the coverage matrix, 4 N (M + N) bytes, and while that is made twice the keys in
    float32 and two blocks of 384 x N: 33 MB and 32 MB for 2,880 tokens of LLaVA, 1.08 GB and 0.19 GB for 16,384.
    """
    return [_select_one(problem, config) for problem in problems]


def _select_one(problem: SelectionProblem, config: SelectionConfig) -> Selection:
    columns, total = _coverage_columns(problem, config)
    if not torch.isfinite(total):
        barred = torch.zeros_like(columns[:, 0], dtype=torch.bool) if problem.excluded is None else problem.excluded
        order = (~barred).nonzero()[: problem.num_picks, 0]
        return Selection(order, order, total.expand(len(order)), total)
    order, coverage, _ = lazy_maximum_coverage(columns, problem.num_picks, problem.excluded)
    return Selection(order, order.sort().values, coverage, total)


def lazy_maximum_coverage(columns: Tensor, num_picks: int, excluded: Tensor | None = None) -> LazyAnswer:
    """Returns the tokens as picked: the answer of `reference.greedy_maximum_coverage`, ties included.

    A token's gain only falls as tokens are added, so a gain computed earlier is an upper bound of today's. A pick
    computes anew the tokens with the largest bounds, ever more of them, until the largest of all is a new one.

    That holds in float32 as well: subtraction, maximum and addition round monotonically, and every gain is summed by
    the same operation on the same shape. Only the first bounds are not, and are rounded up for it.

    Args:
        columns: [N, R] float32, the transpose of C, non-negative; row-contiguous is fastest.
        num_picks: Tokens to pick; fewer are picked where fewer may be.
        excluded: [N] bool, tokens never to pick.

    Source: Minoux, Accelerated greedy algorithms for maximizing submodular set functions, 1978.
    """
    num_tokens, num_rows = columns.shape
    # Twice the bound on the rounding of a sum in any order: one for this sum, one for the sum of a gain.
    bounds = columns.sum(dim=1).mul_(1 + 2 * num_rows * torch.finfo(torch.float32).eps)
    if excluded is not None:
        bounds.masked_fill_(excluded, -math.inf)
        num_picks = min(num_picks, num_tokens - int(excluded.sum()))
    order: list[int] = []
    coverage = columns.new_empty(min(num_picks, num_tokens))
    covered = columns.new_zeros(num_rows)
    stale = torch.empty_like(bounds)
    gains_of = _Gains(columns)
    for pick in range(len(coverage)):
        stale.copy_(bounds)
        num_chunks = 1
        # argmax is the first of equals: a tie with a token of lower index is not won before that one is computed.
        while stale[best := int(bounds.argmax())].item() > -math.inf:
            num_computed = min(num_chunks, gains_of.max_chunks) * gains_of.chunk_tokens
            tokens = stale.topk(num_computed, sorted=False).indices
            # Among equals topk takes any: with the first one, each round settles at least that.
            tokens[-1] = best
            # The minimum keeps what may not be picked at minus infinity.
            gains = torch.minimum(gains_of(tokens, covered), bounds.index_select(0, tokens))
            bounds.index_copy_(0, tokens, gains)
            stale.index_fill_(0, tokens, -math.inf)
            num_chunks *= 2
        order.append(best)
        bounds[best] = -math.inf
        torch.maximum(covered, columns[best], out=covered)
        coverage[pick] = covered.sum()
    return LazyAnswer(bounds.new_tensor(order, dtype=torch.int64), coverage, gains_of.num_evaluations)


class _Gains:
    """Computes gains by the chunk: always the same shape, and small enough for one thread.

    Args:
        columns: [N, R] float32, the transpose of C.
    """

    def __init__(self, columns: Tensor) -> None:
        num_tokens, num_rows = columns.shape
        one_thread = (_NUM_PARALLEL - 1) // max(num_rows, 1)
        self.chunk_tokens = max(1, min(one_thread, _CHUNK_TOKENS, num_tokens))
        self.max_chunks = num_tokens // self.chunk_tokens
        self.num_evaluations = 0
        self._columns = columns
        self._surplus = columns.new_empty(self.chunk_tokens, num_rows)

    def __call__(self, tokens: Tensor, covered: Tensor) -> Tensor:
        """Returns the gains [n] of `tokens` [n], where n is whole chunks, over what is `covered` [R]."""
        gains = covered.new_empty(len(tokens))
        chunks, outs = (each.view(-1, self.chunk_tokens).unbind() for each in (tokens, gains))
        for chunk, out in zip(chunks, outs, strict=True):
            torch.index_select(self._columns, 0, chunk, out=self._surplus)
            torch.sum(self._surplus.sub_(covered).clamp_min_(0), dim=1, out=out)
        self.num_evaluations += len(tokens)
        return gains


def _coverage_columns(problem: SelectionProblem, config: SelectionConfig) -> tuple[Tensor, Tensor]:
    """Returns the transpose of C [N, M + N], so that a token's column is contiguous, and f of all tokens []."""
    num_tokens = len(problem.vision)
    num_words = 0 if config.coverage == "vision" else len(problem.text)
    num_keys = 0 if config.coverage == "text" else num_tokens
    columns = torch.empty(num_tokens, num_words + num_keys, dtype=torch.float32, device=problem.vision.device)
    if num_words:
        _write_text_logits(problem.vision, problem.text, config.tv_temp, columns[:, :num_words])
    if num_keys:
        _write_image_logits(problem.keys, config.vv_temp, columns[:, num_words:])
    if not num_tokens:
        return columns, columns.new_zeros(())

    # C's rows are softmaxes over the tokens: here down the columns, in place.
    columns.sub_(columns.amax(dim=0)).exp_()
    weights = columns.sum(dim=0).reciprocal_()
    weights[:num_words] /= max(num_words, 1)
    weights[num_words:] *= (config.alpha if num_words else 1.0) / num_tokens
    # The largest entry of a row was exp(0): its weight is the largest of C's row.
    return columns.mul_(weights), weights.sum()


def _write_text_logits(vision: Tensor, text: Tensor, temperature: float, logits: Tensor) -> None:
    """Writes x t^T / temperature, x and t of unit rows, into `logits` [N, M]."""
    words = unit_rows(text)
    for rows, out in zip(vision.split(_BLOCK_TOKENS), logits.split(_BLOCK_TOKENS), strict=True):
        # Lengths are divided out of the products, which are far fewer than the features.
        rows = rows.float()
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-8)
        torch.div(_products(rows, words), lengths.mul_(temperature), out=out)


def _write_image_logits(keys: Tensor, temperature: float, logits: Tensor) -> None:
    """Writes c c^T / temperature, c of unit rows, into `logits` [N, N]: what is above the diagonal also below it."""
    units = unit_rows(keys)
    for start in range(0, len(units), _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, len(units))
        torch.div(_products(units[start:stop], units[start:]), temperature, out=logits[start:stop, start:])
        logits[stop:, start:stop] = logits[start:stop, stop:].T


@float32_products()
def _products(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b^T of two float32 matrices."""
    if torch.backends.mkldnn.is_available():
        # oneDNN, also where `@` is MKL: on AMD processors that one leaves AVX-512 and half of the speed unused.
        product: Tensor = torch.nn.functional.linear(a.to_mkldnn(), b.to_mkldnn()).to_dense()
        return product
    return a @ b.T
