"""The selection without holding the whole coverage matrix: columns are computed when needed, and few are needed."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmtok_deploy.backends.lazy_greedy import select_lazily
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import unit_rows
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["MAX_BYTES", "MAX_HOST_BYTES", "max_matrix_bytes", "select", "within_memory"]

MAX_BYTES = 256 << 20
"""Bytes of coverage matrices held at a time: one image of 8,192 tokens, or 202 of 576."""

MAX_HOST_BYTES = 1280 << 20
"""The same where the features are in the host's memory, of which there is more: one image of 16,384 tokens."""

_FLOAT32_BYTES = 4
# Columns evaluated together. Measured at N=16384, K=256 on two CPU cores: 64 is slower, 256 is not faster.
_BLOCK = 128
# A block of columns, and temporaries of its size while it is computed and its gains are summed.
_BLOCKS_AT_WORK = 4


def select(
    problems: Sequence[SelectionProblem], config: SelectionConfig, *, max_bytes: int = MAX_BYTES
) -> list[Selection]:
    """Returns the selection of each problem, one after another; picks equal the reference's except for close calls.

    The coverage matrix C = [P; alpha Q] of M + N rows and N columns is never held as a whole: at most `max_bytes` of
    it (one column times five, if that is more), beside float32 copies of `keys` and `text`. Its columns are computed
    from the features twice, once for the softmax and once for the first gains. After that, lazy evaluation needs few
    of them: a gain only falls as tokens are picked, so an old gain is an upper bound, and only the columns with the
    highest bounds are evaluated again.

    The host waits for the device at every pick.

    Args:
        problems: What to select from.
        config: Temperatures, weight, coverage.
        max_bytes: The most bytes of C held at a time.

    Source: MMTok, arXiv 2508.18264, Algorithm 2; lazy evaluation: Minoux, "Accelerated greedy algorithms", 1978.
    """
    return [_select_one(problem, config, max_bytes) for problem in problems]


def max_matrix_bytes(device: torch.device) -> int:
    """Returns the most bytes of coverage matrices held at a time on a device."""
    return MAX_HOST_BYTES if device.type == "cpu" else MAX_BYTES


