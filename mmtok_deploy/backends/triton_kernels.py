"""The Triton kernels of the selection: cosine logits, softmax weights, coverage columns, lazy greedy picks.

All problems of a batch are done by one launch of each kernel; `problems` is `Layout.table`, which says where each
lies in flat tensors. C is stored by column, so that a column is contiguous, and its padding rows are zero. Sums run in
one fixed order: equal launches give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmtok_deploy.backends.triton_layout import ROW_ALIGNMENT, Field

__all__ = ["coverage_columns", "greedy_picks", "row_weights", "similarity"]


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

_ROW_ALIGNMENT = tl.constexpr(ROW_ALIGNMENT)
_BARRED = tl.constexpr(-1.0)
_PICKED = tl.constexpr(-2.0)
_MAX_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
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
        temperature: Of the softmax.
        IS_IMAGE: Rows are the columns themselves (keys) and ROWS == COLUMNS; else they are words.

    Grid: (row tiles * column tiles of the largest problem, B).
    """
    problem = problems + tl.program_id(1) * _NUM_FIELDS
    num_tokens = tl.load(problem + _NUM_TOKENS)
    num_column_tiles = tl.cdiv(num_tokens, COLUMNS)
    if IS_IMAGE:
        num_vectors = num_tokens
        first_vector = tl.load(problem + _FIRST_TOKEN)
        first_row = 0
    else:
        num_vectors = tl.load(problem + _NUM_WORDS)
        first_vector = tl.load(problem + _FIRST_WORD)
        first_row = tl.load(problem + _WORD_ROW)
    tile = tl.program_id(0)
    if tile >= tl.cdiv(num_vectors, ROWS) * num_column_tiles:
        return
    row_tile = tile // num_column_tiles
    column_tile = tile % num_column_tiles
    if IS_IMAGE:  # noqa: SIM102 - only the outer condition is known when compiling
        if row_tile > column_tile:
            return

    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_row = rows < num_vectors
    is_column = columns < num_tokens
    row_vectors = first_vector + rows
    column_vectors = tl.load(problem + _FIRST_TOKEN) + columns

    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = tl.load(
            row_features + row_vectors[:, None] * width + depth[None, :],
            mask=is_row[:, None] & (depth < width)[None, :],
            other=0.0,
        )
        right = tl.load(
            column_features + column_vectors[None, :] * width + depth[:, None],
            mask=is_column[None, :] & (depth < width)[:, None],
            other=0.0,
        )
        products = tl.dot(left, right, products, input_precision=PRECISION)

    row_scale = 1.0 / tl.maximum(tl.load(row_norms + row_vectors, mask=is_row, other=1.0), 1e-8)
    column_scale = 1.0 / tl.maximum(tl.load(column_norms + column_vectors, mask=is_column, other=1.0), 1e-8)
    logits = products * row_scale[:, None] * column_scale[None, :] / temperature

    matrix = coverage + tl.load(problem + _FIRST_ENTRY)
    num_rows = _load_num_rows(problem)
    parts = (tl.load(problem + _FIRST_ROW) + first_row) * num_parts
    inside = is_row[:, None] & is_column[None, :]
    tl.store(matrix + columns[None, :] * num_rows + (first_row + rows)[:, None], logits, mask=inside)
    largest, total = _softmax_part(tl.where(is_column[None, :], logits, float("-inf")), 1)
    tl.store(part_max + parts + rows * num_parts + column_tile, largest, mask=is_row)
    tl.store(part_sum + parts + rows * num_parts + column_tile, total, mask=is_row)
    if IS_IMAGE:  # noqa: SIM102
        if row_tile < column_tile:
            tl.store(matrix + rows[:, None] * num_rows + columns[None, :], logits, mask=inside)
            largest, total = _softmax_part(tl.where(is_row[:, None], logits, float("-inf")), 0)
            tl.store(part_max + parts + columns * num_parts + row_tile, largest, mask=is_column)
            tl.store(part_sum + parts + columns * num_parts + row_tile, total, mask=is_column)


@triton.jit
def _softmax_part(logits, axis: tl.constexpr):
    largest = tl.max(logits, axis=axis)
    return largest, tl.sum(tl.exp(logits - tl.expand_dims(largest, axis)), axis=axis)


