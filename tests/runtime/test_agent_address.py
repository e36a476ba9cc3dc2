from __future__ import annotations

import pytest

from mmtok_sglang.agent_address import AgentAddress


@pytest.mark.parametrize(
    ("url", "shown", "completions"),
    [
        ("http://host:30000/v1", "http://host:30000/v1", "http://host:30000/v1/chat/completions"),
        ("https://host/v1/", "https://host/v1/", "https://host/v1/chat/completions"),
        ("http://me:pass@host/v1", "http://***@host/v1", "http://me:pass@host/v1/chat/completions"),
        ("http://pass@host:1", "http://***@host:1", "http://pass@host:1/chat/completions"),
        ("http://a:b@c@host/v1", "http://***@host/v1", "http://a:b@c@host/v1/chat/completions"),
        ("http://host/v1?key=a&b#c", "http://host/v1?***", "http://host/v1/chat/completions?key=a&b"),
        ("http://me:pass@[::1]:8/v1", "http://***@[::1]:8/v1", "http://me:pass@[::1]:8/v1/chat/completions"),
    ],
)
def test_what_is_shown_and_what_is_asked(url: str, shown: str, completions: str) -> None:
    address = AgentAddress(url)
    assert address.shown == shown
    assert address.completions == completions
    # What is shown is an address again: it is what the arguments of a server hold.
    assert AgentAddress(shown).shown == shown


@pytest.mark.parametrize(
    "url", ["", "host:1/v1", "ftp://me:pass@host/v1", "http://", "http://me:pass@host:x", "http://[me"]
)
def test_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="an address like http://host:30000/v1") as error:
        AgentAddress(url)
    assert "pass" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "host", "port", "expected"),
    [
        ("http://127.0.0.1:30000/v1", "127.0.0.1", 30000, True),
        ("http://me:pass@127.0.0.1:30000/v1", "127.0.0.1", 30000, True),
        ("http://localhost:30000/v1", "127.0.0.1", 30000, True),
        ("http://127.0.0.1:30000/v1", "localhost", 30000, True),
        ("http://0.0.0.0:30000/v1", "127.0.0.1", 30000, True),
        ("http://127.0.0.1:30000/v1", "0.0.0.0", 30000, True),
        ("http://127.0.0.9:30000/v1", "0.0.0.0", 30000, True),
        ("http://[::1]:30000/v1", "::", 30000, True),
        ("http://127.0.0.1:30000/v1", None, 30000, True),
        ("http://127.0.0.1/v1", "127.0.0.1", 80, True),
        ("https://127.0.0.1/v1", "127.0.0.1", 443, True),
        ("http://127.0.0.1:30001/v1", "127.0.0.1", 30000, False),
        ("http://127.0.0.9:30000/v1", "127.0.0.1", 30000, False),
        ("http://192.0.2.1:30000/v1", "0.0.0.0", 30000, False),
        ("http://192.0.2.1:30000/v1", "127.0.0.1", 30000, False),
        ("http://no-such-host.invalid:30000/v1", "0.0.0.0", 30000, False),
    ],
)
def test_whether_a_server_is_its_own_agent(url: str, host: str | None, port: int, expected: bool) -> None:
    assert AgentAddress(url).is_served_by(host, port) is expected
