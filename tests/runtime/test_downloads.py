"""Downloads from servers that send a byte now and then, which the time limits of `requests` let go on."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from sglang.srt.utils import get_image_bytes

from mmtok_sglang.downloads import Downloads

TIMEOUT_S = 0.5
SLOW = {
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n",
    "body of unknown length": b"HTTP/1.0 200 OK\r\n\r\n",
    "header": b"HTTP/1.1 200 OK\r\nX: ",
    "handshake": b"\x16\x03\x03\x40\x00",
}
"""What comes before a byte every 50 ms, the last of an answer in TLS."""


class Server:
    """Answers `/good` at once and keeps the connection; all else slowly."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.num_connections = 0
        self.num_open = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.num_connections += 1
            self.num_open += 1
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                while request := connection.recv(65536):
                    if request.startswith(b"GET /good"):
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
                        continue
                    is_tls = not request.startswith(b"GET")
                    kind = "handshake" if is_tls else request.split()[1][1:].decode().replace("%20", " ")
                    connection.sendall(SLOW[kind])
                    while True:
                        connection.sendall(b"x")
                        time.sleep(0.05)
        except OSError:
            pass
        finally:
            self.num_open -= 1


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def address(server: Server, kind: str) -> str:
    return f"http{'s' if kind == 'handshake' else ''}://127.0.0.1:{server.port}/{kind}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("used_before", [False, True])
def test_a_slow_server_does_not_keep_a_thread(server: Server, kind: str, used_before: bool) -> None:
    downloads = Downloads(num_threads=1, timeout_s=TIMEOUT_S)

    async def run() -> None:
        if used_before:
            assert await downloads.run(get_image_bytes, address(server, "good")) == b"good"
        with pytest.raises(TimeoutError):
            await downloads.run(get_image_bytes, address(server, kind))
        assert await downloads.run(get_image_bytes, address(server, "good")) == b"good"

    asyncio.run(run())


def test_a_download_that_nobody_waits_for_ends(server: Server) -> None:
    downloads = Downloads(num_threads=1, timeout_s=60)

    async def run() -> None:
        running = asyncio.create_task(downloads.run(get_image_bytes, address(server, "body")))
        await asyncio.sleep(0.2)
        running.cancel()
        assert await asyncio.wait_for(downloads.run(get_image_bytes, address(server, "good")), 1) == b"good"

    asyncio.run(run())


def test_connections_are_used_again(server: Server) -> None:
    downloads = Downloads(num_threads=1, timeout_s=60)

    async def run() -> None:
        for _ in range(3):
            assert await downloads.run(get_image_bytes, address(server, "good")) == b"good"

    asyncio.run(run())
    assert (server.num_connections, server.num_open) == (1, 1)


def test_an_error_of_the_download_is_raised() -> None:
    downloads = Downloads(num_threads=1, timeout_s=60)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/good"
        with pytest.raises(OSError, match="refused"):
            asyncio.run(downloads.run(get_image_bytes, url))
