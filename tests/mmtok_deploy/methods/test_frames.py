"""The methods that go by a video's frames, against `plain.py` and on cases small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmtok_deploy import SelectionConfig
from mmtok_deploy.methods import IMAGE_METHODS, MethodName, comparator, coverage_of, is_nested, needs_frames
from mmtok_deploy.problem import Selection, SelectionProblem
from tests.mmtok_deploy.methods import plain

CONFIG = SelectionConfig(tv_temp=0.1, vv_temp=0.1)


def video(vision: torch.Tensor, num_frames: int, num_picks: int) -> SelectionProblem:
    return SelectionProblem(vision, vision, vision[:0], num_picks, num_frames=num_frames)


def chosen(name: MethodName, given: SelectionProblem) -> Selection:
    (selection,) = comparator(name)([given], CONFIG)
    assert selection.kept.tolist() == sorted(set(selection.order.tolist()))
    assert len(selection) == given.num_picks
    return selection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_frames", "size", "num_picks"), [(2, 1, 1), (2, 5, 5), (7, 6, 17), (4, 140, 150), (3, 4, 12), (16, 9, 100)]
)
def test_evs_is_the_plain_one(num_frames: int, size: int, num_picks: int, dtype: torch.dtype) -> None:
    vision = torch.randn(num_frames * size, 12, generator=torch.Generator().manual_seed(size)).to(dtype)
    order = chosen("evs", video(vision, num_frames, num_picks)).order
    assert order.tolist() == plain.evs(vision.double().numpy(), num_frames, num_picks)


def test_evs_keeps_what_changes_most() -> None:
    # Frames of two tokens: the first one turns by 30 and then by 10 degrees, the second by 0 and then by 90.
    angles = torch.tensor([0.0, 50, 30, 50, 40, 140]) * math.pi / 180
    selection = chosen("evs", video(torch.stack([angles.cos(), angles.sin()], dim=1), 3, 6))
    assert selection.order.tolist() == [0, 1, 5, 2, 4, 3]
    expected = [2, 2, *(1 - math.cos(math.radians(angle)) for angle in (90, 30, 10, 0))]
    assert selection.coverage.tolist() == pytest.approx(expected, abs=1e-6)


def test_evs_of_a_still_film_goes_by_the_order() -> None:
    still = torch.ones(12, 4)
    assert chosen("evs", video(still, 3, 7)).kept.tolist() == list(range(7))


@pytest.mark.parametrize("place", [0, 5, 11])
def test_features_that_are_not_finite_show_in_the_total(place: int) -> None:
    vision = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    vision[place] = torch.nan
    (selection,) = comparator("evs")([video(vision, 3, 6)], CONFIG)
    assert not torch.isfinite(selection.total)
    assert len(set(selection.kept.tolist())) == 6


@pytest.mark.parametrize(
    ("num_frames", "size", "num_picks", "kept"),
    [
        (5, 4, 8, [*range(4), *range(16, 20)]),
        (5, 4, 12, [*range(4), *range(8, 12), *range(16, 20)]),
        # Two whole frames of three, and the first and last token of the third.
        (5, 4, 10, [*range(4), *range(8, 12), 16, 19]),
        (5, 4, 3, [0, 1, 3]),
        (5, 4, 4, [0, 1, 2, 3]),
        (2, 3, 6, [*range(6)]),
    ],
)
def test_whole_frames(num_frames: int, size: int, num_picks: int, kept: list[int]) -> None:
    given = video(torch.zeros(num_frames * size, 2), num_frames, num_picks)
    assert chosen("frames", given).kept.tolist() == kept
    assert plain.whole_frames(num_frames * size, num_frames, num_picks) == kept


def test_whole_frames_of_every_budget() -> None:
    for num_picks in range(1, 43):
        given = video(torch.zeros(42, 2), 7, num_picks)
        assert chosen("frames", given).kept.tolist() == plain.whole_frames(42, 7, num_picks)


@pytest.mark.parametrize(
    ("name", "num_frames", "num_picks"), [("evs", 1, 12), ("evs", 3, 3), ("frames", 1, 12), ("evs", 2, 5)]
)
def test_what_has_no_frames_is_an_error(name: MethodName, num_frames: int, num_picks: int) -> None:
    with pytest.raises(ValueError, match=f"^{name} .* got {num_frames}"):
        comparator(name)([video(torch.zeros(12, 2), num_frames, num_picks)], CONFIG)


@pytest.mark.parametrize("name", ["evs", "frames"])
def test_the_host_does_not_wait(name: MethodName) -> None:
    with FakeTensorMode():
        assert chosen_shape(name) == (14,)


def chosen_shape(name: MethodName) -> tuple[int, ...]:
    (selection,) = comparator(name)([video(torch.randn(20, 6), 4, 14)], CONFIG)
    return tuple(selection.kept.shape)


def test_names() -> None:
    assert needs_frames("evs")
    assert needs_frames("frames")
    assert not any(map(needs_frames, IMAGE_METHODS))
    assert (is_nested("evs"), is_nested("frames"), coverage_of("evs")) == (True, False, None)
