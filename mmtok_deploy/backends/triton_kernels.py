"""The Triton kernels of the selection: cosine logits, softmax weights, coverage columns, lazy greedy picks.

All problems of a batch are done by one launch of each kernel; `problems` is `Layout.table`, which says where each
lies in flat tensors. C is stored by column, so that a column is contiguous, and its padding rows are zero. Sums run in
one fixed order: equal launches give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmtok_deploy.backends.triton_layout import ROW_ALIGNMENT, Field

__all__ = ["MEETING_WORDS", "coverage_columns", "greedy_picks", "row_weights", "similarity"]

MEETING_WORDS = 4
"""Integers that a team synchronizes by: three slots for the largest key, used in turn, and the number of arrivals."""

# Triton reads globals only as constexpr.
_NUM_FIELDS = tl.constexpr(len(Field))
_NUM_TOKENS = tl.constexpr(int(Field.NUM_TOKENS))
_NUM_WORDS = tl.constexpr(int(Field.NUM_WORDS))
_NUM_PICKS = tl.constexpr(int(Field.NUM_PICKS))
_IMAGE_ROWS = tl.constexpr(int(Field.IMAGE_ROWS))
_WORD_ROW = tl.constexpr(int(Field.WORD_ROW))
_NUM_ROWS = tl.constexpr(int(Field.NUM_ROWS))
_FIRST_TOKEN = tl.constexpr(int(Field.FIRST_TOKEN))
_FIRST_WORD = tl.constexpr(int(Field.FIRST_WORD))
_FIRST_PICK = tl.constexpr(int(Field.FIRST_PICK))
_FIRST_ROW = tl.constexpr(int(Field.FIRST_ROW))
_FIRST_ENTRY = tl.constexpr(int(Field.FIRST_ENTRY))

_MEETING_WORDS = tl.constexpr(MEETING_WORDS)
_ROW_ALIGNMENT = tl.constexpr(ROW_ALIGNMENT)
# In place of a bound: the column is excluded, or was picked.
_BARRED = tl.constexpr(-1.0)
_PICKED = tl.constexpr(-2.0)
# In place of a bound's bits: not to be picked.
_OUT = tl.constexpr(-1)
_SIGN = tl.constexpr(-(2**31))
_MAX_INDEX = tl.constexpr(2**31 - 1)
# In place of the number of arrivals: a program of the team has waited too long, and all of them stop waiting.
_GIVEN_UP = tl.constexpr(2**62)


@triton.jit(do_not_specialize=["num_parts"])
def similarity(
    problems,
    row_features,
    row_norms,
    column_features,
    column_norms,
    coverage,
    part_max,
    part_sum,
    width,
    num_parts,
    temperature,
    IS_IMAGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes cosine / temperature of one tile of rows and columns, and the tile's share of each row's softmax.

    The norms divide the product and not the features, so that 16-bit features are multiplied as they are: a product
    of two of them is exact in float32, and tensor cores add in float32. The image's matrix is symmetric: of each two
    mirrored tiles one is computed and both are written.

    Args:
        row_features: [total rows, width], words or keys, as wide and of the same dtype as `column_features`.
        row_norms: [total rows] float32.
        column_features: [total tokens, width], vision tokens or keys.
        column_norms: [total tokens] float32.
        coverage: Receives the logits, transposed.
        part_max: [total rows of C, num_parts] float32, receives each row's largest logit among the tile's columns.
        part_sum: [total rows of C, num_parts] float32, receives sum exp(logit - part_max) over them.
        temperature: Temperature of the softmax.
        IS_IMAGE: Rows are the columns themselves (keys) and ROWS == COLUMNS; else they are words.

    Grid: (row tiles * column tiles of the largest problem, B).
    """
    problem = problems + tl.program_id(1) * _NUM_FIELDS
    num_tokens = tl.load(problem + _NUM_TOKENS).to(tl.int32)
    num_column_tiles = tl.cdiv(num_tokens, COLUMNS)
    if IS_IMAGE:
        num_vectors = num_tokens
        first_vector = tl.load(problem + _FIRST_TOKEN)
        first_row = 0
    else:
        num_vectors = tl.load(problem + _NUM_WORDS).to(tl.int32)
        first_vector = tl.load(problem + _FIRST_WORD)
        first_row = tl.load(problem + _WORD_ROW).to(tl.int32)
    tile = tl.program_id(0)
    if tile >= tl.cdiv(num_vectors, ROWS) * num_column_tiles:
        return
    row_tile = tile // num_column_tiles
    column_tile = tile % num_column_tiles
    if IS_IMAGE:  # noqa: SIM102 - only the outer condition is known when compiling
        if row_tile > column_tile:
            return

    row = row_tile * ROWS
    column = column_tile * COLUMNS
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_row = row + rows < num_vectors
    is_column = column + columns < num_tokens
    row_vector = first_vector + row
    column_vector = tl.load(problem + _FIRST_TOKEN) + column
    row_features += row_vector * width
    column_features += column_vector * width

    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = tl.load(
            row_features + rows[:, None] * width + depth[None, :],
            mask=is_row[:, None] & (depth < width)[None, :],
            other=0.0,
        )
        right = tl.load(
            column_features + columns[None, :] * width + depth[:, None],
            mask=is_column[None, :] & (depth < width)[:, None],
            other=0.0,
        )
        products = tl.dot(left, right, products, input_precision=PRECISION)

    row_scale = 1.0 / tl.maximum(tl.load(row_norms + row_vector + rows, mask=is_row, other=1.0), 1e-8)
    column_scale = 1.0 / tl.maximum(tl.load(column_norms + column_vector + columns, mask=is_column, other=1.0), 1e-8)
    logits = products * row_scale[:, None] * column_scale[None, :] / temperature

    num_rows = tl.multiple_of(tl.load(problem + _NUM_ROWS).to(tl.int32), _ROW_ALIGNMENT)
    matrix = coverage + tl.multiple_of(tl.load(problem + _FIRST_ENTRY), _ROW_ALIGNMENT)
    inside = is_row[:, None] & is_column[None, :]
    tile_start = matrix + column.to(tl.int64) * num_rows + first_row + row
    tl.store(tile_start + columns[None, :] * num_rows + rows[:, None], logits, mask=inside)
    first_part = (tl.multiple_of(tl.load(problem + _FIRST_ROW), _ROW_ALIGNMENT) + first_row) * num_parts
    over_columns = tl.where(is_column[None, :], logits, float("-inf"))
    _store_part(part_max, part_sum, first_part + (row + rows) * num_parts + column_tile, over_columns, 1, is_row)
    if IS_IMAGE:  # noqa: SIM102
        if row_tile < column_tile:
            tile_start = matrix + row.to(tl.int64) * num_rows + column
            tl.store(tile_start + rows[:, None] * num_rows + columns[None, :], logits, mask=inside)
            over_rows = tl.where(is_row[:, None], logits, float("-inf"))
            _store_part(
                part_max, part_sum, first_part + (column + columns) * num_parts + row_tile, over_rows, 0, is_column
            )


