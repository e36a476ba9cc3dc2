from __future__ import annotations

from pathlib import Path

import pytest

from mmtok_bench.server import ServerError, ServerPool, SglangServer, make_server

KEYS = ["one", "two"]


def server_of(folder: Path, key: str) -> SglangServer:
    return make_server(folder / "nowhere", "qwen2.5-vl", log_path=folder / f"{key}.log")


@pytest.mark.slow
def test_a_server_that_cannot_start_is_told_once_and_not_started_again(tmp_path: Path) -> None:
    made: list[SglangServer] = []

    def make(key: str) -> SglangServer:
        made.append(server_of(tmp_path, key))
        return made[-1]

    with ServerPool(make, side_by_side=True) as pool:
        pool.start_all(KEYS)
        assert [server.is_alive() for server in made] == [True, True]
        with pytest.raises(ServerError, match="ended while starting") as first:
            pool.get(KEYS[0])
        with pytest.raises(ServerError) as second:
            pool.get(KEYS[0])
        assert str(second.value) == str(first.value)
        assert list(pool.dead) == [KEYS[0]]
    assert len(made) == 2
    assert not any(server.is_alive() for server in made)


@pytest.mark.slow
def test_a_server_that_was_ready_and_is_just_dying_has_died(tmp_path: Path) -> None:
    server = server_of(tmp_path, "it")
    with ServerPool[str](lambda key: server, side_by_side=True) as pool:
        pool.start_all(KEYS[:1])
        # As if it had taken requests for hours; it is alive still when it is asked for, and then ends.
        server.start_s = 1.0
        server._started_at_s -= 10_000.0
        with pytest.raises(ServerError, match=r"^the server died\.\nThe end of its log:"):
            pool.get(KEYS[0])
        assert list(pool.dead) == KEYS[:1]


@pytest.mark.slow
def test_one_at_a_time_none_is_started_before_it_is_asked_for(tmp_path: Path) -> None:
    made: list[str] = []

    def make(key: str) -> SglangServer:
        made.append(key)
        return server_of(tmp_path, key)

    with ServerPool(make, side_by_side=False) as pool:
        pool.start_all(KEYS)
        assert made == []
        with pytest.raises(ServerError):
            pool.get(KEYS[1])
        assert made == [KEYS[1]]
