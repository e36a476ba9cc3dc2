"""The exact selection on a CPU: lazy greedy, which evaluates only tokens that can still have the largest gain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy.backends.lazy_greedy import lazy_greedy, select_lazily
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import unit_rows
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]

# Measured on 2 cores of an AMD EPYC (Zen 5), 576 to 2,880 tokens: small blocks cost calls, large ones exceed the cache.
_BLOCK_TOKENS = 256
# Entries of C that stay in the cache from one operation to the next.
_CACHED_ENTRIES = 1 << 18
# PyTorch splits an operation on this many elements or more among its threads. On work this small they wait for one
# another longer than it takes, and for milliseconds where other processes have the cores.
_NUM_PARALLEL = 32768
_CHUNK_TOKENS = 32


@torch.no_grad()
def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns the selection of each problem, one after another; the features are on the CPU.

    Picks equal the reference's except for close calls: products are summed in another order, so values agree only up to
    float32 rounding.

    Memory: one problem at a time holds the coverage matrix, 4 N (M + N) bytes, and while that is computed, twice the
    keys in float32: 33 MB and 24 MB for 2,880 tokens of LLaVA, 1.08 GB and 0.13 GB for 16,384.
    """
    return [_select_one(problem, config) for problem in problems]


@torch.no_grad()
def num_gains(problem: SelectionProblem, config: SelectionConfig) -> int:
    """Returns how many gains the selection of a problem computes; the published loop computes K N."""
    columns, _ = _coverage_columns(problem, config)
    return lazy_greedy(_DenseColumns(columns), problem.num_picks, problem.excluded).num_evaluations


def _select_one(problem: SelectionProblem, config: SelectionConfig) -> Selection:
    columns, total = _coverage_columns(problem, config)
    return select_lazily(_DenseColumns(columns), total, problem)


class _DenseColumns:
    """The columns of a whole C. Gains are computed in chunks of one shape, small enough for one thread.

    Old gains are upper bounds in float32 as well: subtraction, maximum and addition round monotonically, and every
    gain is summed by the same operation on the same shape. The first bounds are summed otherwise, and are rounded up.

    Args:
        columns: [N, R] float32, the transpose of C, non-negative; row-contiguous is fastest.
    """

    def __init__(self, columns: Tensor) -> None:
        num_tokens, self.num_rows = columns.shape
        one_thread = (_NUM_PARALLEL - 1) // max(self.num_rows, 1)
        self.chunk_tokens = max(1, min(one_thread, _CHUNK_TOKENS, num_tokens))
        # Twice the bound on the rounding of a sum in any order: one for this sum, one for the sum of a gain.
        self.bounds = columns.sum(dim=1).mul_(1 + 2 * self.num_rows * torch.finfo(torch.float32).eps)
        self._columns = columns
        self._surplus = columns.new_empty(self.chunk_tokens, self.num_rows)

    def gains(self, tokens: Tensor, covered: Tensor) -> Tensor:
        """See `Columns.gains`."""
        if len(tokens) == self.chunk_tokens:
            return self._chunk_gains(tokens, covered)
        return torch.cat([self._chunk_gains(chunk, covered) for chunk in tokens.split(self.chunk_tokens)])

    def _chunk_gains(self, tokens: Tensor, covered: Tensor) -> Tensor:
        torch.index_select(self._columns, 0, tokens, out=self._surplus)
        return self._surplus.sub_(covered).clamp_min_(0).sum(dim=1)

    def column(self, token: int) -> Tensor:
        """See `Columns.column`."""
        return self._columns[token]


def _coverage_columns(problem: SelectionProblem, config: SelectionConfig) -> tuple[Tensor, Tensor]:
    """Returns the transpose of C [N, M + N], so that a token's column is contiguous, and f of all tokens []."""
    num_tokens = len(problem.vision)
    num_words = 0 if config.coverage == "vision" else len(problem.text)
    num_keys = 0 if config.coverage == "text" else num_tokens
    columns = torch.empty(num_tokens, num_words + num_keys, dtype=torch.float32, device=problem.vision.device)
    if not num_tokens:
        return columns, columns.new_zeros(())
    if num_words:
        _write_text_logits(problem.vision, problem.text, config.tv_temp, columns[:, :num_words])
    if num_keys:
        _write_image_logits(problem.keys, config.vv_temp, columns[:, num_words:])

    # C's rows are softmaxes over the tokens: here down the columns, in place.
    highest = columns.amax(dim=0)
    sums = torch.zeros_like(highest)
    for block in columns.split(max(1, _CACHED_ENTRIES // columns.shape[1])):
        sums += block.sub_(highest).exp_().sum(dim=0)
    weights = sums.reciprocal_()
    weights[:num_words] /= max(num_words, 1)
    weights[num_words:] *= (config.alpha if num_words else 1.0) / num_tokens
    # The largest entry of a row was exp(0): the row's weight is its largest entry in C.
    return columns.mul_(weights), weights.sum()


@float32_products()
def _write_text_logits(vision: Tensor, text: Tensor, temperature: float, logits: Tensor) -> None:
    """Writes x t^T / temperature, x and t of unit rows, into `logits` [N, M]."""
    words = unit_rows(text).T
    for rows, out in zip(vision.split(_BLOCK_TOKENS), logits.split(_BLOCK_TOKENS), strict=True):
        # Products are divided by the lengths, not features: there are far fewer products.
        rows = rows.float()
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-8)
        torch.mm(rows, words, out=out).div_(lengths.mul_(temperature))


@float32_products()
def _write_image_logits(keys: Tensor, temperature: float, logits: Tensor) -> None:
    """Writes c c^T / temperature, c of unit rows, into `logits` [N, N]."""
    _write_symmetric(unit_rows(keys), temperature, logits)


def _write_symmetric(units: Tensor, temperature: float, logits: Tensor) -> None:
    """Writes c c^T / temperature into `logits` [N, N]; c is `units` [N, d].

    Only products above the diagonal are computed. Halving the tokens makes most of them parts of large products, which
    are faster: on 2 cores of an AMD EPYC (Zen 5), 2,880 tokens take 51 ms, and by blocks of 256 rows 60 ms.
    """
    num_tokens = len(units)
    if num_tokens <= _BLOCK_TOKENS:
        torch.mm(units, units.T, out=logits).div_(temperature)
        return
    half = num_tokens // 2
    above = logits[:half, half:]
    torch.mm(units[:half], units[half:].T, out=above).div_(temperature)
    logits[half:, :half] = above.T
    _write_symmetric(units[:half], temperature, logits[:half, :half])
    _write_symmetric(units[half:], temperature, logits[half:, half:])
