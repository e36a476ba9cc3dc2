"""The launches of a batch, computed from its sizes and dtypes alone.

Triton compiles a kernel anew for each combination of its constants and of what it specialises arguments by. Here both
come from buckets, so that `variants` can list every combination that a server needs, to be compiled before its first
request.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch

from mmtok_deploy.config import Coverage

__all__ = [
    "MAX_TOKENS",
    "MIN_CAPABILITY",
    "BatchSize",
    "FeatureTypes",
    "Launch",
    "Plan",
    "Team",
    "Variant",
    "plan",
    "variants",
]

MAX_TOKENS = 1 << 14
"""The most tokens of an image for `variants`; the kernels of a larger one are compiled when it is selected from."""

MIN_CAPABILITY = (8, 0)
"""The oldest GPUs that the kernels run on: Ampere's."""

# These change how fast picks are made, never which. Pick tiles were measured on an H200, the others were not.
SMALL_TILE = 64  # tokens a side of a similarity tile
LARGE_TILE = 128  # the same, for 16-bit features of LARGE_TILE_MIN_TOKENS tokens or more
LARGE_TILE_MIN_TOKENS = 1024
WORDS_TILE = 32
COLUMNS_TILE = (8, 256)  # columns, rows
WEIGHTS_ROWS = 32
# Entries of C in one step of an evaluation, of a program by itself and of one of a team.
LONE_PICK_TILE = 8192
TEAM_PICK_TILE = 2048
LONE_CANDIDATES = 64
# Measured on an H200, 4 to 128 programs, 576 to 2,880 tokens: the more programs and the fewer candidates, the faster
# (but 8 programs on 576 tokens are 6% faster with 32 candidates each than with 8).
TEAM_CANDIDATES = 64  # of all programs together
TEAM_MIN_CANDIDATES = 4
TEAM_MAX_PROGRAMS = 128
TEAM_MIN_TOKENS = 512
# Sizes up to which a kernel is compiled: similarity tiles a row, columns a group.
PARTS = (16, 64, 256)
TURNS = (4, 16, 64, 256)

MAX_SPINS = 1 << 22
"""How often a program of a team checks whether the others have arrived before it gives up: seconds, if a check takes
about a microsecond, which has not been measured."""

FLOAT32_PRODUCTS: Literal["ieee", "tf32x3"] = "tf32x3"
"""How float32 features are multiplied. "tf32x3", three products on tensor cores, keeps all golden answers with every
team on an H200, and takes 0.3 to 0.7 ms less a selection than "ieee", which is float32. Its cosines are good to 1e-5 in
place of 1e-6. A single tf32 product does not keep the answers (tests/mmtok_deploy/triton/test_products.py)."""

# An integer that Triton does not specialise a kernel by.
_ANY_INT = 2
# A number of rows: always whole cache lines.
_ALIGNED_INT = 32


class Team(NamedTuple):
    """How many programs pick together for one problem, and how.

    Args:
        num_programs: More than one must all fit on the device at once, and do not run in Triton's interpreter.
        num_candidates: Columns that each of them may evaluate in one round, a power of two.
        is_meeting: Whether they synchronize each round; a single program may, for tests.
    """

    num_programs: int
    num_candidates: int
    is_meeting: bool


class BatchSize(NamedTuple):
    """The sizes of a batch that decide its launches: `Layout.size`.

    Args:
        num_problems: B.
        max_tokens: N of the largest problem.
        max_words: M of the one with most words to cover.
        max_rows: Rows of the largest C, with padding.
    """

    num_problems: int
    max_tokens: int
    max_words: int
    max_rows: int


class FeatureTypes(NamedTuple):
    """The features' dtypes and widths.

    Args:
        vision: The dtype of vision tokens and words.
        keys: The dtype of vision features before the projector.
        vision_width: D.
        keys_width: d.
    """

    vision: torch.dtype
    keys: torch.dtype
    vision_width: int
    keys_width: int


