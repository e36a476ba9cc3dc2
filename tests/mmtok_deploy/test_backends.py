from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from mmtok_deploy import select_tokens
from mmtok_deploy.backends import Backend, BackendName, fastest_backend, get_backend, lazy, reference
from tests.mmtok_deploy.problems import assert_greedy, random_problem, using_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("device", "fastest"), [("cpu", lazy.select), ("mps", reference.select)])
def test_auto_is_the_fastest_measured_on_the_device_within_memory(device: str, fastest: Backend) -> None:
    assert inspect.unwrap(get_backend("auto", torch.device(device))) is inspect.unwrap(fastest)


@pytest.mark.parametrize(
    ("capability", "has_triton", "fastest"),
    [
        ((8, 0), True, "triton"),
        ((9, 0), True, "triton"),
        ((12, 1), True, "triton"),
        ((7, 5), True, "reference"),
        ((9, 0), False, "reference"),
        (None, True, "reference"),
    ],
)
def test_auto_on_cuda(capability: tuple[int, int] | None, has_triton: bool, fastest: BackendName) -> None:
    assert fastest_backend("cuda", capability, has_triton) == fastest


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_the_reference_runs_everywhere(device: torch.device) -> None:
    assert get_backend("reference", device) is reference.select


@pytest.mark.parametrize("name", ["reference", "lazy", "blocked"])
def test_either_of_two_equal_tokens_is_picked(name: BackendName) -> None:
    twice = random_problem(60).take(torch.arange(60).repeat(2))
    with using_backend(name):
        found = twice.select(30)
    # The pick's twin gains as much as the pick itself.
    assert assert_greedy(found, twice.picking(30)).smallest_lead < 1
    assert len(set((found.order % 60).tolist())) == 30


def test_asked_for_by_name_where_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="backend 'lazy' runs on cpu, the features are on cuda:0"):
        get_backend("lazy", CUDA)


def test_an_unknown_name() -> None:
    name: Any = "fast"
    with pytest.raises(ValueError, match=r"backend is one of auto, .*triton, got 'fast'"):
        select_tokens(torch.ones(3, 2), torch.ones(3, 2), torch.ones(1, 2), 2, backend=name)
