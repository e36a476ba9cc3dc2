"""The selection on a GPU, in Triton: the reference's picks for a whole batch, without waiting for the host.

Five steps, each for all problems at once: norms, cosine logits (words with tokens, keys with keys), the rows' softmax
weights, the columns of C with a bound on each one's gain, and the picks. What the host knows beforehand, the shapes,
decides every launch; nothing that is computed does. The kernels are in `triton_kernels.py`.

Exactness: float32 throughout, with true float32 products. Features of 16 bits are multiplied as they are, on tensor
cores: each product is exact there, and sums are float32, but cut where the reference's are rounded. Picks may then
differ from the reference's where two gains are as good as equal. So may they, by the order of sums, between teams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from mmtok_deploy.backends.triton_kernels import MEETING_WORDS, coverage_columns, greedy_picks, row_weights, similarity
from mmtok_deploy.backends.triton_layout import Layout, flattened, layout_of
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["IS_INTERPRETED", "Team", "check_device", "select"]

IS_INTERPRETED = not isinstance(greedy_picks, triton.runtime.JITFunction)
"""Whether the kernels run on the CPU, for tests: TRITON_INTERPRET=1 was set when they were loaded."""

MIN_CAPABILITY = (8, 0)

# Estimates that no GPU has confirmed yet. They decide how fast the picks are made, and never which.
SMALL_TILE = 64  # tokens a side of a similarity tile
LARGE_TILE = 128  # the same, for 16-bit features of LARGE_TILE_MIN_TOKENS tokens or more
LARGE_TILE_MIN_TOKENS = 1024
WORDS_TILE = 32
COLUMNS_TILE = (8, 256)  # columns, rows
PICK_TILE = 8192  # entries of C in one step of an evaluation
LONE_CANDIDATES = 64
TEAM_CANDIDATES = 256  # of all programs together
TEAM_MAX_PROGRAMS = 64
TEAM_MIN_TOKENS = 512

MAX_SPINS = 1 << 22
"""How often a program of a team looks whether the others have arrived, before the selection is given up: seconds, if a
look takes about a microsecond. That has not been measured."""

FLOAT32_PRODUCTS: Literal["ieee", "tf32x3"] = "ieee"
"""How float32 features are multiplied. "ieee" is float32. "tf32x3", three products on tensor cores, keeps the golden
answers where it is emulated (tests/mmtok_deploy/triton/test_products.py), with cosines good to 1e-5 instead of 1e-6: it
waits for a GPU to show that it is faster. A single tf32 product does not keep them."""


@dataclass(frozen=True, slots=True)
class Team:
    """How many programs pick together for one problem, and how.

    Args:
        num_programs: More than one must all fit on the device at once, and do not run in Triton's interpreter.
        num_candidates: Columns that each of them may evaluate in one round, a power of two.
        is_meeting: Whether they meet each round; a single program may, for tests.
    """

    num_programs: int
    num_candidates: int
    is_meeting: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Picks:
    """What the last kernel writes, for all problems: its workspace, and the answers."""

    covered: Tensor
    meeting: Tensor
    order: Tensor
    kept: Tensor
    curve: Tensor
    totals: Tensor


def check_device(device: torch.device) -> None:
    """Raises ValueError, with what to do, unless the kernels run on the device."""
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


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns the selection of each problem; those with features of one width are done together.

    Never waits for the device. To capture it in a CUDA graph, call it once before with problems of the same shapes.

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
    vision = problems[0].vision
    with torch.cuda.device_of(vision):
        shapes = tuple((len(problem.vision), len(problem.text), problem.num_picks) for problem in problems)
        layout = layout_of(shapes, config.coverage, vision.device)
        coverage, row_max, row_weight = _weighted_logits(problems, layout, config)
        bounds = _finish_columns(problems, layout, coverage, row_max, row_weight)
        team = team or _choose_team(layout, vision.device)
        picks = _new_picks(layout, team, bounds)
        _launch_picks(layout, team, coverage, bounds, row_weight, picks)
    return _split(layout, picks)


def _weighted_logits(
    problems: Sequence[SelectionProblem], layout: Layout, config: SelectionConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits of C, by column, and each row's maximum and weight, which make them C's entries."""
    vision, words = _of_one_dtype([each.vision for each in problems], [each.text for each in problems])
    keys = _multipliable([each.keys for each in problems])
    is_half = (vision if config.coverage == "text" else keys).dtype != torch.float32
    tile = LARGE_TILE if is_half and layout.max_tokens >= LARGE_TILE_MIN_TOKENS else SMALL_TILE
    num_parts = triton.cdiv(layout.max_tokens, tile)

    coverage = vision.new_empty(layout.total_entries, dtype=torch.float32)
    part_max, part_sum = vision.new_empty((2, layout.total_rows, num_parts), dtype=torch.float32)
    logits = (coverage, part_max, part_sum)
    if layout.max_words:
        _launch_similarity(layout, words, vision, logits, config.tv_temp, tile, is_image=False)
    if config.coverage != "text" and layout.max_tokens:
        _launch_similarity(layout, keys, keys, logits, config.vv_temp, tile, is_image=True)

    row_max, row_weight = vision.new_empty((2, layout.total_rows), dtype=torch.float32)
    if layout.max_rows:
        row_weights[(triton.cdiv(layout.max_rows, 32), len(layout.num_picks))](
            layout.table,
            part_max,
            part_sum,
            row_max,
            row_weight,
            num_parts,
            config.alpha,
            COLUMNS=tile,
            ROWS=32,
            PARTS=triton.next_power_of_2(num_parts),
        )
    return coverage, row_max, row_weight