class Variant(NamedTuple):
    """A kernel as Triton compiles it.

    Args:
        kernel: Its name.
        arguments: Its arguments up to the constants: a tensor's dtype (tensors are aligned to 16 bytes), or a number
            that Triton specialises as those of the launch.
        constants: Names and values, in the order of its parameters.
        options: Triton's.
    """

    kernel: str
    arguments: tuple[torch.dtype | int | float, ...]
    constants: tuple[tuple[str, int | str], ...]
    options: tuple[tuple[str, int], ...] = ()


class Launch(NamedTuple):
    """One launch of a kernel."""

    variant: Variant
    grid: tuple[int, int]


class Plan(NamedTuple):
    """A batch's launches in their order; None where there is nothing to do.

    Args:
        num_parts: Similarity tiles a row.
        words: `similarity` of words and vision tokens.
        image: `similarity` of keys.
        weights: `row_weights`.
        columns: `coverage_columns`.
        picks: `greedy_picks`.
        num_programs: Programs that pick for one problem.
    """

    num_parts: int
    words: Launch | None
    image: Launch | None
    weights: Launch | None
    columns: Launch | None
    picks: Launch
    num_programs: int

    @property
    def launches(self) -> list[Launch]:
        """The launches that there are."""
        every = (self.words, self.image, self.weights, self.columns, self.picks)
        return [launch for launch in every if launch is not None]


@functools.lru_cache(maxsize=4096)
def plan(
    size: BatchSize,
    types: FeatureTypes,
    coverage: Coverage,
    has_excluded: bool,
    num_multiprocessors: int,
    team: Team | None = None,
) -> Plan:
    """Returns the launches of a batch.

    Args:
        size: Sizes of the batch.
        types: Dtypes and widths of the features.
        coverage: What is to be covered.
        has_excluded: Whether any problem has tokens never to pick.
        num_multiprocessors: Number on the device; 0 where programs run one after another.
        team: The team that picks; None lets `_choose_team` decide.
    """
    is_half = (types.vision if coverage == "text" else types.keys) != torch.float32
    tile = LARGE_TILE if is_half and size.max_tokens >= LARGE_TILE_MIN_TOKENS else SMALL_TILE
    num_parts = _cdiv(size.max_tokens, tile)
    words = image = weights = columns = None
    if size.max_words:
        grid = _cdiv(size.max_words, WORDS_TILE) * num_parts, size.num_problems
        words = Launch(_similarity(types.vision, types.vision_width, WORDS_TILE, tile, is_image=False), grid)
    if coverage != "text" and size.max_tokens:
        grid = num_parts * num_parts, size.num_problems
        image = Launch(_similarity(types.keys, types.keys_width, tile, tile, is_image=True), grid)
    if size.max_rows:
        weights = Launch(_row_weights(tile, num_parts), (_cdiv(size.max_rows, WEIGHTS_ROWS), size.num_problems))
    if size.max_tokens:
        grid = _cdiv(size.max_tokens, COLUMNS_TILE[0]), size.num_problems
        columns = Launch(_coverage_columns(has_excluded), grid)
    team = team or _choose_team(size, num_multiprocessors)
    picks = Launch(_greedy_picks(team, size.max_tokens), (team.num_programs, size.num_problems))
    return Plan(num_parts, words, image, weights, columns, picks, team.num_programs)


def variants(
    types: FeatureTypes, coverage: Coverage, num_multiprocessors: int, tokens: Iterable[int] = (1, MAX_TOKENS)
) -> list[Variant]:
    """Returns every variant that any batch of such features launches, whatever its words, picks and masks.

    Args:
        types: The features'.
        coverage: What is to be covered.
        num_multiprocessors: The device's.
        tokens: The fewest and the most that the largest image of a batch has, at most `MAX_TOKENS`.
    """
    fewest, most = min(tokens), max(tokens)
    # Every bucket ends at a power of two, or before one.
    ends = {end for power in range(MAX_TOKENS.bit_length()) for end in (1 << power, (1 << power) - 1)}
    sizes = {fewest, most, *(end for end in ends if fewest < end < most)}
    # One batch for each number of programs that a problem can get.
    batches = {max(1, num_multiprocessors >> power) for power in range(TEAM_MAX_PROGRAMS.bit_length())}
    found: dict[Variant, None] = {}
    for max_tokens in sorted(sizes):
        for num_problems in sorted(batches):
            for max_words in (0, 1) if coverage == "multimodal" else (1,) if coverage == "text" else (0,):
                for has_excluded in (False, True):
                    size = BatchSize(num_problems, max_tokens, max_words, max_rows=1)
                    launches = plan(size, types, coverage, has_excluded, num_multiprocessors).launches
                    found.update((launch.variant, None) for launch in launches)
    return list(found)


