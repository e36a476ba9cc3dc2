"""The methods of the papers against `plain.py`, on features whose picks are no close calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmtok_deploy import SelectionConfig
from mmtok_deploy.methods import MethodName, comparator
from mmtok_deploy.problem import SelectionProblem
from tests.mmtok_deploy.methods import plain
from tests.mmtok_deploy.methods.plain import Rows

Plain = Callable[[SelectionProblem, list[int]], list[int]]


def rows(tensor: torch.Tensor) -> Rows:
    return tensor.double().numpy()


PLAIN: dict[MethodName, Plain] = {
    "cdpruner": lambda given, may: plain.cdpruner(rows(given.vision), rows(given.text), given.num_picks, may),
    "dart": lambda given, may: plain.dart(rows(given.vision), rows(given.text), given.num_picks, may),
    "scope": lambda given, may: plain.scope(
        rows(given.keys), None if given.attention is None else rows(given.attention), given.num_picks, may
    ),
    "apet": lambda given, may: plain.apet(rows(given.keys), given.num_picks, may),
    "otprune": lambda given, may: plain.otprune(rows(given.vision), given.num_picks, may),
}


def made(seed: int, num_tokens: int, num_picks: int, num_words: int = 3, *, mask: bool = False) -> SelectionProblem:
    """Features of all lengths around a few directions, with a direction common to all, as encoders give them."""
    generator = torch.Generator().manual_seed(seed)

    def features(count: int, width: int) -> torch.Tensor:
        kinds = torch.randn(4, width, generator=generator)[torch.randint(4, (count,), generator=generator)]
        noise = torch.randn(count, width, generator=generator)
        lengths = 1 + 3 * torch.rand(count, 1, generator=generator)
        return lengths * (kinds + 0.7 * noise + torch.randn(width, generator=generator))

    return SelectionProblem(
        features(num_tokens, 24),
        features(num_tokens, 20),
        features(num_words, 24) if num_words else torch.empty(0, 24),
        num_picks,
        torch.rand(num_tokens, generator=generator) < 0.25 if mask else None,
        torch.rand(num_tokens, generator=generator),
    )


def may_be_picked(given: SelectionProblem) -> list[int]:
    everything = torch.arange(len(given.vision))
    chosen: list[int] = (everything if given.excluded is None else everything[~given.excluded]).tolist()
    return chosen


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("mask", [False, True], ids=["all", "some-excluded"])
@pytest.mark.parametrize(
    ("num_tokens", "num_picks"), [(1, 1), (9, 1), (9, 3), (24, 5), (40, 12), (40, 18)], ids=lambda size: str(size)
)
def test_the_picks_and_their_order(name: MethodName, num_tokens: int, num_picks: int, mask: bool) -> None:
    for seed in range(5):
        given = made(seed, num_tokens, num_picks, mask=mask and num_tokens > num_picks)
        may = may_be_picked(given)
        given = replace(given, num_picks=min(given.num_picks, len(may)))
        (selection,) = comparator(name)([given], SelectionConfig())
        assert selection.order.tolist() == PLAIN[name](given, may), seed


@pytest.mark.parametrize("name", ["cdpruner", "dart", "scope"])
def test_without_words_and_attention(name: MethodName) -> None:
    given = replace(made(0, 30, 9, num_words=0), attention=None)
    (selection,) = comparator(name)([given], SelectionConfig())
    assert selection.order.tolist() == PLAIN[name](given, list(range(30)))


@pytest.mark.parametrize("num_words", [1, 2, 6])
def test_dart_with_other_numbers_of_words(num_words: int) -> None:
    given = made(3, 40, 21, num_words)
    (selection,) = comparator("dart")([given], SelectionConfig())
    assert selection.order.tolist() == PLAIN["dart"](given, list(range(40)))


def test_scope_adds_up_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtok_deploy.methods.scope._BLOCK_ROWS", 7)
    given = made(1, 40, 12)
    (selection,) = comparator("scope")([given], SelectionConfig())
    assert selection.order.tolist() == PLAIN["scope"](given, list(range(40)))


def test_the_determinants_factors_multiply_to_the_determinant() -> None:
    given = made(0, 12, 4, num_words=0)
    (selection,) = comparator("cdpruner")([given], SelectionConfig())
    kernel = plain.cosines(rows(given.vision), rows(given.vision))
    picked = selection.order.tolist()
    reached = float(np.linalg.det(kernel[np.ix_(picked, picked)]))
    assert selection.coverage.prod().item() == pytest.approx(reached, rel=1e-4)
    # Greedy picks, which on this image come near the best set there is.
    assert 0.5 < reached / plain.best_determinant(kernel, 4) <= 1 + 1e-9
