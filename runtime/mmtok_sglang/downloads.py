"""Downloads that end at once when nobody waits for them any more.

The time limits of `requests` hold between two packets: a server that sends a byte a second would keep a thread for a
day, in SGLang's download of 64 KiB at a time.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from requests.adapters import HTTPAdapter
from sglang.srt.utils.common import get_mm_http_session
from typing_extensions import override
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

__all__ = ["Downloads"]


class Downloads:
    """Threads for SGLang's downloads.

    Args:
        num_threads: Downloads at a time.
        timeout_s: Seconds for the whole of one, waiting for a thread included.
    """

    def __init__(self, num_threads: int, timeout_s: float) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "mmtok-download", initializer=_mount_adapters)
        self._timeout_s = timeout_s

    async def run(self, download: Callable[..., bytes], *args: Any) -> bytes:
        """Returns `download(*args)`, called in a thread.

        Raises:
            TimeoutError: It took too long. Then, and when the caller is cancelled, its connections are shut down, so
                that the thread is free again.
        """
        connections = _Connections()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, connections.during, download, *args
                )
        finally:
            connections.shut_down()


class _Connections:
    """The connections that one download uses, which another thread can shut down."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_over = False

    def during(self, download: Callable[..., bytes], *args: Any) -> bytes:
        """Returns `download(*args)`; connections of this thread are added to these meanwhile."""
        _of_this_thread.connections = self
        try:
            return download(*args)
        finally:
            with self._lock:
                for each in self._sockets:
                    each.close()
                self._sockets.clear()

    def add(self, used: socket.socket) -> None:
        """Adds a socket, by a descriptor of its own: TLS takes the given one over. The family is not looked at.

        Raises:
            OSError: The download is over.
        """
        with self._lock:
            if self._is_over:
                raise OSError("nobody waits for this download any more")
            self._sockets.append(socket.fromfd(used.fileno(), socket.AF_INET, socket.SOCK_STREAM))

    def shut_down(self) -> None:
        """Has a download that is under way fail; of one that is done, the connections stay open for the next."""
        with self._lock:
            self._is_over = True
            for each in self._sockets:
                with suppress(OSError):  # the server may have closed it
                    each.shutdown(socket.SHUT_RDWR)


_of_this_thread = threading.local()


class _Known(HTTPConnection):
    """A connection that is added to those of this thread's download, before TLS, and when it is used again."""

    @override
    def _new_conn(self) -> socket.socket:
        made = super()._new_conn()
        _of_this_thread.connections.add(made)
        return made

    @override
    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            _of_this_thread.connections.add(self.sock)
        super().request(*args, **kwargs)


class _KnownTls(_Known, HTTPSConnection):
    """The same with TLS."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Known


class _PoolTls(HTTPSConnectionPool):
    ConnectionCls = _KnownTls


class _Adapter(HTTPAdapter):
    """Has `requests` connect by the classes above, by way of proxies, too."""

    @override
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        _take(self.poolmanager)

    @override
    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        return _take(super().proxy_manager_for(*args, **kwargs))


def _take(manager: Any) -> Any:
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _PoolTls}
    return manager


def _mount_adapters() -> None:
    session = get_mm_http_session()  # this thread's own
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter())