@triton.jit
def _store_part(part_max, part_sum, parts, logits, AXIS: tl.constexpr, mask):
    """Stores the largest logit along an axis and sum exp(logit - largest)."""
    largest = tl.max(logits, axis=AXIS)
    total = tl.sum(tl.exp(logits - tl.expand_dims(largest, AXIS)), axis=AXIS)
    tl.store(part_max + parts, largest, mask=mask)
    tl.store(part_sum + parts, total, mask=mask)


@triton.jit(do_not_specialize=["num_parts"])
def row_weights(
    problems,
    part_max,
    part_sum,
    row_max,
    row_weight,
    num_parts,
    alpha,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Writes what turns a row's logits into its entries of C: exp(logit - row_max) * row_weight.

    The weight is also the row's largest entry. Padding rows get weight 0.

    Args:
        row_max: [total rows of C] float32.
        row_weight: [total rows of C] float32.
        alpha: Weight of the image rows beside text rows.
        COLUMNS: As of the `similarity` tiles.
        PARTS: A power of two, num_parts or more.

    Grid: (ceil(rows of the largest problem / ROWS), B).
    """
    problem = problems + tl.program_id(1) * _NUM_FIELDS
    num_rows = tl.multiple_of(tl.load(problem + _NUM_ROWS).to(tl.int32), _ROW_ALIGNMENT)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= num_rows:
        return
    num_tokens = tl.load(problem + _NUM_TOKENS).to(tl.int32)
    num_words = tl.load(problem + _NUM_WORDS).to(tl.int32)
    first_word = tl.load(problem + _WORD_ROW).to(tl.int32)
    is_text = (rows >= first_word) & (rows < first_word + num_words)
    is_entry = is_text | (rows < tl.load(problem + _IMAGE_ROWS).to(tl.int32))
    share = tl.where(is_text, 1.0 / tl.maximum(num_words, 1), tl.where(num_words > 0, alpha, 1.0) / num_tokens)

    first = tl.multiple_of(tl.load(problem + _FIRST_ROW), _ROW_ALIGNMENT)
    parts = tl.arange(0, PARTS)
    inside = is_entry[:, None] & (parts < tl.cdiv(num_tokens, COLUMNS))[None, :]
    entries = (first + rows)[:, None] * num_parts + parts[None, :]
    maxima = tl.load(part_max + entries, mask=inside, other=float("-inf"))
    sums = tl.load(part_sum + entries, mask=inside, other=0.0)
    largest = tl.where(is_entry, tl.max(maxima, axis=1), 0.0)
    total = tl.sum(sums * tl.exp(maxima - largest[:, None]), axis=1)
    weight = tl.where(is_entry, share / tl.where(is_entry, total, 1.0), 0.0)
    tl.store(row_max + first + rows, largest, mask=rows < num_rows)
    tl.store(row_weight + first + rows, weight, mask=rows < num_rows)


@triton.jit
def coverage_columns(
    problems,
    coverage,
    row_max,
    row_weight,
    excluded,
    bounds,
    HAS_EXCLUDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Turns logits into C in place, and writes a bound on each column's gain: its sum, rounded up.

    The sum may be rounded otherwise than `greedy_picks` rounds the same column's gain. Each of the two is off by at
    most 2**-24 for every addition in its longest chain, relatively; the slack is more than both together, as long as
    its ROWS are at least a quarter of these.

    Args:
        excluded: [total tokens] uint8; read only if HAS_EXCLUDED.
        bounds: [total tokens] float32; _BARRED for an excluded column.

    Grid: (ceil(tokens of the largest problem / COLUMNS), B).
    """
    problem = problems + tl.program_id(1) * _NUM_FIELDS
    num_tokens = tl.load(problem + _NUM_TOKENS).to(tl.int32)
    if tl.program_id(0) * COLUMNS >= num_tokens:
        return
    num_rows = tl.multiple_of(tl.load(problem + _NUM_ROWS).to(tl.int32), _ROW_ALIGNMENT)
    first_row = tl.multiple_of(tl.load(problem + _FIRST_ROW), _ROW_ALIGNMENT)
    image_rows = tl.load(problem + _IMAGE_ROWS).to(tl.int32)
    first_word = tl.load(problem + _WORD_ROW).to(tl.int32)
    end_of_words = first_word + tl.load(problem + _NUM_WORDS).to(tl.int32)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_tokens
    column_starts = (
        coverage + tl.multiple_of(tl.load(problem + _FIRST_ENTRY), _ROW_ALIGNMENT) + columns.to(tl.int64) * num_rows
    )

    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        is_row = rows < num_rows
        inside = is_column[:, None] & is_row[None, :]
        largest = tl.load(row_max + first_row + rows, mask=is_row, other=0.0)
        weight = tl.load(row_weight + first_row + rows, mask=is_row, other=0.0)
        # Padding has no logits yet; its weight is 0.
        is_entry = (rows < image_rows) | ((rows >= first_word) & (rows < end_of_words))
        logits = tl.load(column_starts[:, None] + rows[None, :], mask=is_column[:, None] & is_entry[None, :], other=0.0)
        entries = tl.exp(logits - largest[None, :]) * weight[None, :]
        tl.store(column_starts[:, None] + rows[None, :], entries, mask=inside)
        sums += entries

    slack = (tl.cdiv(num_rows, ROWS) + 32).to(tl.float32) * 2.0**-21
    bound = _finite(tl.sum(sums, axis=1)) * (1.0 + slack)
    first_token = tl.load(problem + _FIRST_TOKEN)
    if HAS_EXCLUDED:
        is_barred = tl.load(excluded + first_token + columns, mask=is_column, other=0) != 0
        bound = tl.where(is_barred, _BARRED, bound)
    tl.store(bounds + first_token + columns, bound, mask=is_column)


@triton.jit
def _finite(gains):
    # Features that are not finite give NaN gains, which no order ranks: as 0 they still end the loops.
    return tl.where(gains > 0.0, gains, 0.0)


@triton.jit
def greedy_picks(
    problems,
    coverage,
    bounds,
    row_weight,
    covered,
    meeting,
    order,
    kept,
    curve,
    totals,
    total_rows,
    IS_TEAM: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    MAX_SPINS: tl.constexpr,
):
    """Picks one problem's columns: lazy greedy maximum coverage, by one program or by a team of them.

    A column's gain only falls as others are picked, so a stale gain is a bound. In each round every group of columns
    offers the stale one with the largest bound; those that can still win are evaluated afresh; the pick is made when
    the largest of all bounds is a fresh one. Every evaluation sums in the same order, and subtraction, maximum and
    addition round monotonically, so stale gains are bounds in float32 as well: the picks are those of evaluating
    every column every time. Only stale columns are offered, so each round makes at least one fresh: the loop ends,
    also where all gains are equal.

    A team's programs own different columns and keep their own `covered`; what they share is the largest key of a
    round. They wait for each other, so all of them must run at once: a cooperative launch. A program that has looked
    MAX_SPINS times in vain gives up for all of them: the launch ends, the total stays NaN, and what is in `order` and
    `kept` is no selection, though every entry is an index of a token.

    Args:
        coverage: C, by column.
        bounds: [total tokens] float32; changed.
        row_weight: [total rows of C] float32, each row's largest entry.
        covered: [NUM_PROGRAMS, total rows of C] float32 zeros, workspace: each row's maximum over the picks.
        meeting: [B, MEETING_WORDS] int64 zeros, workspace of a team.
        order: [total picks] int64 zeros.
        kept: [total picks] int64 zeros, receives `order` in raster order.
        curve: [total picks] float32, f after each pick.
        totals: [B] float32 NaN, receives f of all columns once all picks are made.
        CANDIDATES: Groups a program; group g of all owns columns g, g + groups, g + 2 groups ...
        TURNS: A power of two, columns a group or more.
        MAX_SPINS: How often a program looks whether the rest of its team has arrived.

    Grid: (NUM_PROGRAMS, B).
    """
    rank = tl.program_id(0)
    problem = problems + tl.program_id(1) * _NUM_FIELDS
    meeting += tl.program_id(1) * _MEETING_WORDS
    num_tokens = tl.load(problem + _NUM_TOKENS).to(tl.int32)
    num_picks = tl.load(problem + _NUM_PICKS).to(tl.int32)
    num_rows = tl.multiple_of(tl.load(problem + _NUM_ROWS).to(tl.int32), _ROW_ALIGNMENT)
    first_row = tl.multiple_of(tl.load(problem + _FIRST_ROW), _ROW_ALIGNMENT)
    matrix = coverage + tl.multiple_of(tl.load(problem + _FIRST_ENTRY), _ROW_ALIGNMENT)
    covered += rank * total_rows + first_row
    bounds += tl.load(problem + _FIRST_TOKEN)
    first_pick = tl.load(problem + _FIRST_PICK)

    # The bits of each column's bound, which rank as the bound does: negative once fresh, _OUT if not to be picked.
    num_groups: tl.constexpr = CANDIDATES * NUM_PROGRAMS
    groups = rank * CANDIDATES + tl.arange(0, CANDIDATES)
    turns = tl.arange(0, TURNS)
    columns = groups[:, None] + turns[None, :] * num_groups
    bound = tl.load(bounds + columns, mask=columns < num_tokens, other=_BARRED)
    state = tl.where(bound < 0.0, _OUT, bound.to(tl.int32, bitcast=True))
    value = tl.full((), 0.0, tl.float64)
    top = tl.full((), 0, tl.int64)
    latest_pick = matrix
    num_rounds = 0
    for idx in range(num_picks):
        best = tl.full((), 0, tl.int64)
        offer, turn = tl.max(state, axis=1, return_indices=True)
        is_new_pick = idx > 0
        is_decided = False
        while not is_decided:
            candidates = groups + turn * num_groups
            may_win = _key(offer, candidates, 0) > best
            starts = matrix + candidates.to(tl.int64)[:, None] * num_rows
            gains = tl.zeros([CANDIDATES, ROWS], tl.float32)
            for row in tl.range(0, num_rows, ROWS, num_stages=STAGES):
                rows = row + tl.arange(0, ROWS)
                is_row = rows < num_rows
                floor = tl.load(covered + rows, mask=is_row, other=0.0)
                # The last pick is taken into `covered` here. Warps may do it more than once: a maximum stays.
                latest = tl.load(latest_pick + rows, mask=is_row & is_new_pick, other=0.0)
                floor = tl.maximum(floor, latest)
                tl.store(covered + rows, floor, mask=is_row & is_new_pick)
                entries = tl.load(starts + rows[None, :], mask=may_win[:, None] & is_row[None, :], other=0.0)
                gains += tl.maximum(entries - floor[None, :], 0.0)
            gain = _finite(tl.sum(gains, axis=1)).to(tl.int32, bitcast=True)
            is_new_pick = False
            tl.debug_barrier()

            is_evaluated = (turns[None, :] == turn[:, None]) & may_win[:, None]
            state = tl.where(is_evaluated, (gain | _SIGN)[:, None], state)
            best = tl.maximum(best, tl.max(tl.where(may_win, _key(gain, candidates, 1), 0), axis=0))
            offer, turn = tl.max(state, axis=1, return_indices=True)
            top = tl.maximum(best, tl.max(_key(offer, groups + turn * num_groups, 0), axis=0))
            if IS_TEAM:
                top = _largest_of_team(meeting, top, rank, num_rounds, NUM_PROGRAMS, MAX_SPINS)
            num_rounds += 1
            # Where nothing is left to pick, no key is above 0: that ends the loop as well, as giving up does.
            is_decided = ((top & 1) == 1) | (top <= 0)

        pick = tl.minimum(_index(top), num_tokens - 1)
        latest_pick = matrix + pick.to(tl.int64) * num_rows
        value += (top >> 32).to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
        state = tl.where(state == _OUT, _OUT, state & _MAX_INDEX)
        state = tl.where(columns == pick, _OUT, state)
        if rank == 0:
            tl.store(order + first_pick + idx, pick.to(tl.int64))
            tl.store(curve + first_pick + idx, value.to(tl.float32))
            tl.store(bounds + pick, _PICKED)

    if rank == 0:
        tl.debug_barrier()
        _write_kept(kept + first_pick, bounds, num_tokens, 1024)
        if IS_TEAM:  # noqa: SIM108 - known when compiling
            is_whole = tl.atomic_add(meeting + 3, 0, sem="acquire") < _GIVEN_UP
        else:
            is_whole = True
        _write_total(totals + tl.program_id(1), row_weight + first_row, num_rows, is_whole, ROWS)


@triton.jit
def _key(bits, column, is_fresh: tl.constexpr):
    """Returns what ranks columns: by gain, then the lower index first; negative for one not to be offered.

    The bits of a float that is not negative rank as the float does. The last bit says whether the gain is fresh.
    """
    return (bits.to(tl.int64) << 32) | ((column ^ _MAX_INDEX).to(tl.int64) << 1) | is_fresh


@triton.jit
def _index(key):
    return (((key >> 1) & _MAX_INDEX) ^ _MAX_INDEX).to(tl.int32)


@triton.jit
def _largest_of_team(meeting, key, rank, turn, NUM_PROGRAMS: tl.constexpr, MAX_SPINS: tl.constexpr):
    """Returns the largest key of the team's programs, after all of them have brought theirs; 0 if one has given up."""
    slot = meeting + turn % 3
    arrived = meeting + 3
    tl.atomic_max(slot, key, sem="relaxed")
    tl.atomic_add(arrived, 1, sem="release")
    all_here = (turn + 1) * NUM_PROGRAMS
    num_here = tl.atomic_add(arrived, 0, sem="acquire")
    num_spins = 0
    while (num_here < all_here) & (num_spins < MAX_SPINS):
        num_here = tl.atomic_add(arrived, 0, sem="acquire")
        num_spins += 1
    if num_here < all_here:
        tl.atomic_max(arrived, _GIVEN_UP, sem="release")
        num_here = tl.full((), _GIVEN_UP, tl.int64)
    largest = tl.load(slot, volatile=True)
    if rank == 0:
        # The slot of the turn before was read by all before they arrived, and is next used after the next meeting.
        tl.atomic_xchg(meeting + (turn + 2) % 3, 0, sem="relaxed")
    return tl.where(num_here < _GIVEN_UP, largest, 0)


@triton.jit
def _write_total(total, row_weight, num_rows, is_whole, ROWS: tl.constexpr):
    sums = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        sums += tl.load(row_weight + rows, mask=rows < num_rows, other=0.0)
    tl.store(total, tl.sum(sums, axis=0), mask=is_whole)


@triton.jit
def _write_kept(kept, bounds, num_tokens, TOKENS: tl.constexpr):
    num_kept = 0
    for start in range(0, num_tokens, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        is_kept = tl.load(bounds + tokens, mask=tokens < num_tokens, other=_BARRED) == _PICKED
        places = num_kept + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
        tl.store(kept + places, tokens.to(tl.int64), mask=is_kept)
        num_kept += tl.sum(is_kept.to(tl.int32), axis=0)
