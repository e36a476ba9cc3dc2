from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import MultimodalInputs, MultimodalProcessorOutput

from mmtok_deploy.runtime.sglang.cache_key import CacheKeys
from mmtok_deploy.runtime.sglang.placeholders import ImagePlan
from tests.runtime.stand_ins import image_item, make_settings

PLAN = ImagePlan(num_tokens=6, num_kept=2, guidance=[3, 1, 2])
KEYS = CacheKeys(make_settings(2))


def inputs_of(*items: Any) -> Any:
    return KEYS.from_processor_output(
        MultimodalInputs.from_processor_output, MultimodalProcessorOutput(mm_items=list(items))
    )


@pytest.mark.parametrize(
    "other",
    [
        KEYS.key(2, PLAN),
        KEYS.key(1, replace(PLAN, guidance=[3, 1])),
        KEYS.key(1, replace(PLAN, guidance=[1, 2, 3])),
        KEYS.key(1, replace(PLAN, guidance=[])),
        KEYS.key(1, replace(PLAN, num_kept=3)),
        KEYS.key(1, replace(PLAN, num_tokens=7)),
        KEYS.key(1, replace(PLAN, method="even")),
        KEYS.key(1, replace(PLAN, seed=1)),
        *(
            CacheKeys(make_settings(2, **constant)).key(1, PLAN)
            for constant in ({"tv_temp": 0.5}, {"vv_temp": 0.5}, {"alpha": 1.0}, {"coverage": "vision"})
        ),
    ],
)
def test_everything_that_changes_the_selection_changes_the_key(other: int) -> None:
    assert other != KEYS.key(1, PLAN)


def test_the_key_is_the_same_in_every_process() -> None:
    # A constant from another process: ranks and restarts have to agree, which Python's own hash does not.
    assert KEYS.key(1, PLAN) == 18202934085683048677


def test_positions_do_not_change_the_key() -> None:
    assert KEYS.key(1, replace(PLAN, positions=torch.zeros(3, 6, dtype=torch.int64))) == KEYS.key(1, PLAN)


def test_a_pruned_image_has_a_hash_of_its_own() -> None:
    unpruned, pruned, other = (
        image_item((0, 5)),
        image_item((0, 1), PLAN),
        image_item((0, 1), replace(PLAN, guidance=[])),
    )
    inputs_of(unpruned, pruned, other)
    assert len({unpruned.hash, pruned.hash, other.hash}) == 3
    assert len({unpruned.pad_value, pruned.pad_value, other.pad_value}) == 3
    assert pruned.hash == KEYS.key(unpruned.hash, PLAN)


def test_an_unpruned_image_keeps_sglangs_hash() -> None:
    ours, theirs = image_item((0, 5)), image_item((0, 5))
    inputs_of(ours)
    MultimodalInputs.from_processor_output(MultimodalProcessorOutput(mm_items=[theirs]))
    assert (ours.hash, ours.pad_value) == (theirs.hash, theirs.pad_value)


def test_a_second_call_changes_nothing() -> None:
    item = image_item((0, 1), PLAN)
    inputs_of(item)
    first = (item.hash, item.pad_value)
    inputs_of(item)
    assert (item.hash, item.pad_value) == first


def test_a_hash_given_by_the_caller_is_salted() -> None:
    item = image_item((0, 1), PLAN, hash=1234)
    inputs_of(item)
    assert item.hash == KEYS.key(1234, PLAN)


def test_a_full_identity_does_not_outlive_the_salt() -> None:
    item = image_item((0, 1), PLAN)
    item.set_identity(bytes(range(32)))
    unsalted = item.padding_values()
    inputs_of(item)
    assert item.identity is None
    assert not set(item.padding_values()) & set(unsalted)
