"""The address of --mmtok-agent-url: what is asked there, and what of it may be shown."""

from __future__ import annotations

import socket
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

import psutil  # type: ignore[import-untyped]

__all__ = ["AgentAddress"]

_HIDDEN = "***"
_MIN_SECRET_LETTERS = 4


@dataclass(frozen=True, slots=True)
class AgentAddress:
    """An OpenAI-compatible endpoint, up to and with its `/v1`.

    User, password and query are credentials: they are sent, and never shown.

    Args:
        url: As the operator wrote it.

    Raises:
        ValueError: No address, or not of a web server.
    """

    url: str

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            is_address = False
        if not is_address:
            # Which part of it may be a password is not known.
            given = repr(self.url) if "@" not in self.url and "?" not in self.url else "another one (not shown)"
            raise ValueError(f"agent_url is an address like http://host:30000/v1, got {given}")

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url)

    @property
    def completions(self) -> str:
        """What is asked, credentials included."""
        path = self._parts.path.rstrip("/") + "/chat/completions"
        return self._parts._replace(path=path, fragment="").geturl()

    @property
    def shown(self) -> str:
        """The address with every credential replaced."""
        _, at, host = self._parts.netloc.rpartition("@")
        netloc = _HIDDEN + at + host if at else host
        query = _HIDDEN if self._parts.query else ""
        return self._parts._replace(netloc=netloc, query=query, fragment="").geturl()

    def hide(self, text: str) -> str:
        """Returns a text in which no credential of the address is left, in any of the forms that it is sent in."""
        for secret in sorted(set(self._secrets()), key=len, reverse=True):
            text = text.replace(secret, _HIDDEN)
        return text

    def _secrets(self) -> Iterator[str]:
        user_info, _, _ = self._parts.netloc.rpartition("@")
        user, _, password = user_info.partition(":")
        if user_info:
            basic = f"{unquote(user)}:{unquote(password)}"
            yield from (user_info, basic)
            yield from (b64encode(basic.encode(encoding, "replace")).decode() for encoding in ("utf-8", "latin-1"))
        if self._parts.query:
            yield self._parts.query
        values = [value for _, value in parse_qsl(self._parts.query)]
        for value in (user, password, self._parts.fragment, *values):
            # Shorter ones, "1" say, are a part of every other word.
            if len(value) >= _MIN_SECRET_LETTERS and value != _HIDDEN:
                yield from (value, unquote(value), quote(unquote(value), safe=""))

    def is_served_by(self, host: str | None, port: int) -> bool:
        """True if a server that listens on `host` and `port` of this machine is what would be asked.

        False where the agent's name is not known (yet).
        """
        if (self._parts.port or {"http": 80, "https": 443}[self._parts.scheme]) != port:
            return False
        agents = _addresses(self._parts.hostname or "")
        if any(ip_address(each).is_unspecified for each in agents):
            agents |= {"127.0.0.1", "::1"}  # where a client gets that asks 0.0.0.0
        own = _addresses(host or "0.0.0.0")
        if not any(ip_address(each).is_unspecified for each in own):
            return bool(agents & own)
        own = {each.address.partition("%")[0] for every in psutil.net_if_addrs().values() for each in every}
        return any(each in own or ip_address(each).is_loopback for each in agents)


def _addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]).partition("%")[0] for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return set()
