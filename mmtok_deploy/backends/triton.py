"""The selection on a GPU, in Triton: the reference's picks for a whole batch, without waiting for the host.

Five steps, each for all problems at once: norms, cosine logits (words with tokens, keys with keys), the rows' softmax
weights, the columns of C with a bound on each one's gain, and the picks. Launches depend on shapes alone, which the
host knows beforehand, and on no computed value. The kernels are in `triton_kernels.py`.

Exactness: float32 throughout. Tensor cores multiply float32 features by three TF32 products (tf32x3), which gives
cosines good to 1e-5, and 16-bit features exactly. Sums are float32, but truncated where the reference's are rounded.
Picks may therefore differ from the reference's where two gains are nearly equal. They may also differ between teams,
which sum in different orders.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtok_deploy.backends.triton_kernels import MEETING_WORDS
from mmtok_deploy.backends.triton_launch import IS_INTERPRETED, launch, load
from mmtok_deploy.backends.triton_layout import Layout, flattened, layout_of
from mmtok_deploy.backends.triton_plan import MAX_TOKENS, MIN_CAPABILITY, FeatureTypes, Plan, Team, plan, variants
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["check_device", "load_kernels", "select"]


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """A batch as the kernels take it.

    Args:
        layout: Offsets of each problem in flat tensors.
        plan: The launches.
        vision: [total tokens, D].
        words: [total words, D], of the same dtype.
        keys: [total tokens, d].
        excluded: [total tokens] uint8; None where no problem has any.
    """

    layout: Layout
    plan: Plan
    vision: Tensor
    words: Tensor
    keys: Tensor
    excluded: Tensor | None

    @property
    def device(self) -> torch.device:
        """The features' device."""
        return self.vision.device


@dataclass(frozen=True, slots=True, eq=False)
class _Picks:
    """Workspace and outputs of the last kernel, for all problems."""

    covered: Tensor
    meeting: Tensor
    order: Tensor
    kept: Tensor
    curve: Tensor
    totals: Tensor


