"""The page's files: the library is the published one, and everything that they load is served with them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urljoin

from starlette.testclient import TestClient

from mmtok_bench.page import app
from mmtok_bench.page.app import PageContent, make_app
from mmtok_bench.page.pictures import Pictures
from mmtok_bench.page.served import RunningServer
from tests.bench.quality.stand_in import says, serving

STATIC = Path(app.__file__).parent / "static"
LOADS = re.compile(r"""\b(?:src|href|from|import)\s*(?:=|\(|)\s*["']([^"'$]+)["']""")


def test_the_library_is_the_published_file() -> None:
    vendor = STATIC / "vendor"
    rows = re.findall(r"^\| `(\S+)` \| .* \| `([0-9a-f]{64})` \|$", (vendor / "README.md").read_text(), re.MULTILINE)
    assert dict(rows) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in vendor.glob("*.js")}
    assert (vendor / "LICENSE").read_text().startswith("BSD 3-Clause License")


def test_what_the_page_loads_is_served_with_it() -> None:
    info = {"model_path": "a/model", "mmtok_budget": "all"}
    with serving(says(""), info) as url:
        served = RunningServer(url)
    content = PageContent("A model.", "Here.", ("mmtok",), Pictures(), None, "No patches.")
    seen, waiting = set(), ["/"]
    with TestClient(make_app(content, served), base_url="http://127.0.0.1") as client:
        while waiting:
            path = waiting.pop()
            answer = client.get(path)
            assert answer.status_code == 200, path
            seen.add(path)
            if path.endswith(".js"):
                assert answer.headers["content-type"].startswith("text/javascript")
            found = [urljoin(path, name) for name in LOADS.findall(answer.text)]
            assert [name for name in found if not re.fullmatch(r"/[\w./-]+", name)] == []
            waiting += set(found) - seen - set(waiting)
        assert client.get("/vendor/README.md").status_code == 404
    assert seen >= {f"/{path.relative_to(STATIC).as_posix()}" for path in STATIC.rglob("*.js")}
