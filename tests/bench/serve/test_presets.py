from __future__ import annotations

from dataclasses import replace

import pytest

from mmtok_bench.dummy_models import DUMMY_MODELS
from mmtok_bench.serve.presets import SERVE_PRESETS, preset_for_device
from mmtok_deploy.budget import Budget


@pytest.mark.parametrize(
    ("device", "preset"),
    [
        (None, "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "a6000"),
    ],
)
def test_the_preset_that_fits(device: str | None, preset: str) -> None:
    assert preset_for_device(device) == preset


@pytest.mark.parametrize("name", SERVE_PRESETS)
def test_presets_can_be_served(name: str) -> None:
    sweep = SERVE_PRESETS[name]
    assert sweep.preset == name
    assert len({model.name for model in sweep.models}) == len(sweep.models)
    for model in sweep.models:
        assert model.name in DUMMY_MODELS
        assert all(not Budget.parse(budget).is_all for budget in model.budgets)


def test_requests_keep_every_client_busy_twice() -> None:
    sweep = SERVE_PRESETS["h200"]
    assert [sweep.images_of(concurrency, 1) for concurrency in (1, 16, 64)] == [32, 32, 128]
    assert [sweep.images_of(concurrency, 6) for concurrency in (1, 16, 64)] == [6, 6, 22]
    in_turn = replace(sweep, images_in_turn=100)
    assert (in_turn.images_of(16, 6), in_turn.images_of(16, 1)) == (100, 32)


def test_a_gpu_preset_measures_often_enough_for_an_interval() -> None:
    assert all(sweep.rounds >= 5 for sweep in SERVE_PRESETS.values())
