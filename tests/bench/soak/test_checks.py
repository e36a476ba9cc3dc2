"""What is held after every row, and the rows that look at processes and at the event loop: against a stub."""

from __future__ import annotations

import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from mmtok_bench.server import ServerPool
from mmtok_soak import killing
from mmtok_soak.event_loop import block_the_event_loop
from mmtok_soak.killing import kill_processes
from mmtok_soak.trial import Served, Trial
from tests.bench.soak.stub_server import StubServer


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial("qwen2.5-vl", tmp_path)


def kinds(trial: Trial) -> set[str]:
    return {failure.what for failure in trial.failures}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrongs", "failures"),
    [
        ([], set()),
        (["drifts"], {"the fixed chats differ by more than 5e-06"}),
        (["keeps a request"], {"requests are left in the server"}),
    ],
)
def test_a_server_is_held_against_what_it_was(trial: Trial, wrongs: list[str], failures: set[str]) -> None:
    with StubServer(trial.folder, *wrongs) as server, trial.checked(server):
        pass
    assert kinds(trial) == failures
    assert trial.counts["fixed_chats"] == 20
    assert trial.numbers["largest_difference"] == pytest.approx(1e-5 if wrongs == ["drifts"] else 0)


def test_a_server_that_ends_afterwards_is_a_failure(trial: Trial) -> None:
    with StubServer(trial.folder, "dies") as server, trial.checked(server):
        pass
    assert kinds(trial) == {"the fixed chats are not answered afterwards"}


@pytest.mark.slow
def test_a_server_that_ends_meanwhile_is_a_failure_and_the_next_row_gets_another(trial: Trial) -> None:
    pool = ServerPool[Served](lambda key: StubServer(key.folder, *key.flags), restarts=True)
    row = Trial("qwen2.5-vl", trial.folder, pool=pool)
    try:
        with row.served() as server:
            first = server.process_id
            psutil.Process(first).kill()
            while server.is_alive():
                time.sleep(0.01)
        assert kinds(row) == {"the server ended"}
        with row.served() as server:
            second = server.process_id
        with row.served() as server:
            assert server.process_id == second != first
        with row.served("blocks") as server:
            assert server.process_id != second
    finally:
        pool.stop_all()
    assert not psutil.pid_exists(second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrongs", "failure"),
    [([], None), (["leaves its child"], "are left 10 s after"), (["outlives its child"], "are left 10 s after")],
)
def test_killing(trial: Trial, monkeypatch: pytest.MonkeyPatch, wrongs: list[str], failure: str | None) -> None:
    made: list[StubServer] = []

    def make_server(key: Served) -> StubServer:
        made.append(StubServer(key.folder, *key.flags))
        return made[-1]

    monkeypatch.setattr(killing, "make_soak_server", make_server)
    monkeypatch.setattr(killing, "_GONE_WITHIN_S", 1.0)
    kill_processes(trial, 3, *wrongs)
    assert trial.counts["kills"] == 3
    children = [["scheduler", str(server.port)] for server in made]
    assert not any(_arguments(process)[-2:] in children for process in psutil.process_iter())
    # A process that leaves its session is looked for by its parent, which is gone: it is an orphan.
    expected = {"orphans run on", failure} if failure else set()
    assert all(any(mark in kind for mark in expected) for kind in kinds(trial))
    assert bool(trial.failures) is (failure is not None)
    if not wrongs:
        assert trial.numbers["gone_after_s"] < 1


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


@pytest.mark.slow
@pytest.mark.parametrize("wrongs", [[], ["blocks"]])
def test_health_is_asked_meanwhile(trial: Trial, wrongs: list[str]) -> None:
    with StubServer(trial.folder, *wrongs) as server:
        block_the_event_loop(trial, server, 1, num_urls=2)
    slow = {f"/health takes longer than 250 ms: {kind}" for kind in ("hanging addresses", "long guidance", "both")}
    assert kinds(trial) == (slow if wrongs else set())
    assert trial.counts["requests"] == 2 + 5 + 7
    assert trial.counts["health_checks"] >= 3
