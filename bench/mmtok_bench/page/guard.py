"""Refuses requests of other sites' pages; answers the page's own scripts, and programs that are not browsers."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

__all__ = ["Guard"]

_HEADERS = {
    # The browser then blocks scripts of the page from fetching from other sites, or sending to them.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Guard:
    """An ASGI application that wraps another and refuses requests of other sites' pages with HTTP 403.

    A browser lets every site send requests to this machine. Three headers are checked: `Host`, since a site's own name
    may resolve to this machine (DNS rebinding), so that only addresses, "localhost" and `host` are accepted;
    `Sec-Fetch-Site`, which says whether another site makes the request; and `Origin`, which names that site.

    Args:
        app: The wrapped application.
        host: The name or address at which the page is served.
    """

    def __init__(self, app: Any, host: str) -> None:
        self._app = app
        self._host = host.lower()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request."""
        if scope["type"] != "http":  # there are no WebSockets
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refused = self._refused(scope["method"], scope["path"], Headers(scope=scope))
        answer = self._app if refused is None else PlainTextResponse(f"Refused: {refused}\n", 403)
        await answer(scope, receive, send_with_headers)

    def _refused(self, method: str, path: str, headers: Headers) -> str | None:
        """Returns why a request is refused, None if it is not."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return (
                f"this page is served at addresses, at localhost and at {self._host}, not at "
                f"{', '.join(hosts) or 'no host'}: open it there, or start it with --host NAME"
            )
        site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
        is_opened = method == "GET" and path == "/" and headers.get("sec-fetch-mode", "navigate") == "navigate"
        if site not in ("same-origin", "none") and not is_opened:
            return "another site's page asked for it"
        if origin is not None and origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
            return f"a page of {origin} asked for it"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            if name in ("localhost", self._host):
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
