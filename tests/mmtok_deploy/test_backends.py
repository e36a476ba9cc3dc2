from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from mmtok_deploy import select_tokens
from mmtok_deploy.backends import Backend, BackendName, get_backend, lazy, reference
from tests.mmtok_deploy.problems import random_problem, using_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "fastest"), [("cpu", lazy.select), ("mps", reference.select), ("cuda", reference.select)]
)
def test_auto_is_the_fastest_measured_on_the_device_within_memory(device: str, fastest: Backend) -> None:
    assert inspect.unwrap(get_backend("auto", torch.device(device))) is inspect.unwrap(fastest)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_the_reference_runs_everywhere(device: torch.device) -> None:
    assert get_backend("reference", device) is reference.select


@pytest.mark.parametrize("name", ["reference", "lazy", "blocked"])
def test_equal_tokens_tie_up_to_rounding(name: BackendName) -> None:
    # Which of two equal tokens comes first is nobody's promise; that the second adds nothing is.
    twice = random_problem(60).take(torch.arange(60).repeat(2))
    with using_backend(name):
        found = twice.select(30)
    kinds = [token % 60 for token in found.order.tolist()]
    assert len(set(kinds)) == 30
    with using_backend("reference"):
        torch.testing.assert_close(found.coverage, twice.select(30).coverage, rtol=1e-5, atol=0)


def test_asked_for_by_name_where_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="backend 'lazy' runs on cpu, the features are on cuda:0"):
        get_backend("lazy", CUDA)


def test_an_unknown_name() -> None:
    name: Any = "fast"
    with pytest.raises(ValueError, match=r"backend is one of auto, .*triton, got 'fast'"):
        select_tokens(torch.ones(3, 2), torch.ones(3, 2), torch.ones(1, 2), 2, backend=name)