def _choose_team(size: BatchSize, num_multiprocessors: int) -> Team:
    """Returns as many programs a problem as fit on the device together; one for small problems or large batches."""
    num_fitting = num_multiprocessors // max(1, size.num_problems)
    if size.max_tokens < TEAM_MIN_TOKENS or num_fitting < 4:
        return Team(1, LONE_CANDIDATES, is_meeting=False)
    num_programs = min(TEAM_MAX_PROGRAMS, 1 << (num_fitting.bit_length() - 1))
    return Team(num_programs, max(TEAM_MIN_CANDIDATES, TEAM_CANDIDATES // num_programs), is_meeting=True)


def _similarity(dtype: torch.dtype, width: int, row_tile: int, tile: int, *, is_image: bool) -> Variant:
    float32 = torch.float32
    # Triton takes 1 for a constant, and knows of multiples of 16.
    width = 16 if width % 16 == 0 else 1 if width == 1 else _ANY_INT
    depth = 64 if dtype != float32 else 32 if FLOAT32_PRODUCTS == "ieee" else 16
    return Variant(
        "similarity",
        (torch.int64, dtype, float32, dtype, float32, float32, float32, float32, width, _ANY_INT, 0.0),
        (
            ("IS_IMAGE", is_image),
            ("ROWS", row_tile),
            ("COLUMNS", tile),
            ("DEPTH", depth),
            ("PRECISION", FLOAT32_PRODUCTS),
        ),
        (("num_warps", 8 if tile == LARGE_TILE else 4),),
    )


def _row_weights(tile: int, num_parts: int) -> Variant:
    return Variant(
        "row_weights",
        (torch.int64, *[torch.float32] * 4, _ANY_INT, 0.0),
        (("COLUMNS", tile), ("ROWS", WEIGHTS_ROWS), ("PARTS", _bucket(num_parts, PARTS))),
    )


def _coverage_columns(has_excluded: bool) -> Variant:
    excluded = torch.uint8 if has_excluded else torch.float32
    return Variant(
        "coverage_columns",
        (torch.int64, *[torch.float32] * 3, excluded, torch.float32),
        (("HAS_EXCLUDED", has_excluded), ("COLUMNS", COLUMNS_TILE[0]), ("ROWS", COLUMNS_TILE[1])),
    )


def _greedy_picks(team: Team, max_tokens: int) -> Variant:
    num_groups = team.num_programs * team.num_candidates
    return Variant(
        "greedy_picks",
        (torch.int64, *[torch.float32] * 4, *[torch.int64] * 3, *[torch.float32] * 2, _ALIGNED_INT),
        (
            ("IS_TEAM", team.is_meeting),
            ("NUM_PROGRAMS", team.num_programs),
            ("CANDIDATES", team.num_candidates),
            ("TURNS", _bucket(_cdiv(max_tokens, num_groups), TURNS)),
            ("ROWS", (TEAM_PICK_TILE if team.num_programs > 1 else LONE_PICK_TILE) // team.num_candidates),
            ("STAGES", 3),
            ("MAX_SPINS", MAX_SPINS),
        ),
        # Without maxnreg ptxas spills, so that a second program fits on the multiprocessor.
        (("num_warps", 8), ("maxnreg", 255), ("launch_cooperative_grid", team.is_meeting)),
    )


def _bucket(size: int, buckets: tuple[int, ...]) -> int:
    """Returns the smallest bucket that holds `size`; beyond the last one, the next power of two."""
    return next((bucket for bucket in buckets if size <= bucket), 1 << (size - 1).bit_length())


def _cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
