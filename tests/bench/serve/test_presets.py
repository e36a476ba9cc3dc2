from __future__ import annotations

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
    assert [sweep.requests_of(concurrency) for concurrency in (1, 16, 64)] == [32, 32, 128]