def check_device(device: torch.device) -> None:
    """Raises ValueError if the kernels do not run on the device; the message says what to do."""
    if IS_INTERPRETED:
        return
    if device.type != "cuda":
        raise ValueError(
            f"backend 'triton' runs on CUDA devices, the features are on {device.type!r}: "
            "move them to a GPU, or choose backend 'auto' or 'reference'"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ValueError(
            f"backend 'triton' needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Ampere) or newer, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: choose backend 'reference'"
        )


def load_kernels(
    types: FeatureTypes, config: SelectionConfig, device: torch.device, tokens: Iterable[int] = (1, MAX_TOKENS)
) -> None:
    """Compiles or loads every kernel that a selection from such features may launch, in parallel.

    After this call, no selection waits for Triton's compiler.

    Args:
        types: The features' dtypes and widths.
        config: Temperatures, weight, coverage.
        device: Where the features will be.
        tokens: The fewest and the most tokens of an image, at most `MAX_TOKENS`.
    """
    if not IS_INTERPRETED:
        load(variants(types, config.coverage, _num_multiprocessors(device), tokens), device)


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns the selection of each problem; problems with features of the same width run together.

    Does not synchronize with the device. To capture it in a CUDA graph, call it once before with problems of the same
    shapes.

    Raises:
        RuntimeError: A CUDA graph is being captured, and these shapes have not been seen before.
    """
    by_width: dict[tuple[int, int], list[int]] = {}
    for idx, problem in enumerate(problems):
        by_width.setdefault((problem.vision.shape[1], problem.keys.shape[1]), []).append(idx)
    selections: dict[int, Selection] = {}
    for group in by_width.values():
        answers = _select_together([problems[idx] for idx in group], config)
        selections.update(zip(group, answers, strict=True))
    return [selections[idx] for idx in range(len(problems))]


def _select_together(
    problems: Sequence[SelectionProblem], config: SelectionConfig, team: Team | None = None
) -> list[Selection]:
    with torch.cuda.device_of(problems[0].vision):
        batch = _plan_batch(problems, config, team)
        logits, row_max, row_weight = _weighted_logits(batch, config)
        bounds = _finish_columns(batch, logits, row_max, row_weight)
        picks = _new_picks(batch)
        # The logits are the coverage now.
        _launch_picks(batch, logits, bounds, row_weight, picks)
    return _split(batch.layout, picks)


def _plan_batch(problems: Sequence[SelectionProblem], config: SelectionConfig, team: Team | None = None) -> _Batch:
    shapes = tuple((len(problem.vision), len(problem.text), problem.num_picks) for problem in problems)
    device = problems[0].vision.device
    layout = layout_of(shapes, config.coverage, device)
    vision, words = _of_one_dtype([each.vision for each in problems], [each.text for each in problems])
    keys = _multipliable([each.keys for each in problems])
    types = FeatureTypes(vision.dtype, keys.dtype, vision.shape[1], keys.shape[1])
    excluded = _flat_masks(problems)
    launches = plan(layout.size, types, config.coverage, excluded is not None, _num_multiprocessors(device), team)
    return _Batch(layout, launches, vision, words, keys, excluded)


def _flat_masks(problems: Sequence[SelectionProblem]) -> Tensor | None:
    masks = [problem.excluded for problem in problems]
    if all(mask is None for mask in masks):
        return None
    masks = [
        problem.vision.new_zeros(len(problem.vision), dtype=torch.bool) if mask is None else mask
        for mask, problem in zip(masks, problems, strict=True)
    ]
    return flattened([mask for mask in masks if mask is not None]).view(torch.uint8)


def _weighted_logits(batch: _Batch, config: SelectionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits of C by column, and each row's maximum and weight, which turn logits into entries of C."""
    layout, vision, num_parts = batch.layout, batch.vision, batch.plan.num_parts
    logits = vision.new_empty(layout.total_entries, dtype=torch.float32)
    part_max, part_sum = vision.new_empty((2, layout.total_rows, num_parts), dtype=torch.float32)
    similarities = (
        (batch.plan.words, batch.words, vision, config.tv_temp),
        (batch.plan.image, batch.keys, batch.keys, config.vv_temp),
    )
    for what, rows, columns, temperature in similarities:
        if what is None:
            continue
        column_norms = _norms(columns)
        row_norms = column_norms if rows is columns else _norms(rows)
        features = (rows, row_norms, columns, column_norms)
        numbers = (columns.shape[1], num_parts, float(temperature))
        launch(what, batch.device, layout.table, *features, logits, part_max, part_sum, *numbers)

    row_max, row_weight = vision.new_empty((2, layout.total_rows), dtype=torch.float32)
    if batch.plan.weights is not None:
        parts = (part_max, part_sum, row_max, row_weight)
        launch(batch.plan.weights, batch.device, layout.table, *parts, num_parts, float(config.alpha))
    return logits, row_max, row_weight


def _finish_columns(batch: _Batch, logits: Tensor, row_max: Tensor, row_weight: Tensor) -> Tensor:
    """Turns the logits into entries of C; returns a bound on each column's gain, [total tokens] float32."""
    bounds = logits.new_empty(batch.layout.total_tokens)
    if batch.plan.columns is not None:
        excluded = bounds if batch.excluded is None else batch.excluded
        launch(batch.plan.columns, batch.device, batch.layout.table, logits, row_max, row_weight, excluded, bounds)
    return bounds


def _new_picks(batch: _Batch) -> _Picks:
    """Returns six tensors, aligned to 16 bytes, in three allocations that are filled once each."""
    layout, vision = batch.layout, batch.vision
    num_problems, total_picks = len(layout.num_picks), sum(layout.num_picks)
    num_padded = -(-total_picks // 4) * 4
    num_meeting = num_problems * MEETING_WORDS
    num_covered = batch.plan.num_programs * layout.total_rows
    workspace = vision.new_zeros(num_meeting + num_covered // 2, dtype=torch.int64)
    # A team that gives up leaves these as they are: valid indices, and a total of NaN: no selection.
    indices = vision.new_zeros((2, num_padded), dtype=torch.int64)
    values = vision.new_full((num_padded + num_problems,), math.nan, dtype=torch.float32)
    return _Picks(
        covered=workspace[num_meeting:].view(torch.float32),
        meeting=workspace[:num_meeting],
        order=indices[0, :total_picks],
        kept=indices[1, :total_picks],
        curve=values[:total_picks],
        totals=values[num_padded:],
    )


def _launch_picks(batch: _Batch, coverage: Tensor, bounds: Tensor, row_weight: Tensor, picks: _Picks) -> None:
    answers = (picks.order, picks.kept, picks.curve, picks.totals)
    inputs = (batch.layout.table, coverage, bounds, row_weight, picks.covered, picks.meeting)
    launch(batch.plan.picks, batch.device, *inputs, *answers, batch.layout.total_rows)


def _split(layout: Layout, picks: _Picks) -> list[Selection]:
    parts = (each.split(layout.num_picks) for each in (picks.order, picks.kept, picks.curve))
    return [Selection(*answer) for answer in zip(*parts, picks.totals.unbind(), strict=True)]


def _of_one_dtype(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    flat_left, flat_right = _multipliable(left), _multipliable(right)
    if flat_left.dtype == flat_right.dtype:
        return flat_left, flat_right
    return flat_left.float(), flat_right.float()


def _multipliable(features: Sequence[Tensor]) -> Tensor:
    flat = flattened(features)
    # Triton's interpreter computes by NumPy, which has no bfloat16.
    return flat.float() if IS_INTERPRETED and flat.dtype == torch.bfloat16 else flat


def _norms(features: Tensor) -> Tensor:
    # The reference's norms: float32, also of 16-bit features.
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    return norms


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if IS_INTERPRETED:
        return 0
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
