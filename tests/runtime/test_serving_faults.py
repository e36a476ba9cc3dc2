"""A few seconds of `make soak` on the servers of the other tests: docs/reliability.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmtok_bench.families import FamilyName
from mmtok_soak.fuzz import fuzz, judge_failed
from mmtok_soak.images import send_odd_images
from mmtok_soak.storm import storm
from mmtok_soak.trial import Trial
from tests.runtime.serving import Served


@pytest.fixture(scope="module")
def trial(
    family: FamilyName, servers: tuple[Served, Served], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trial]:
    """A trial on the session's server with a budget, which must be as it was after all of these tests."""
    if family == "llava-next":
        pytest.skip("its path is the one of LLaVA-1.5")
    trial = Trial(family, tmp_path_factory.mktemp("soak"))
    with trial.checked(servers[0].server):
        yield trial
    assert not trial.failures
    assert trial.counts["fixed_chats"] == 20


def test_fuzzed_bodies(trial: Trial, servers: tuple[Served, Served]) -> None:
    pruned, plain = (served.server for served in servers)
    judge_failed(trial, plain, fuzz(trial, pruned, 60))
    assert not trial.failures
    assert trial.counts["bodies"] == 60
    assert trial.counts["answers_2xx"]
    assert trial.counts["answers_4xx"]


def test_odd_images(trial: Trial, servers: tuple[Served, Served]) -> None:
    send_odd_images(trial, servers[0].server, 6, settings=[{}, {"mmtok_budget": "auto"}], with_large=False)
    assert not trial.failures
    assert trial.counts["images"] > 60


def test_a_small_storm(trial: Trial, servers: tuple[Served, Served]) -> None:
    storm(trial, servers[0].server, 40, num_clients=8)
    assert not trial.failures
    assert trial.counts["requests"] == 40
    assert trial.counts["answered"]
    assert trial.counts["aborted"]
