"""What another site's page has a browser ask, and what a browser asks by itself."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from mmtok_bench.page.guard import Guard

OURS = "127.0.0.1:8600"


def client(host: str = "127.0.0.1") -> TestClient:
    def answer(_: Request) -> PlainTextResponse:
        return PlainTextResponse("answered")

    routes = [Route("/", answer), Route("/api/state", answer), Route("/api/restart", answer, methods=["POST"])]
    return TestClient(Guard(Starlette(routes=routes), host))


@pytest.mark.parametrize("host", [OURS, "localhost", "LOCALHOST:8600", "[::1]:8600", "192.168.0.7:8600"])
def test_addresses_and_localhost_are_ours(host: str) -> None:
    assert client().get("/", headers={"host": host}).text == "answered"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8600", "localhost.evil.example", "", "10.0.0.1.example"]
)
def test_a_name_that_resolves_to_this_machine_is_not(host: str) -> None:
    answer = client().get("/api/state", headers={"host": host})
    assert answer.status_code == 403
    assert "start it with --host NAME" in answer.text


def test_the_name_that_was_asked_for_is_ours() -> None:
    assert client("box.example").get("/", headers={"host": "box.example:8600"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:9000", "http://localhost:8600", "null"])
def test_what_another_page_sends_is_refused(origin: str) -> None:
    for method, path in (("POST", "/api/restart"), ("GET", "/api/state")):
        answer = client().request(method, path, headers={"host": OURS, "origin": origin})
        assert (answer.status_code, origin in answer.text) == (403, True)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_page_embeds_is_refused_and_a_link_to_this_one_is_not(site: str) -> None:
    headers = {"host": OURS, "sec-fetch-site": site}
    assert client().get("/api/state", headers={**headers, "sec-fetch-mode": "no-cors"}).status_code == 403
    assert client().get("/", headers={**headers, "sec-fetch-mode": "no-cors"}).status_code == 403
    assert client().get("/", headers={**headers, "sec-fetch-mode": "navigate"}).status_code == 200


def test_our_own_page_and_programs_are_answered() -> None:
    ours = {"host": OURS, "origin": f"http://{OURS}", "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    assert client().post("/api/restart", headers=ours).text == "answered"
    assert client().post("/api/restart", headers={"host": OURS}).text == "answered"


@pytest.mark.parametrize("host", [OURS, "evil.example"])
def test_every_answer_forbids_what_the_page_does_not_need(host: str) -> None:
    headers = client().get("/", headers={"host": host}).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == policy.pop("frame-ancestors") == policy.pop("form-action") == "'none'"
    assert policy.pop("base-uri") == "'none'"
    assert set(policy.values()) == {"'self'"}
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"
