"""Each method on a case small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmtok_deploy import SelectionConfig
from mmtok_deploy.methods import (
    IMAGE_METHODS,
    MethodName,
    check_method,
    comparator,
    coverage_of,
    is_nested,
    reads_attention,
    reads_keys,
    reads_question,
)
from mmtok_deploy.methods.downsample import grid_within
from mmtok_deploy.methods.visionzip import class_token_attention
from mmtok_deploy.problem import Selection, SelectionProblem

CONFIG = SelectionConfig(tv_temp=0.1, vv_temp=0.1)
METHODS = IMAGE_METHODS
# They choose by no feature.
FEATURELESS: tuple[MethodName, ...] = ("random", "even", "downsample")


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


def test_cdpruner_takes_what_is_relevant_and_new() -> None:
    # The word is like 0 and 2 (cosine 1), not like 1 (0), and the opposite of 3 (-1): relevance 1, 1/2, 1 and about 0.
    # So 0 is first, of two equals the lower index; 1 is at right angles to it and adds its relevance squared; 2 and 3
    # lie in the span of 0 and add nothing.
    vision = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [-4.0, 0.0]])
    selection = chosen("cdpruner", problem(vision, 4, text=torch.tensor([[5.0, 0.0]])))
    assert selection.order.tolist() == [0, 1, 2, 3]
    assert selection.coverage.tolist() == pytest.approx([1, 1 / 4, 0, 0], abs=1e-5)


def test_cdpruner_goes_by_the_mean_of_the_words() -> None:
    # The mean of the words is at 90 degrees, where none of them is.
    words = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.5, 2.0], [-0.5, 2.0]])
    assert chosen("cdpruner", problem(directions(0, 45, 90, 180), 1, text=words)).order.tolist() == [2]


def test_cdpruner_scales_the_relevance_of_what_may_be_picked() -> None:
    # Without token 3, token 1 is the least relevant: about 0.
    vision = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [-4.0, 0.0]])
    given = problem(vision, 3, text=torch.tensor([[5.0, 0.0]]), excluded=excluding(4, 3))
    assert chosen("cdpruner", given).coverage.tolist() == pytest.approx([1, 0, 0], abs=1e-9)


def test_cdpruner_without_words_is_diverse() -> None:
    vision = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    selection = chosen("cdpruner", problem(vision, 3))
    assert selection.order.tolist() == [0, 2, 1]
    assert selection.coverage.tolist() == [1, 1, 0]


def test_dart_keeps_what_repeats_the_pivots_least() -> None:
    # Pivots are the four longest: 0 and 1 at 0 degrees, 2 and 3 at 90. With a word there are five, and three tokens
    # are still to be kept: one each by the first three. Least like 0 is 6 (180 degrees), least like 1 of the rest is 7
    # (270; the others are nearer to 0), least like 2 is 4 (10).
    lengths = torch.tensor([10.0, 9, 8, 7, 1, 1, 1, 1, 1])
    vision = lengths[:, None] * directions(0, 0, 90, 90, 10, 80, 180, 270, 45)
    selection = chosen("dart", problem(vision, 7, text=directions(45)))
    assert selection.order.tolist() == [0, 1, 2, 3, 6, 7, 4]
    expected = [0, 0, 0, 0, 2, 1, 1 - math.cos(math.radians(80))]
    assert selection.coverage.tolist() == pytest.approx(expected, abs=1e-6)
    assert chosen("dart", problem(vision, 2)).order.tolist() == [0, 1]


def test_dart_asks_its_four_longest_words() -> None:
    # After the four image pivots come three tokens along each of the axes 4 to 7. Eight pivots, and eight tokens to
    # keep: one each. The image's pivots are at right angles to all, so they keep 4 to 7, the lowest. The words, without
    # the short first one, point against the axes 7, 6, 5 and 4, so the tokens on those are least like them: 13, 10 and
    # 8; the three on axis 4 are kept by then, and the rest ties.
    vision = torch.cat([100 * torch.eye(4, 8), torch.eye(8).repeat_interleave(3, dim=0)[12:]])
    words = torch.cat([0.1 * torch.eye(8)[:1], -torch.eye(8)[[7, 6, 5, 4]]])
    order = chosen("dart", problem(vision, 12, text=words)).order.tolist()
    assert order == [0, 1, 2, 3, 4, 5, 6, 7, 13, 10, 8, 9]


def test_scope_covers_the_image() -> None:
    # 0 and 1 are the same and cover each other: 2 each. 2 and 3 cover themselves: 1 each.
    keys = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    selection = chosen("scope", problem(torch.zeros(4, 2), 4, keys=keys))
    assert selection.order.tolist() == [0, 2, 3, 1]
    assert selection.coverage.tolist() == [2, 3, 4, 4]


def test_scope_multiplies_the_gain_by_the_attention() -> None:
    keys = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    given = problem(torch.zeros(4, 2), 4, keys=keys, attention=torch.tensor([0.1, 0.1, 0.1, 0.5]))
    # 0.2, 0.2, 0.1 and 0.5; then 0.2 and 0.1 are as they were.
    selection = chosen("scope", given)
    assert selection.order.tolist() == [3, 0, 2, 1]
    assert selection.coverage.tolist() == [1, 3, 4, 4]


def test_scope_does_not_cover_what_is_excluded() -> None:
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert chosen("scope", problem(keys, 1)).order.tolist() == [1]
    # With 2 and 3 excluded, 1 covers no more than 0 does.
    assert chosen("scope", problem(keys, 1, excluded=excluding(4, 2, 3))).order.tolist() == [0]


def test_apet_keeps_the_basis_and_what_it_explains_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtok_deploy.methods.apet._BASIS_TOKENS", 2)
    # Farthest from 0, the first, is 1. Both lie on the x axis, and so does 4; 3, 5 and 2 are 2, 1.5 and 1 away from it.
    keys = torch.tensor([[1.0, 0, 0], [4, 0, 0], [1, 1, 0], [2, 0, 2], [3, 0, 0], [0, -1.5, 0]])
    selection = chosen("apet", problem(torch.zeros(6, 2), 6, keys=keys))
    assert selection.order.tolist() == [0, 1, 3, 5, 2, 4]
    assert selection.coverage.tolist() == pytest.approx([0, 0, 2, 1.5, 1, 0])
    # Without 0 and 1: from 2, 5 is 2.7 away and 3 and 4 are less. They span the plane of x and y.
    barred = problem(torch.zeros(6, 2), 3, keys=keys, excluded=excluding(6, 0, 1))
    assert chosen("apet", barred).order.tolist() == [2, 5, 3]


def test_otprune_weighs_tokens_by_what_the_image_has_much_of() -> None:
    # Features of length 1: V = [[a, 0], [a, 0], [0, 1], [0, 0]] with a^2 = 1/2. S S^T has 1/2 for 0 and 1 and between
    # them, and 1 for 2. So 1 + 0.01 times that: 2, then 0, then 1 with what 0 leaves, then 3, which adds nothing.
    vision = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    selection = chosen("otprune", problem(vision, 4))
    assert selection.order.tolist() == [2, 0, 1, 3]
    assert selection.coverage.tolist() == pytest.approx([1.01, 1.005, 1.005 - 0.005**2 / 1.005, 1])


def test_otprune_does_not_count_what_is_excluded() -> None:
    vision = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 5.0], [0.0, 5.0], [0.0, 5.0]])
    # The second feature is 2's alone, the first is shared by 0 and 1.
    given = problem(vision, 1, excluded=excluding(5, 3, 4))
    assert chosen("otprune", given).order.tolist() == [2]
    assert chosen("otprune", given).coverage.tolist() == pytest.approx([1.01])


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


@pytest.mark.parametrize("name", METHODS)
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


@pytest.mark.parametrize("num_bad", [1, 6])
@pytest.mark.parametrize("num_picks", [1, 3])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in FEATURELESS])
def test_features_that_are_not_finite_show_in_the_total(name: MethodName, num_picks: int, num_bad: int) -> None:
    for value in (torch.nan, torch.inf):
        bad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        bad[-num_bad:] = value
        given = problem(bad, num_picks, text=torch.ones(1, 4), attention=bad[:, 0])
        (selection,) = comparator(name)([given], CONFIG)
        assert not torch.isfinite(selection.total)
        assert selection.kept.min() >= 0
        assert selection.kept.max() < 6


def features(num_tokens: int, kind: str) -> Tensor:
    made = torch.randn(num_tokens, 6, generator=torch.Generator().manual_seed(num_tokens))
    return {"all-different": made, "two-kinds": made[[0, -1] * num_tokens][:num_tokens], "zeros": 0 * made}[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["all-different", "two-kinds", "zeros"])
@pytest.mark.parametrize("name", METHODS)
def test_as_many_tokens_as_asked_for_whatever_the_features(name: MethodName, kind: str, dtype: torch.dtype) -> None:
    for num_tokens, num_picks, num_words in [(1, 1, 1), (2, 1, 0), (30, 7, 3), (30, 22, 9), (30, 30, 0)]:
        vision = features(num_tokens, kind).to(dtype)
        # Every fourth token is excluded where enough are left.
        mask = torch.arange(num_tokens) % 4 == 3 if num_picks <= 22 < num_tokens else None
        if (name == "downsample" and num_picks < num_tokens) or (name == "text-coverage" and not num_words):
            continue
        given = problem(
            vision,
            num_picks,
            text=torch.ones(num_words, 6, dtype=dtype),
            attention=torch.zeros(num_tokens),
            excluded=mask,
        )
        selection = chosen(name, given)
        assert selection.kept.unique().tolist() == selection.kept.tolist()
        assert selection.kept[0] >= 0
        assert selection.kept[-1] < num_tokens
        assert mask is None or not mask[selection.kept].any()
        assert torch.equal(chosen(name, given).order, selection.order)
        assert (selection.order.dtype, selection.coverage.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FEATURELESS])
def test_ties_go_to_the_lowest_index(name: MethodName) -> None:
    zeros = torch.zeros(30, 6)
    given = problem(zeros, 12, text=zeros[:2], attention=zeros[:, 0], excluded=excluding(30, 0, 4))
    assert chosen(name, given).order.tolist() == [1, 2, 3, *range(5, 14)]


@pytest.mark.parametrize(("name", "num_chosen"), [("cdpruner", 3), ("apet", 10)])
def test_what_adds_nothing_ties_whatever_the_rounding(name: MethodName, num_chosen: int) -> None:
    # Three dimensions: three tokens span them all, and ten basis tokens as well.
    for seed in range(5):
        vision = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
        selection = chosen(name, problem(vision, 30))
        assert selection.coverage[num_chosen:].tolist() == [0] * (30 - num_chosen)
        left = [token for token in range(40) if token not in selection.order[:num_chosen]]
        assert selection.order[num_chosen:].tolist() == left[: 30 - num_chosen]
        # As like itself as any other: the first of all ties, too.
        assert selection.order[0] == 0


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_the_question_changes_what_methods_that_read_it_keep(name: MethodName) -> None:
    vision = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    orders = {
        tuple(
            chosen(name, problem(vision, 40 if name == "downsample" else 16, text=words, attention=vision[:, 0])).order
        )
        for words in (torch.eye(6)[:4], -3 * torch.eye(6)[:4], torch.eye(6)[3:])
    }
    assert (len({tuple(map(int, order)) for order in orders}) > 1) == reads_question(name)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "downsample"])
def test_attention_changes_what_methods_that_read_it_keep(name: MethodName) -> None:
    generator = torch.Generator().manual_seed(0)
    vision = torch.randn(40, 6, generator=generator)
    orders = [
        chosen(
            name, problem(vision, 10, text=torch.eye(6), attention=torch.rand(40, generator=generator))
        ).order.tolist()
        for _ in range(2)
    ]
    assert (orders[0] != orders[1]) == reads_attention(name)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "downsample"])
def test_keys_change_what_methods_that_read_them_keep(name: MethodName) -> None:
    generator = torch.Generator().manual_seed(0)
    given = problem(torch.randn(40, 6, generator=generator), 10, text=torch.eye(6), attention=torch.ones(40))
    orders = [
        chosen(name, replace(given, keys=torch.randn(40, 3, generator=generator))).order.tolist() for _ in range(2)
    ]
    assert (orders[0] != orders[1]) == reads_keys(name)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "downsample"])
def test_a_smaller_budget_keeps_the_first_picks_of_a_larger_one(name: MethodName) -> None:
    vision = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    given = problem(vision, 40, text=torch.eye(6)[:2], attention=vision[:, 0].abs())
    order = chosen(name, given).order
    kept = {budget: chosen(name, replace(given, num_picks=budget)).kept for budget in (1, 3, 9, 12, 30)}
    assert all(torch.equal(each, order[:budget].sort().values) for budget, each in kept.items()) == is_nested(name)


# The coverages are computed by the backends, which have tests of their own.
@pytest.mark.parametrize("name", [name for name in METHODS if coverage_of(name) is None])
def test_the_host_does_not_wait_for_what_is_computed(name: MethodName) -> None:
    # Fake tensors have shapes and no values: whatever needs one, as an index does that has no dimension, raises.
    with FakeTensorMode():
        mask = None if name == "downsample" else torch.zeros(20, dtype=torch.bool)
        num_picks = 20 if name == "downsample" else 14
        given = problem(torch.randn(20, 6), num_picks, text=torch.randn(5, 6), attention=torch.rand(20), excluded=mask)
        (selection,) = comparator(name)([given], CONFIG)
        assert selection.kept.shape == selection.coverage.shape == (num_picks,)


def test_names() -> None:
    assert [check_method(name) for name in get_args(MethodName)] == list(get_args(MethodName))
    for wrong in ("MMTok", "", None, 5, ["even"]):
        with pytest.raises(ValueError, match="method is one of mmtok, text-coverage, "):
            check_method(wrong)
        with pytest.raises(ValueError, match="method is one of mmtok, text-coverage, "):
            comparator(wrong)  # type: ignore[arg-type]
    assert {name: coverage_of(name) for name in get_args(MethodName) if coverage_of(name) is not None} == {
        "mmtok": "multimodal",
        "text-coverage": "text",
        "vision-coverage": "vision",
    }
    assert {name for name in get_args(MethodName) if reads_question(name)} == {
        *("mmtok", "text-coverage", "cdpruner", "dart", "random")
    }
    assert {name for name in get_args(MethodName) if reads_attention(name)} == {"scope", "visionzip"}
    assert {name for name in get_args(MethodName) if reads_keys(name)} == {"mmtok", "vision-coverage", "scope", "apet"}
