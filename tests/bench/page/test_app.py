"""What the browser asks, asked without one; of the server behind it only that nothing answers there."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from mmtok_bench.page import pictures
from mmtok_bench.page.app import PageContent, make_app
from mmtok_bench.page.command import content_of
from mmtok_bench.page.patches import Patches
from mmtok_bench.page.pictures import Pictures
from mmtok_bench.page.served import RunningServer
from mmtok_bench.pocket import pocket_checkpoint
from mmtok_bench.selected_patches import PatchSelector
from mmtok_bench.server import ServerError
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_deploy.photographs import photograph
from tests.bench.quality.stand_in import says, serving

QUESTION = "Where is the green square?"
INFO = {"model_path": "a/model", "mmtok_budget": "all", "mmtok_min_tokens": 1}
CHECKPOINT = pocket_checkpoint("llava-1.5")


@pytest.fixture(scope="module")
def selector() -> PatchSelector:
    return PatchSelector("llava-1.5", CHECKPOINT)


@pytest.fixture(scope="module")
def client(selector: PatchSelector) -> Iterator[TestClient]:
    """A page whose server ended right after it said what it is."""
    with serving(says(""), INFO) as url:
        served = RunningServer(url)
    content = PageContent("A model.", "Here.", ("mmtok", "dart"), Pictures(), Patches(lambda: selector))
    with TestClient(make_app(content, served), base_url="http://127.0.0.1") as client:
        yield client


def select(client: TestClient, picture: str, method: str, budget: int | None = None) -> dict[str, Any]:
    body = {"picture": picture, "question": QUESTION, "method": method, "budget": budget}
    answer = client.post("/api/selection", json=body)
    assert answer.status_code == 200, answer.text
    selection: dict[str, Any] = answer.json()
    return selection


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A PNG whose header promises a size, and which holds no pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("method", ["mmtok", "divprune"])
def test_one_selection_has_every_budget(client: TestClient, selector: PatchSelector, method: Any) -> None:
    whole = select(client, "coffee", method)
    encoded, text = selector.encode(photograph("coffee")), selector.embed(QUESTION)
    assert (whole["grid"], whole["tokens"], whole["pickable"]) == ([14, 14], 196, 196)
    for budget in (1, 20, 100):
        assert selector.select(encoded, text, budget, method).order.tolist() == whole["order"][:budget]
    assert whole["coverage"] == sorted(whole["coverage"])
    assert whole["coverage"][-1] == 1
    if method == "mmtok":
        selection = selector.select(encoded, text, 20, method)
        assert whole["coverage"][19] == pytest.approx(float(selection.coverage[-1] / selection.total), abs=1e-3)


def test_other_methods_take_a_budget_at_a_time(client: TestClient, selector: PatchSelector) -> None:
    encoded, text = selector.encode(photograph("coffee")), selector.embed(QUESTION)
    assert select(client, "coffee", "dart", 9)["order"] == selector.select(encoded, text, 9, "dart").order.tolist()
    smaller = select(client, "coffee", "downsample", 10)
    assert (smaller["smaller"], smaller["token_px"], smaller["order"]) == ([3, 3], 8, [])
    body = {"picture": "coffee", "question": QUESTION, "method": "dart"}
    answer = client.post("/api/selection", json=body)
    assert answer.status_code == 400
    assert "dart keeps other tokens at another budget" in answer.json()["error"]


def test_padding_is_not_pickable(tmp_path: Path) -> None:

    patches = Patches(partial(PatchSelector, "llava-1.5", make_tiny_checkpoint("llava-1.5", tmp_path / "it")))
    image = photograph("coffee")
    found = patches.select(pictures.Picture("Coffee", image, image), QUESTION, "mmtok", None)
    # 600 x 400 in a square: 4 rows above and below.
    assert (found["tokens"], found["pickable"], len(found["order"])) == (576, 16 * 24, 16 * 24)


def test_a_picture_that_is_dropped_is_read_and_kept(client: TestClient) -> None:
    photo = photograph("chelsea")
    answer = client.post("/api/pictures", content=png(photo))
    assert answer.status_code == 200
    added = answer.json()
    assert (added["width"], added["height"], added["note"]) == (*photo.size, "")
    assert client.get(f"/api/pictures/{added['id']}").json() == added
    assert select(client, added["id"], "mmtok") == select(client, "chelsea", "mmtok")
    with Image.open(io.BytesIO(client.get(f"/api/pictures/{added['id']}/seen.jpg").content)) as seen:
        # The middle square, which is what this model sees.
        assert seen.size == (300, 300)


def test_a_large_picture_is_made_smaller_and_one_that_lies_on_its_side_upright(client: TestClient) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3000, 1500), "red").save(file, format="JPEG", exif=exif)
    added = client.post("/api/pictures", content=file.getvalue()).json()
    assert (added["width"], added["height"]) == (1024, 2048)
    assert added["note"] == "made smaller from 1500 x 3000 pixels"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no picture that can be read: expected one of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),
        (png(Image.new("RGB", (64, 64)))[:-30], "cannot be read"),
        (png_that_says(9000, 8000), "9000 x 8000 pixels, and at most 64,000,000 are taken"),
        (png_that_says(3, 900), "one side may be at most 200 times the other"),
        (png_that_says(60000, 60000), "cannot be read"),
        (bytes(pictures.MAX_UPLOAD_BYTES + 1), "larger than the 64 MB that a server takes"),
    ],
    ids=["empty", "postscript", "cut", "large", "long", "bomb", "bytes"],
)
def test_what_is_no_picture_is_refused(client: TestClient, data: bytes, message: str) -> None:
    answer = client.post("/api/pictures", content=data)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_the_oldest_of_too_many_pictures_is_gone_and_said_to_be(client: TestClient) -> None:
    data = png(Image.new("RGB", (30, 30), "green"))
    first, *_ = [client.post("/api/pictures", content=data).json()["id"] for _ in range(17)]
    for path in ("", "/seen.jpg"):
        answer = client.get(f"/api/pictures/{first}{path}")
        assert answer.status_code == 404
        assert "Drop it again" in answer.json()["error"]
    body = {"picture": first, "question": "?", "runs": [{"budget": "all"}]}
    assert client.post("/api/answers", json=body).status_code == 404


def test_a_picture_is_never_an_address(client: TestClient) -> None:
    for picture in ("http://127.0.0.1/x.png", "file:///etc/passwd", "../coffee"):
        body = {"picture": picture, "question": QUESTION, "method": "mmtok"}
        assert client.post("/api/selection", json=body).status_code == 404


@pytest.mark.parametrize("budget", ["0", "101%", "1.5", "ten", "-1", ""])
def test_a_budget_that_is_none_is_refused(client: TestClient, budget: str) -> None:
    body = {"picture": "coffee", "question": "?", "runs": [{"budget": budget}]}
    assert client.post("/api/answers", json=body).status_code == 422


def test_a_server_that_does_not_answer_is_told_and_not_restarted(client: TestClient) -> None:

    deadline_s = time.monotonic() + 10
    while (state := client.get("/api/state").json())["name"] == "ready" and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert (state["name"], state["can_restart"]) == ("stopped", False)
    assert "does not answer" in state["message"]
    restarted = client.post("/api/restart")
    assert restarted.status_code == 409
    assert "was not started by this page" in restarted.json()["error"]
    body = {"picture": "coffee", "question": "?", "runs": [{"budget": "all"}, {"budget": "25%", "method": "mmtok"}]}
    events = [each for each in client.post("/api/answers", json=body).text.splitlines() if each]
    assert ["Connection error." in each for each in events] == [True, True]


@pytest.mark.parametrize("info", [{}, {"model_path": "x"}, {"model_path": "x", "mmtok_budget": None}])
def test_a_server_that_does_not_prune_is_refused(info: dict[str, Any]) -> None:
    with serving(says(""), info) as url, pytest.raises(ServerError, match="start it with --mmtok-budget all"):
        RunningServer(url)


def test_without_the_model_the_page_says_so_and_shows_nothing_else(tmp_path: Path) -> None:
    content = content_of("http://gpu.example:30000", INFO, None)
    assert content.patches is None
    assert "this page has no copy of its model" in content.no_patches
    assert "gpu.example: they leave the machine" in content.privacy
    with serving(says(""), INFO) as url, TestClient(make_app(content, RunningServer(url))) as client:
        body = {"picture": "coffee", "question": QUESTION, "method": "mmtok"}
        answer = client.post("/api/selection", json=body, headers={"host": "localhost"})
    assert (answer.status_code, answer.json()["error"]) == (409, content.no_patches)
    (tmp_path / "config.json").write_text('{"model_type": "llava_next"}')
    with pytest.raises(ValueError, match="is of llava_next: drop --model-path"):
        content_of("http://127.0.0.1:30000", INFO, tmp_path)
    with pytest.raises(ValueError, match="--model-path is the folder of a checkpoint"):
        content_of("http://127.0.0.1:30000", INFO, tmp_path / "none")


def test_what_a_server_was_started_with_is_followed_or_named(selector: PatchSelector) -> None:
    info = {**INFO, "mmtok_tv_temp": 0.5, "mmtok_guidance": "question"}
    content = content_of("http://127.0.0.1:30000", info, CHECKPOINT)
    assert content.patches is not None
    found = content.patches.select(content.pictures.get("scene-1"), QUESTION, "mmtok", 30)
    encoded = selector.encode(content.pictures.get("scene-1").sent)
    theirs = selector.select(encoded, selector.embed(QUESTION), 30)
    assert found["order"] != theirs.order.tolist()
    assert torch.tensor(found["order"]).unique().numel() == 30
    content = content_of("http://127.0.0.1:30000", {**INFO, "mmtok_agent_url": "http://x"}, CHECKPOINT)
    assert content.patches is None
    assert "--mmtok-agent-url" in content.no_patches
