"""A server that the page starts: a process that answers as SGLang does when it is ready, and knows no model."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from mmtok_bench.page.served import StartedServer, State
from mmtok_bench.server import SglangServer

ANSWERS = """
import http.server, sys
class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Quick(SglangServer):
    program = ANSWERS

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.program, str(self.port)]


class Broken(Quick):
    program = "raise SystemExit('no such checkpoint')"


def wait_for(served: StartedServer, name: str) -> State:
    deadline_s = time.monotonic() + 30
    while (state := served.state()).name != name and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert state.name == name
    return state


def test_a_server_that_dies_is_told_and_started_anew_once() -> None:
    made: list[Quick] = []

    def make() -> Quick:
        made.append(Quick("model"))
        return made[-1]

    with StartedServer(make) as served:
        assert served.state().name == "starting"
        assert served.state().waited_s >= 0
        wait_for(served, "ready")
        served.restart()
        assert len(made) == 1
        made[0].stop()
        state = wait_for(served, "stopped")
        assert state.can_restart
        assert state.message.startswith("The server ended.")
        with ThreadPoolExecutor(4) as tabs:
            list(tabs.map(lambda _: served.restart(), range(4)))
        wait_for(served, "ready")
        assert len(made) == 2
        assert served.url == made[1].url
    assert not made[1].is_alive()


def test_a_server_that_does_not_start_is_told_with_its_log() -> None:
    with StartedServer(lambda: Broken("model")) as served:
        state = wait_for(served, "stopped")
        assert state.can_restart
        assert state.message.startswith("The server did not start.")
        assert state.log.endswith("no such checkpoint")
        served.restart()
        assert served.state().name in ("starting", "stopped")
