"""Each method on a case small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mmtok_deploy import SelectionConfig
from mmtok_deploy.methods import MethodName, check_method, comparator, coverage_of, reads_question
from mmtok_deploy.methods.downsample import grid_within
from mmtok_deploy.methods.visionzip import class_token_attention
from mmtok_deploy.problem import Selection, SelectionProblem

CONFIG = SelectionConfig(tv_temp=0.1, vv_temp=0.1)
COMPARATORS: list[MethodName] = [name for name in get_args(MethodName) if name != "mmtok"]


def directions(*degrees: float) -> Tensor:
    """Returns unit vectors of the plane; the cosine of two is that of the angle between them."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def problem(vision: Tensor, num_picks: int, **fields: Any) -> SelectionProblem:
    return SelectionProblem(vision, fields.pop("keys", vision), fields.pop("text", vision[:0]), num_picks, **fields)


def chosen(name: MethodName, given: SelectionProblem) -> Selection:
    (selection,) = comparator(name)([given], CONFIG)
    assert selection.kept.tolist() == sorted(selection.order.tolist())
    assert len(selection.coverage) == len(selection) == given.num_picks
    assert torch.isfinite(selection.total)
    return selection


def excluding(num_tokens: int, *indices: int) -> Tensor:
    return torch.isin(torch.arange(num_tokens), torch.tensor(indices))


# Tokens at 0, 90 and 180 degrees; words at 90 (twice) and 180; features of which two are the same.
TOKENS, WORDS, KEYS = directions(0, 90, 180), directions(90, 90, 180), directions(0, 0, 90)


def test_text_coverage_answers_the_words_in_the_order_of_their_number() -> None:
    given = problem(TOKENS, 3, text=WORDS, keys=KEYS)
    # A third of the text's weight a word: token 1 covers two of them, token 2 the other, token 0 none.
    assert chosen("text-coverage", given).order.tolist() == [1, 2, 0]


def test_vision_coverage_takes_one_of_each_kind_first() -> None:
    given = problem(TOKENS, 3, text=WORDS, keys=KEYS)
    # With e = exp(-10), columns 0 and 1 cover 1 / (2 + e) of the rows 0 and 1 each and e / (1 + 2e) of row 2: 1 + e / 2
    # together. Column 2 covers 1 / (1 + 2e) of its own row and e / (2 + e) of the others: 1 - e. So 0, of two equals
    # the lower index, then 2, and 1 adds nothing.
    assert chosen("vision-coverage", given).order.tolist() == [0, 2, 1]


def test_divprune_goes_to_the_farthest_from_what_is_picked() -> None:
    # Distances are 1 - cosine, which grows with the angle. Nearest others: 0 has 10 degrees, 10 has 10, 90 has 40,
    # 130 has 40, 200 has 70: it is first. Farthest from 200 is 10 (170 degrees; 0 has 160), then 90 (80 from 10, 110
    # from 200; 130 has 70), then 130 (40) before 0 (10).
    selection = chosen("divprune", problem(directions(0, 10, 90, 130, 200), 5))
    assert selection.order.tolist() == [4, 1, 2, 3, 0]
    expected = [1 - math.cos(math.radians(angle)) for angle in (70, 170, 80, 40, 10)]
    assert selection.coverage.tolist() == pytest.approx(expected, abs=1e-6)


def test_divprune_does_not_measure_from_excluded_tokens() -> None:
    # Without the token at 200 degrees, 90 and 130 are 40 from each other and 0 and 10 are 10. So 90 or 130 is first:
    # which of two equal distances is larger, rounding decides. Farthest from 90 is 0, then 130 (40 from 90) before 10
    # (10 from 0); farthest from 130 is 0, then 90 before 10.
    given = problem(directions(0, 10, 90, 130, 200), 4, excluded=excluding(5, 4))
    assert chosen("divprune", given).order.tolist() in ([2, 0, 3, 1], [3, 0, 2, 1])


def test_divprune_of_one_token() -> None:
    assert chosen("divprune", problem(directions(30), 1)).order.tolist() == [0]


def test_divprune_compares_across_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), 20)
    whole = chosen("divprune", given).order
    monkeypatch.setattr("mmtok_deploy.methods.divprune._BLOCK_ROWS", 7)
    assert torch.equal(chosen("divprune", given).order, whole)


def test_visionzip_takes_what_is_attended_to_most() -> None:
    attention = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1])
    selection = chosen("visionzip", problem(torch.zeros(5, 2), 3, attention=attention))
    assert selection.order.tolist() == [1, 2, 3]
    assert selection.coverage.tolist() == pytest.approx([0.4, 0.6, 0.8])
    barred = problem(torch.zeros(5, 2), 3, attention=attention, excluded=excluding(5, 1, 2))
    assert chosen("visionzip", barred).order.tolist() == [3, 0, 4]


def test_visionzip_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the attention"):
        comparator("visionzip")([problem(torch.zeros(5, 2), 3)], CONFIG)


def test_the_class_tokens_attention_adds_up_the_heads() -> None:
    # Two heads of one number each, a class token and two more. The class token asks with 1 and -1; the first head's
    # keys are 0, ln 2 and ln 5 (weights 1, 2, 5 of 8), the second's 0, ln 2, 0 (weights 2, 1, 2 of 5).
    queries = torch.tensor([[[1.0, -1.0], [9.0, 9.0], [9.0, 9.0]]])
    keys = torch.tensor([[[0.0, 0.0], [math.log(2), math.log(2)], [math.log(5), 0.0]]])
    attention = class_token_attention(queries, keys, num_heads=2)
    assert attention.tolist() == [pytest.approx([2 / 8 + 1 / 5, 5 / 8 + 2 / 5])]


