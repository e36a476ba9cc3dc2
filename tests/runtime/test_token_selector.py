from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmtok_deploy import select_tokens
from mmtok_deploy.runtime.sglang import selection
from mmtok_deploy.runtime.sglang.placeholders import ImagePlan
from mmtok_deploy.runtime.sglang.selection import TokenSelector
from tests.runtime.stand_ins import features, make_settings

PLAN = ImagePlan(num_tokens=12, num_kept=5, guidance=[3, 1, 2])
SETTINGS = make_settings(5)


def selected(selector: TokenSelector, plan: ImagePlan = PLAN, key: object = 1, seed: int = 0) -> list[int]:
    kept: list[int] = selector.select(key, plan, *features(plan.num_tokens, seed)).tolist()
    return kept


@pytest.mark.parametrize("guidance", [[3, 1, 2], [7], []])
@pytest.mark.parametrize("excluded", [None, [0, 4, 11]])
def test_selects_what_the_reference_selects(guidance: list[int], excluded: list[int] | None) -> None:
    vision, keys, embed = features(12)
    mask = None if excluded is None else torch.isin(torch.arange(12), torch.tensor(excluded))
    plan = replace(PLAN, guidance=guidance, excluded=mask)
    text = embed(torch.tensor(guidance, dtype=torch.int64))
    expected = select_tokens(vision, keys, text, 5, config=SETTINGS.config, excluded=mask).kept
    selector = TokenSelector(SETTINGS)
    assert selected(selector, plan) == expected.tolist()
    assert selector.num_fallbacks == 0


def test_a_tile_keeps_its_own_number() -> None:
    selector = TokenSelector(SETTINGS)
    kept = selector.select((1, 0), PLAN, *features(12), 2)
    assert kept.tolist() == TokenSelector(SETTINGS).select(1, replace(PLAN, num_kept=2), *features(12)).tolist()


def test_one_token_is_kept() -> None:
    assert selected(TokenSelector(SETTINGS), ImagePlan(num_tokens=1, num_kept=1, guidance=[3])) == [0]


@pytest.mark.parametrize("broken", ["vision", "keys"])
def test_features_that_are_not_numbers_keep_evenly_spaced_tokens(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    selector = TokenSelector(SETTINGS)
    vision, keys, embed = features(12)
    (vision if broken == "vision" else keys)[3] = torch.nan
    with caplog.at_level(logging.WARNING):
        kept = selector.select(1, PLAN, vision, keys, embed)
        assert selector.select(1, PLAN, vision, keys, embed) is kept
    assert kept.tolist() == [0, 2, 5, 8, 11]
    assert (kept.dtype, selector.num_fallbacks) == (torch.int64, 1)
    (line,) = caplog.messages
    assert "12 tokens (SelectionError: " in line
    assert "5 evenly spaced tokens" in line


@pytest.mark.parametrize("num_pickable", [0, 4])
def test_too_few_pickable_tokens_keep_evenly_spaced_ones(num_pickable: int) -> None:
    selector = TokenSelector(SETTINGS)
    assert selected(selector, replace(PLAN, excluded=torch.arange(12) >= num_pickable)) == [0, 2, 5, 8, 11]
    assert selector.num_fallbacks == 1


@pytest.mark.parametrize(("num_tokens", "num_kept"), [(1, 1), (12, 1), (12, 11), (12, 12), (16384, 16374)])
def test_evenly_spaced_tokens_are_distinct_and_in_order(num_tokens: int, num_kept: int) -> None:
    plan = ImagePlan(num_tokens, num_kept, [])
    vision, no_keys = torch.zeros(num_tokens, 1), torch.zeros(0, 1)
    kept = TokenSelector(SETTINGS).select(1, plan, vision, no_keys, torch.nn.Embedding(1, 1))
    assert len(kept) == num_kept
    assert kept[0] == 0
    assert kept[-1] < num_tokens
    assert bool((kept.diff() > 0).all())


def test_the_first_selection_stands_under_its_key() -> None:
    selector = TokenSelector(SETTINGS)
    first = selected(selector, seed=0)
    assert selected(TokenSelector(SETTINGS), seed=1) != first
    assert selected(selector, seed=1) == first
    remembered = selector.remembered(1)
    assert remembered is not None
    assert remembered.tolist() == first
    assert selector.remembered(2) is None


def test_what_was_not_used_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_MAX_REMEMBERED", 2)
    selector = TokenSelector(SETTINGS)
    for key in (1, 2, 1, 3):
        selected(selector, key=key)
    assert [selector.remembered(key) is not None for key in (1, 2, 3)] == [True, False, True]


def test_text_is_embedded_even_where_nothing_can_be_selected() -> None:
    # With tensor parallelism every rank takes part in the embedding, whatever its features are.
    embedded: list[Tensor] = []
    vision, keys, embed = features(12)

    def watched(ids: Tensor) -> Tensor:
        embedded.append(ids)
        rows: Tensor = embed(ids)
        return rows

    TokenSelector(SETTINGS).select(1, PLAN, vision * torch.nan, keys, watched)
    assert [ids.tolist() for ids in embedded] == [[3, 1, 2]]
