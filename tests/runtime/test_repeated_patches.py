"""Which tokens of an image repeat a neighbour, and what an encoder computes without their patches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmtok_sglang.repeated_patches import repeated_tokens


def one_by_one(tokens: Tensor, columns: int, max_difference: int) -> list[bool]:
    """The definition, a token after the other."""
    shown: list[int] = []
    for place, token in enumerate(tokens.int()):
        neighbours = ([shown[-1]] if place % columns else []) + ([shown[place - columns]] if place >= columns else [])
        like = [each for each in neighbours if (tokens[each].int() - token).abs().max() <= max_difference]
        shown.append(like[0] if like else place)
    return [place != each for place, each in enumerate(shown)]


def patches_of(tokens: Tensor) -> Tensor:
    return tokens.view(len(tokens) * 4, -1)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 1), (5, 7), (8, 3)])
@pytest.mark.parametrize("max_difference", [0, 1, 3, 255])
def test_tokens_repeat_a_neighbour_as_defined(grid: tuple[int, int], max_difference: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_colours in (1, 2, 5):
        colours = torch.randint(0, num_colours, (grid[0] * grid[1], 1), generator=generator)
        noise = torch.randint(0, 2, (len(colours), 12), generator=generator)
        tokens = (colours * 3 + noise).to(torch.uint8)
        found = repeated_tokens(patches_of(tokens), grid, max_difference)
        assert found.tolist() == one_by_one(tokens, grid[1], max_difference)


def test_blank_paper_is_one_token() -> None:
    tokens = torch.full((35, 12), 255, dtype=torch.uint8)
    assert repeated_tokens(patches_of(tokens), (5, 7), 0).tolist() == [False] + [True] * 34


def test_a_slow_gradient_is_not_one_colour() -> None:
    tokens = torch.arange(20, dtype=torch.uint8)[:, None].expand(20, 12).contiguous()
    # Each is 1 from its neighbour; one in four is encoded, of which the next three differ by at most 3.
    assert (~repeated_tokens(patches_of(tokens), (1, 20), 3)).nonzero().flatten().tolist() == [0, 4, 8, 12, 16]


def test_a_single_pixel_counts() -> None:
    tokens = torch.zeros(2, 12, dtype=torch.uint8)
    tokens[1, 7] = 5
    assert repeated_tokens(patches_of(tokens), (1, 2), 4).tolist() == [False, False]
    assert repeated_tokens(patches_of(tokens), (1, 2), 5).tolist() == [False, True]


def test_the_difference_of_far_values_does_not_wrap_around() -> None:
    tokens = torch.tensor([[255] * 12, [0] * 12], dtype=torch.uint8)
    assert repeated_tokens(patches_of(tokens), (1, 2), 254).tolist() == [False, False]