def test_random_tokens_are_drawn_by_the_seed_and_never_excluded() -> None:
    vision = torch.zeros(40, 2)
    draws = [chosen("random", problem(vision, 8, seed=seed)).order.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 8
    counts = torch.zeros(40)
    for seed in range(400):
        counts[chosen("random", problem(vision, 8, seed=seed, excluded=excluding(40, 3, 7))).kept] += 1
    assert counts[[3, 7]].tolist() == [0, 0]
    # 400 draws of 8 in 38: 84 each, and 8 of standard deviation.
    others = counts[~excluding(40, 3, 7)]
    assert others.min() > 84 - 5 * 8
    assert others.max() < 84 + 5 * 8


@pytest.mark.parametrize(
    ("num_picks", "excluded", "kept"),
    [
        (1, (), [0]),
        (2, (), [0, 8]),
        (3, (), [0, 4, 8]),
        (4, (), [0, 2, 5, 8]),
        (9, (), list(range(9))),
        (3, (0, 1, 4, 8), [2, 5, 7]),
        (5, (0, 1, 4, 8), [2, 3, 5, 6, 7]),
    ],
)
def test_evenly_spaced_tokens_begin_and_end_the_image(
    num_picks: int, excluded: tuple[int, ...], kept: list[int]
) -> None:
    mask = excluding(9, *excluded) if excluded else None
    assert chosen("even", problem(torch.zeros(9, 2), num_picks, excluded=mask)).order.tolist() == kept


def test_a_downsampled_image_keeps_every_token() -> None:
    assert chosen("downsample", problem(torch.zeros(6, 2), 6)).order.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="downsampled to 4 tokens has as many, this has 6"):
        comparator("downsample")([problem(torch.zeros(6, 2), 4)], CONFIG)


@pytest.mark.parametrize(
    ("rows", "columns", "max_tokens", "grid"),
    [
        (24, 24, 576, (24, 24)),
        (24, 24, 1000, (24, 24)),
        (24, 24, 64, (8, 8)),
        (24, 24, 57, (7, 8)),
        (24, 24, 28, (5, 5)),
        (24, 24, 4, (2, 2)),
        (24, 24, 3, (2, 1)),
        (24, 24, 1, (1, 1)),
        (9, 12, 10, (3, 3)),
        (9, 12, 54, (6, 9)),
        (10, 40, 40, (3, 13)),
        (1, 50, 5, (1, 5)),
        (50, 1, 5, (5, 1)),
    ],
)
def test_the_grid_of_a_smaller_image(rows: int, columns: int, max_tokens: int, grid: tuple[int, int]) -> None:
    assert grid_within(rows, columns, max_tokens) == grid


@pytest.mark.parametrize("rows", [1, 5, 24])
@pytest.mark.parametrize("columns", [1, 7, 24, 40])
def test_no_grid_has_more_tokens_than_asked_for(rows: int, columns: int) -> None:
    for max_tokens in range(1, rows * columns + 2):
        height, width = grid_within(rows, columns, max_tokens)
        assert 1 <= height * width <= max_tokens
        assert height <= rows
        assert width <= columns


@pytest.mark.parametrize("name", COMPARATORS)
def test_every_method_takes_a_batch_and_leaves_out_what_is_excluded(name: MethodName) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = excluding(12, 0, 5, 11)
    problems = [
        problem(
            torch.randn(12, 4, generator=generator),
            12 if name == "downsample" else num_picks,
            text=torch.randn(2, 4, generator=generator),
            attention=torch.rand(12, generator=generator),
            seed=num_picks,
            excluded=None if name == "downsample" else mask,
        )
        for num_picks in (1, 9, 4)
    ]
    together = comparator(name)(problems, CONFIG)
    for given, selection in zip(problems, together, strict=True):
        assert torch.equal(selection.order, chosen(name, given).order)
        assert len(set(selection.order.tolist())) == given.num_picks
        assert given.excluded is None or not given.excluded[selection.kept].any()


@pytest.mark.parametrize("name", ["divprune", "visionzip", "text-coverage", "vision-coverage"])
def test_features_that_are_not_finite_show_in_the_total(name: MethodName) -> None:
    bad = torch.full((6, 4), torch.nan)
    given = problem(bad, 3, text=torch.ones(1, 4), attention=bad[:, 0])
    (selection,) = comparator(name)([given], CONFIG)
    assert not torch.isfinite(selection.total)
    assert selection.kept.min() >= 0
    assert selection.kept.max() < 6


def test_names() -> None:
    assert [check_method(name) for name in get_args(MethodName)] == list(get_args(MethodName))
    for wrong in ("MMTok", "", None, 5, ["even"]):
        with pytest.raises(ValueError, match="method is one of mmtok, text-coverage, "):
            check_method(wrong)
    with pytest.raises(ValueError, match="a method to compare with is one of text-coverage, "):
        comparator("mmtok")
    assert [coverage_of(name, replace(CONFIG, coverage="text")) for name in ("mmtok", "vision-coverage", "even")] == [
        "text",
        "vision",
        None,
    ]
    assert [name for name in get_args(MethodName) if reads_question(name)] == ["mmtok", "text-coverage", "random"]
