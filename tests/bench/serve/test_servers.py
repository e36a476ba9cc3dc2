from __future__ import annotations

from pathlib import Path

import pytest

from mmtok_bench.serve.plan import Side
from mmtok_bench.serve.presets import PRESETS
from mmtok_bench.serve.servers import ServerPool, make_server
from mmtok_bench.server import ServerError, SglangServer

SWEEP = PRESETS["cpu"]
SIDES = [Side("off", "off"), Side("10%", "off")]


def test_a_server_that_cannot_start_is_told_once_and_not_started_again(tmp_path: Path) -> None:
    made: list[SglangServer] = []

    def make(side: Side) -> SglangServer:
        made.append(make_server(SWEEP, SWEEP.models[0], side, tmp_path / "nowhere", tmp_path / f"{side.budget}.log"))
        return made[-1]

    with ServerPool(make, side_by_side=True) as pool:
        pool.start_all(SIDES)
        assert [server.is_alive() for server in made] == [True, True]
        with pytest.raises(ServerError, match="ended while starting") as first:
            pool.get(SIDES[0])
        with pytest.raises(ServerError) as second:
            pool.get(SIDES[0])
        assert str(second.value) == str(first.value)
        assert list(pool.dead) == [SIDES[0]]
    assert len(made) == 2
    assert not any(server.is_alive() for server in made)


def test_a_server_that_was_ready_and_is_just_dying_has_died(tmp_path: Path) -> None:
    server = make_server(SWEEP, SWEEP.models[0], SIDES[0], tmp_path / "nowhere", tmp_path / "it.log")
    with ServerPool(lambda side: server, side_by_side=True) as pool:
        pool.start_all(SIDES[:1])
        # As if it had taken requests for hours; it is alive still when it is asked for, and then ends.
        server.start_s = 1.0
        server._started_at_s -= 10_000.0
        with pytest.raises(ServerError, match=r"^the server at budget off died\.\nThe end of its log:"):
            pool.get(SIDES[0])
        assert list(pool.dead) == SIDES[:1]


def test_one_at_a_time_none_is_started_before_it_is_asked_for(tmp_path: Path) -> None:
    made: list[Side] = []

    def make(side: Side) -> SglangServer:
        made.append(side)
        return make_server(SWEEP, SWEEP.models[0], side, tmp_path / "nowhere", tmp_path / "it.log")

    with ServerPool(make, side_by_side=False) as pool:
        pool.start_all(SIDES)
        assert made == []
        with pytest.raises(ServerError):
            pool.get(SIDES[1])
        assert made == [SIDES[1]]