def _launch_similarity(
    layout: Layout,
    rows: Tensor,
    columns: Tensor,
    logits: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    tile: int,
    *,
    is_image: bool,
) -> None:
    column_norms = _norms(columns)
    row_tile = tile if is_image else WORDS_TILE
    num_row_tiles = triton.cdiv(layout.max_tokens if is_image else layout.max_words, row_tile)
    num_column_tiles = triton.cdiv(layout.max_tokens, tile)
    similarity[(num_row_tiles * num_column_tiles, len(layout.num_picks))](
        layout.table,
        rows,
        column_norms if is_image else _norms(rows),
        columns,
        column_norms,
        *logits,
        columns.shape[1],
        num_column_tiles,
        temperature,
        IS_IMAGE=is_image,
        ROWS=row_tile,
        COLUMNS=tile,
        DEPTH=(32 if FLOAT32_PRODUCTS == "ieee" else 16) if columns.dtype == torch.float32 else 64,
        PRECISION=FLOAT32_PRODUCTS,
        num_warps=8 if tile == LARGE_TILE else 4,
    )


def _finish_columns(
    problems: Sequence[SelectionProblem], layout: Layout, coverage: Tensor, row_max: Tensor, row_weight: Tensor
) -> Tensor:
    """Makes the logits C's entries; returns a bound on each column's gain, [total tokens] float32."""
    bounds = coverage.new_empty(layout.total_tokens)
    masks = [problem.excluded for problem in problems]
    has_excluded = any(mask is not None for mask in masks)
    excluded = bounds
    if has_excluded:
        nothing = [problem.vision.new_zeros(len(problem.vision), dtype=torch.bool) for problem in problems]
        excluded = flattened([each if mask is None else mask for mask, each in zip(masks, nothing, strict=True)])
        excluded = excluded.view(torch.uint8)
    if layout.max_tokens:
        coverage_columns[(triton.cdiv(layout.max_tokens, COLUMNS_TILE[0]), len(problems))](
            layout.table,
            coverage,
            row_max,
            row_weight,
            excluded,
            bounds,
            HAS_EXCLUDED=has_excluded,
            COLUMNS=COLUMNS_TILE[0],
            ROWS=COLUMNS_TILE[1],
        )
    return bounds


def _new_picks(layout: Layout, team: Team, like: Tensor) -> _Picks:
    num_problems, total_picks = len(layout.num_picks), sum(layout.num_picks)
    # What a team that gives up leaves as they are: valid indices, and a total that says that they are no selection.
    order, kept = like.new_zeros((2, total_picks), dtype=torch.int64)
    return _Picks(
        covered=like.new_zeros((team.num_programs, layout.total_rows)),
        meeting=like.new_zeros((num_problems, MEETING_WORDS), dtype=torch.int64),
        order=order,
        kept=kept,
        curve=like.new_empty(total_picks),
        totals=like.new_full((num_problems,), math.nan),
    )


def _launch_picks(
    layout: Layout, team: Team, coverage: Tensor, bounds: Tensor, row_weight: Tensor, picks: _Picks
) -> None:
    groups = team.num_programs * team.num_candidates
    greedy_picks[(team.num_programs, len(layout.num_picks))](
        layout.table,
        coverage,
        bounds,
        row_weight,
        picks.covered,
        picks.meeting,
        picks.order,
        picks.kept,
        picks.curve,
        picks.totals,
        layout.total_rows,
        IS_TEAM=team.is_meeting,
        NUM_PROGRAMS=team.num_programs,
        CANDIDATES=team.num_candidates,
        TURNS=triton.next_power_of_2(max(1, triton.cdiv(layout.max_tokens, groups))),
        ROWS=PICK_TILE // team.num_candidates,
        STAGES=3,
        MAX_SPINS=MAX_SPINS,
        num_warps=8,
        maxnreg=255,  # Else ptxas spills, so that a second program fits on the multiprocessor.
        launch_cooperative_grid=team.is_meeting,
    )


def _split(layout: Layout, picks: _Picks) -> list[Selection]:
    parts = (each.split(layout.num_picks) for each in (picks.order, picks.kept, picks.curve))
    return [Selection(*answer) for answer in zip(*parts, picks.totals.unbind(), strict=True)]


def _choose_team(layout: Layout, device: torch.device) -> Team:
    """Returns as many programs a problem as fit on the device together; one for small problems or large batches."""
    alone = Team(1, LONE_CANDIDATES, is_meeting=False)
    if IS_INTERPRETED or layout.max_tokens < TEAM_MIN_TOKENS:
        return alone
    num_fitting = torch.cuda.get_device_properties(device).multi_processor_count // len(layout.num_picks)
    if num_fitting < 4:
        return alone
    num_programs = min(TEAM_MAX_PROGRAMS, 1 << (num_fitting.bit_length() - 1))
    return Team(num_programs, max(4, min(64, TEAM_CANDIDATES // num_programs)), is_meeting=True)


def _of_one_dtype(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    flat_left, flat_right = _multipliable(left), _multipliable(right)
    if flat_left.dtype == flat_right.dtype:
        return flat_left, flat_right
    return flat_left.float(), flat_right.float()


def _multipliable(features: Sequence[Tensor]) -> Tensor:
    flat = flattened(features)
    # NumPy, which interprets, multiplies no bfloat16.
    return flat.float() if IS_INTERPRETED and flat.dtype == torch.bfloat16 else flat


def _norms(features: Tensor) -> Tensor:
    # The reference's norms: float32, also of 16-bit features.
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    return norms