@triton.jit
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
        PARTS: num_parts, up to a power of two.

    Grid: (ceil(rows of the largest problem / ROWS), B).
    """
    problem = problems + tl.program_id(1) * _NUM_FIELDS
    num_rows = _load_num_rows(problem)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= num_rows:
        return
    num_tokens = tl.load(problem + _NUM_TOKENS)
    num_words = tl.load(problem + _NUM_WORDS)
    is_image, is_text = _row_kinds(problem, rows)
    is_entry = is_image | is_text
    share = tl.where(is_text, 1.0 / tl.maximum(num_words, 1), tl.where(num_words > 0, alpha, 1.0) / num_tokens)

    first = tl.load(problem + _FIRST_ROW)
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
def _load_num_rows(problem):
    # Columns start on cache lines; said aloud, the compiler loads 16 bytes a thread.
    return tl.multiple_of(tl.load(problem + _NUM_ROWS).to(tl.int32), _ROW_ALIGNMENT)


@triton.jit
def _row_kinds(problem, rows):
    """Returns which rows cover the image and which the text; the others are padding."""
    first_word = tl.load(problem + _WORD_ROW)
    is_image = rows < tl.load(problem + _IMAGE_ROWS)
    return is_image, (rows >= first_word) & (rows < first_word + tl.load(problem + _NUM_WORDS))


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

    The sum may be rounded otherwise than `greedy_picks` rounds the same column's gain. Each of the two is within
    (additions in a chain) * 2**-24 of the true sum, relatively; the slack is more than twice both.

    Args:
        excluded: [total tokens] uint8; read only if HAS_EXCLUDED.
        bounds: [total tokens] float32; _BARRED for an excluded column.

    Grid: (ceil(tokens of the largest problem / COLUMNS), B).
    """
    problem = problems + tl.program_id(1) * _NUM_FIELDS
    num_tokens = tl.load(problem + _NUM_TOKENS)
    if tl.program_id(0) * COLUMNS >= num_tokens:
        return
    num_rows = _load_num_rows(problem)
    first_row = tl.load(problem + _FIRST_ROW)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_tokens
    column_starts = coverage + tl.load(problem + _FIRST_ENTRY) + columns * num_rows

    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        is_row = rows < num_rows
        inside = is_column[:, None] & is_row[None, :]
        largest = tl.load(row_max + first_row + rows, mask=is_row, other=0.0)
        weight = tl.load(row_weight + first_row + rows, mask=is_row, other=0.0)
        # Padding has no logits yet; its weight is 0.
        is_image, is_text = _row_kinds(problem, rows)
        is_entry = is_column[:, None] & (is_image | is_text)[None, :]
        logits = tl.load(column_starts[:, None] + rows[None, :], mask=is_entry, other=0.0)
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
    return tl.where(gains >= 0.0, gains, 0.0)


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
):
    """Picks one problem's columns: lazy greedy maximum coverage, by one program or by a team of them.

    A column's gain only falls as others are picked, so a stale gain is a bound. In each round every group of columns
    offers the stale one with the largest bound; those that can still win are evaluated afresh; the pick is made when
    the largest of all bounds is a fresh one. Every evaluation sums in the same order, and subtraction, maximum and
    addition round monotonically, so stale gains are bounds in float32 as well: the picks are those of evaluating
    every column every time. Only stale columns are offered, so each round makes at least one fresh: the loop ends,
    also where all gains are equal.

    Columns are ranked by key: the bound's bits, then the lower index, then whether it is fresh.

    A team's programs own different columns and keep their own `covered`; what they share is the largest key of a
    round. They wait for each other, so all of them must run at once: a cooperative launch.

    Args:
        coverage: C, by column.
        bounds: [total tokens] float32; changed.
        row_weight: [total rows of C] float32, each row's largest entry.
        covered: [NUM_PROGRAMS, total rows of C] float32 zeros, workspace: each row's maximum over the picks.
        meeting: [B, 4] int64 zeros, workspace of a team: three slots taken in turn, and how many have arrived.
        order: [total picks] int64.
        kept: [total picks] int64, `order` in raster order.
        curve: [total picks] float32, f after each pick.
        totals: [B] float32, f of all columns.
        CANDIDATES: Groups a program; group g of all owns columns g, g + groups, g + 2 groups ...
        TURNS: Columns a group, up to a power of two.

    Grid: (NUM_PROGRAMS, B).
    """
    rank = tl.program_id(0)
    problem = problems + tl.program_id(1) * _NUM_FIELDS
    meeting += tl.program_id(1) * 4
    num_tokens = tl.load(problem + _NUM_TOKENS)
    num_picks = tl.load(problem + _NUM_PICKS)
    num_rows = _load_num_rows(problem)
    first_row = tl.load(problem + _FIRST_ROW)
    matrix = coverage + tl.load(problem + _FIRST_ENTRY)
    covered += rank * total_rows + first_row
    bounds += tl.load(problem + _FIRST_TOKEN)
    first_pick = tl.load(problem + _FIRST_PICK)

    if rank == 0:
        _write_total(totals + tl.program_id(1), row_weight + first_row, num_rows, ROWS)

    groups = rank * CANDIDATES + tl.arange(0, CANDIDATES)
    columns = groups[:, None] + tl.arange(0, TURNS)[None, :] * (CANDIDATES * NUM_PROGRAMS)
    bound = tl.load(bounds + columns, mask=columns < num_tokens, other=_BARRED)
    value = tl.full((), 0.0, tl.float64)
    pick = tl.full((), 0, tl.int64)
    num_rounds = 0
    for idx in range(num_picks):
        is_fresh = columns < 0
        best = tl.full((), 0, tl.int64)
        offered = tl.max(_key(bound, columns, 0), axis=1)
        is_decided = False
        is_new_pick = idx > 0
        while not is_decided:
            candidates = _index(offered)
            may_win = offered > best
            gains = tl.zeros([CANDIDATES, ROWS], tl.float32)
            for start in tl.range(0, num_rows, ROWS, num_stages=STAGES):
                rows = start + tl.arange(0, ROWS)
                is_row = rows < num_rows
                floor = tl.load(covered + rows, mask=is_row, other=0.0)
                # The last pick is taken into `covered` here. Programs' warps may do it twice: a maximum stays.
                latest = tl.load(matrix + pick * num_rows + rows, mask=is_row & is_new_pick, other=0.0)
                floor = tl.maximum(floor, latest)
                tl.store(covered + rows, floor, mask=is_row & is_new_pick)
                entries = tl.load(
                    matrix + candidates[:, None] * num_rows + rows[None, :],
                    mask=may_win[:, None] & is_row[None, :],
                    other=0.0,
                )
                gains += tl.maximum(entries - floor[None, :], 0.0)
            gain = _finite(tl.sum(gains, axis=1))
            is_new_pick = False
            tl.debug_barrier()

            is_evaluated = (columns == candidates[:, None]) & may_win[:, None]
            bound = tl.where(is_evaluated, gain[:, None], bound)
            is_fresh = is_fresh | is_evaluated
            best = tl.maximum(best, tl.max(tl.where(may_win, _key(gain, candidates, 1), 0), axis=0))
            offered = tl.max(tl.where(is_fresh, 0, _key(bound, columns, 0)), axis=1)
            top = tl.maximum(best, tl.max(offered, axis=0))
            if IS_TEAM:
                top = _largest_of_team(meeting, top, rank, num_rounds, NUM_PROGRAMS)
            num_rounds += 1
            # Nothing left to pick ends the loop as well: 0 is below every key.
            is_decided = ((top & 1) == 1) | (top == 0)

        pick = tl.minimum(_index(top), num_tokens - 1)
        value += (top >> 32).to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
        bound = tl.where(columns == pick, _PICKED, bound)
        if rank == 0:
            tl.store(order + first_pick + idx, pick)
            tl.store(curve + first_pick + idx, value.to(tl.float32))
            tl.store(bounds + pick, _PICKED)

    if rank == 0:
        tl.debug_barrier()
        _write_kept(kept + first_pick, bounds, num_tokens)