def within_memory(
    dense: Callable[[Sequence[SelectionProblem], SelectionConfig], list[Selection]], *, max_bytes: int = MAX_BYTES
) -> Callable[[Sequence[SelectionProblem], SelectionConfig], list[Selection]]:
    """Returns a backend whose matrices never take more than `max_bytes` together, however large the batch.

    Args:
        dense: The backend for what fits: it is called once, or once for each part of the batch that fits. A problem
            that does not fit alone is selected here, by blocks.
        max_bytes: The most bytes of matrices. What `dense` allocates beside them is not counted (the reference: another
            1.9 to 3.8 times as much, growing with the budget).
    """

    @functools.wraps(dense)
    def bounded(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
        groups: list[list[SelectionProblem]] = []
        room = 0
        for problem in problems:
            size_bytes = _matrix_bytes(problem)
            if size_bytes > room or not groups:
                groups.append([])
                room = max_bytes
            groups[-1].append(problem)
            room -= size_bytes
        selections = []
        for group in groups:
            fits = _matrix_bytes(group[0]) <= max_bytes
            selections += dense(group, config) if fits else select(group, config, max_bytes=max_bytes)
        return selections

    return bounded


def _matrix_bytes(problem: SelectionProblem) -> int:
    num_tokens = len(problem.vision)
    return _FLOAT32_BYTES * (len(problem.text) + num_tokens) * num_tokens


def _select_one(problem: SelectionProblem, config: SelectionConfig, max_bytes: int) -> Selection:
    if not len(problem.vision):
        nothing = problem.vision.new_zeros(0, dtype=torch.float32)
        return Selection(nothing.long(), nothing.long(), nothing, nothing.sum())
    columns = _Columns(problem, config, max_bytes)
    return select_lazily(columns, columns.total, problem)


def _gains(columns: Tensor, covered: Tensor) -> Tensor:
    """Returns [b] float32: by how much each of the [b, R] columns raises f."""
    return (columns - covered).clamp_min_(0).sum(dim=1)


class _Columns:
    """The columns of one problem's C, computed in blocks; the most recently used ones are kept, within the bound.

    Every block has the same shape, so that a column has nearly the same bits each time: otherwise an old gain would not
    be an upper bound. A column's last bits may still depend on its place in the block, so an old gain is an upper bound
    up to rounding, which can decide close calls only.
    """

    def __init__(self, problem: SelectionProblem, config: SelectionConfig, max_bytes: int) -> None:
        self.num_columns = len(problem.vision)
        self.device = problem.vision.device
        # Each part of C: unit rows, what the columns are made of, temperature, weight of a row.
        self._parts: list[tuple[Tensor, Tensor, float, float]] = []
        if config.coverage != "vision" and len(problem.text):
            text = unit_rows(problem.text)
            self._parts.append((text, problem.vision, config.tv_temp, 1 / len(text)))
        if config.coverage != "text":
            keys = unit_rows(problem.keys)
            weight = config.alpha if self._parts else 1.0
            self._parts.append((keys, keys, config.vv_temp, weight / len(keys)))
        self.num_rows = sum(len(rows) for rows, *_ in self._parts)

        max_columns = max_bytes // (_FLOAT32_BYTES * self.num_rows)
        self.chunk_tokens = max(1, min(_BLOCK, self.num_columns, max_columns // (_BLOCKS_AT_WORK + 1)))
        num_held = max(self.chunk_tokens, min(self.num_columns, max_columns - _BLOCKS_AT_WORK * self.chunk_tokens))
        self._held = torch.empty(num_held, self.num_rows, device=self.device)
        self._place: OrderedDict[int, int] = OrderedDict()
        self._highest, self._scale = self._softmax_statistics()
        self.total: Tensor = self._scale.sum()
        nothing = torch.zeros(self.num_rows, device=self.device)
        self.bounds = torch.cat([_gains(self._compute(block), nothing) for block in self._blocks()])

    def gains(self, tokens: Tensor, covered: Tensor) -> Tensor:
        """See `Columns.gains`."""
        chunks = tokens.split(self.chunk_tokens)
        return torch.cat([_gains(self._take(chunk.tolist()), covered) for chunk in chunks])

    def column(self, token: int) -> Tensor:
        """See `Columns.column`."""
        return self._take([token])[0]

    def _take(self, wanted: Sequence[int]) -> Tensor:
        """Returns [b, R] float32: these columns of C, at most `chunk_tokens`."""
        for column in self._place.keys() & set(wanted):
            self._place.move_to_end(column)
        missing = [column for column in dict.fromkeys(wanted) if column not in self._place]
        if missing:
            for column in missing:
                # Replaces the least recently used column. Wanted columns are at the end, and a whole block fits.
                is_full = len(self._place) == len(self._held)
                self._place[column] = self._place.popitem(last=False)[1] if is_full else len(self._place)
            self._held[[self._place[column] for column in missing]] = self._compute(missing)
        return self._held[[self._place[column] for column in wanted]]

    def _blocks(self) -> list[range]:
        starts = range(0, self.num_columns, self.chunk_tokens)
        return [range(start, min(start + self.chunk_tokens, self.num_columns)) for start in starts]

    def _compute(self, wanted: Sequence[int]) -> Tensor:
        return self._logits(wanted).sub_(self._highest).exp_().mul_(self._scale)

    @float32_products()
    def _logits(self, wanted: Sequence[int]) -> Tensor:
        """Returns [b, R] float32: the similarities of these columns over the temperature."""
        padded = [*wanted, *[wanted[-1]] * (self.chunk_tokens - len(wanted))]
        idx = torch.tensor(padded, device=self.device)
        logits = torch.empty(self.chunk_tokens, self.num_rows, device=self.device)
        start = 0
        for rows, source, temperature, _ in self._parts:
            columns = source[idx] if source is rows else unit_rows(source[idx])
            torch.matmul(columns, rows.T, out=logits[:, start : start + len(rows)]).div_(temperature)
            start += len(rows)
        return logits[: len(wanted)]

    def _softmax_statistics(self) -> tuple[Tensor, Tensor]:
        """Returns, for each row, its highest logit and its weight over the sum of its exponentials, both [R].

        The second is also the row's largest entry in C, since e^0 = 1.
        """
        highest = torch.full((self.num_rows,), float("-inf"), device=self.device)
        sums = torch.zeros(self.num_rows, device=self.device)
        for block in self._blocks():
            logits = self._logits(block)
            raised = torch.maximum(highest, logits.amax(dim=0))
            sums = sums * (highest - raised).exp_() + logits.sub_(raised).exp_().sum(dim=0)
            highest = raised
        weights = [torch.full((len(rows),), weight, device=self.device) for rows, *_, weight in self._parts]
        return highest, torch.cat(weights) / sums
