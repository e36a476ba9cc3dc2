"""Offsets of the problems of a ragged batch in flat tensors, computed from their shapes alone."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtok_deploy.backends.triton_plan import BatchSize
from mmtok_deploy.config import Coverage

__all__ = ["ROW_ALIGNMENT", "Field", "Layout", "Shape", "flattened", "layout_of"]

Shape = tuple[int, int, int]
"""Tokens, words and picks of one problem."""

ROW_ALIGNMENT = 32
"""Float32 numbers a cache line: the blocks of rows begin on one, so that columns are read in whole lines."""

_ADDRESS_ALIGNMENT = 16


class Field(enum.IntEnum):
    """The columns of `Layout.table`, one row a problem.

    The matrix C of a problem is stored by column: C[row, column] at FIRST_ENTRY + column * NUM_ROWS + row. Rows
    0 .. IMAGE_ROWS cover the image, rows WORD_ROW .. WORD_ROW + NUM_WORDS the text; the rest of NUM_ROWS is padding.
    """

    NUM_TOKENS = 0
    NUM_WORDS = 1
    NUM_PICKS = 2
    IMAGE_ROWS = 3
    WORD_ROW = 4
    NUM_ROWS = 5
    FIRST_TOKEN = 6
    FIRST_WORD = 7
    FIRST_PICK = 8
    FIRST_ROW = 9
    FIRST_ENTRY = 10


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A batch's offsets in flat tensors, in which the problems lie one after another.

    Args:
        table: [B, len(Field)] int64 on the device.
        num_picks: K of each problem.
        size: What decides the launches.
        total_tokens: Tokens of all problems.
        total_rows: Rows of all problems; padding is counted here and below.
        total_entries: Entries of all problems' C.
        copied: Recorded after `table` is copied to the device; None without a copy.
    """

    table: Tensor
    num_picks: tuple[int, ...]
    size: BatchSize
    total_tokens: int
    total_rows: int
    total_entries: int
    copied: torch.cuda.Event | None


# A CUDA graph reads its tables at each replay, so these are never freed.
_in_graphs: dict[int, Layout] = {}


def layout_of(shapes: tuple[Shape, ...], coverage: Coverage, device: torch.device) -> Layout:
    """Returns the batch's layout, its table ready for the current stream.

    Raises:
        RuntimeError: The current stream is being captured, and these shapes have not been seen before.
    """
    if device.type != "cuda":
        return _make_layout(shapes, coverage, device)
    if not torch.cuda.is_current_stream_capturing():
        layout = _make_layout(shapes, coverage, device)
        stream = torch.cuda.current_stream(device)
        if layout.copied is not None:
            stream.wait_event(layout.copied)
        layout.table.record_stream(stream)
        return layout
    layout = _make_layout(shapes, coverage, device)
    _in_graphs[id(layout)] = layout
    return layout


@functools.lru_cache(maxsize=1024)
def _make_layout(shapes: tuple[Shape, ...], coverage: Coverage, device: torch.device) -> Layout:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A captured copy runs at each replay, from host memory that may be freed by then.
        raise RuntimeError("a CUDA graph is being captured: select once before with problems of the same shapes")
    rows = []
    first_token = first_word = first_pick = first_row = first_entry = 0
    for num_tokens, num_words, num_picks in shapes:
        image_rows = 0 if coverage == "text" else num_tokens
        word_rows = 0 if coverage == "vision" or not num_tokens else num_words
        word_row = _padded(image_rows)
        num_rows = word_row + _padded(word_rows)
        fields = {
            Field.NUM_TOKENS: num_tokens,
            Field.NUM_WORDS: word_rows,
            Field.NUM_PICKS: num_picks,
            Field.IMAGE_ROWS: image_rows,
            Field.WORD_ROW: word_row,
            Field.NUM_ROWS: num_rows,
            Field.FIRST_TOKEN: first_token,
            Field.FIRST_WORD: first_word,
            Field.FIRST_PICK: first_pick,
            Field.FIRST_ROW: first_row,
            Field.FIRST_ENTRY: first_entry,
        }
        rows.append([fields[field] for field in Field])
        first_token += num_tokens
        first_word += num_words
        first_pick += num_picks
        first_row += num_rows
        first_entry += num_tokens * num_rows
    table, copied = _on_device(torch.tensor(rows, dtype=torch.int64), device)
    return Layout(
        table=table,
        num_picks=tuple(row[Field.NUM_PICKS] for row in rows),
        size=BatchSize(
            num_problems=len(rows),
            max_tokens=max(row[Field.NUM_TOKENS] for row in rows),
            max_words=max(row[Field.NUM_WORDS] for row in rows),
            max_rows=max(row[Field.NUM_ROWS] for row in rows),
        ),
        total_tokens=first_token,
        total_rows=first_row,
        total_entries=first_entry,
        copied=copied,
    )


def _on_device(table: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    if device.type != "cuda":
        return table, None
    table = table.pin_memory().to(device, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(device))
    return table, copied


def _padded(num_rows: int) -> int:
    return -(-num_rows // ROW_ALIGNMENT) * ROW_ALIGNMENT


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the tensors concatenated, at an address that is a multiple of 16 bytes, as the kernels expect.

    Nothing is copied if they already lie so in memory, as an encoder's batch does.
    """
    first = tensors[0]
    address = first.data_ptr()
    is_aligned = address % _ADDRESS_ALIGNMENT == 0
    for tensor in tensors:
        is_next = tensor.data_ptr() == address and tensor.is_contiguous() and tensor.dtype == first.dtype
        if not (is_aligned and is_next) or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(tensors)).contiguous()
        address += tensor.nbytes
    if len(tensors) == 1:
        return first
    num_rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((num_rows, *first.shape[1:]), first.stride())