@triton.jit
def _key(bound, column, is_fresh: tl.constexpr):
    # The bits of a float that is not negative rank as the float does; a barred column's key is negative.
    bits = bound.to(tl.int32, bitcast=True).to(tl.int64)
    return (bits << 32) | ((column ^ _MAX_INDEX).to(tl.int64) << 1) | is_fresh


@triton.jit
def _index(key):
    return ((key >> 1) & _MAX_INDEX) ^ _MAX_INDEX


@triton.jit
def _largest_of_team(meeting, key, rank, turn, NUM_PROGRAMS: tl.constexpr):
    """Returns the largest key of the team's programs, after all of them have brought theirs."""
    slot = meeting + turn % 3
    arrived = meeting + 3
    tl.atomic_max(slot, key, sem="relaxed")
    tl.atomic_add(arrived, 1, sem="release")
    while tl.atomic_add(arrived, 0, sem="acquire") < (turn + 1) * NUM_PROGRAMS:
        pass
    largest = tl.load(slot, volatile=True)
    if rank == 0:
        # The slot of the turn before was read by all before they arrived, and is next used after the next meeting.
        tl.atomic_xchg(meeting + (turn + 2) % 3, 0, sem="relaxed")
    return largest


@triton.jit
def _write_total(total, row_weight, num_rows, ROWS: tl.constexpr):
    sums = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        sums += tl.load(row_weight + rows, mask=rows < num_rows, other=0.0)
    tl.store(total, tl.sum(sums, axis=0))


@triton.jit
def _write_kept(kept, bounds, num_tokens):
    TOKENS: tl.constexpr = 1024
    num_kept = 0
    for start in range(0, num_tokens, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        is_kept = tl.load(bounds + tokens, mask=tokens < num_tokens, other=_BARRED) == _PICKED
        places = num_kept + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
        tl.store(kept + places, tokens.to(tl.int64), mask=is_kept)
        num_kept += tl.sum(is_kept.to(tl.int32), axis=0)
