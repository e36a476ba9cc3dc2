"""A server of embeddings: requests with images are guarded as those that generate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from mmtok_bench.families import FamilyName
from mmtok_bench.server import running
from tests.runtime.chats import data_url, small
from tests.runtime.conftest import judge_of, make_server
from tests.runtime.hook_faults import Faults, fault_environment
from tests.runtime.serving import Served
from tests.runtime.test_serving_bounds import post

pytestmark = pytest.mark.slow

FAMILY: FamilyName = "qwen2.5-vl"
TOKEN = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Faults]]:
    folder = tmp_path_factory.mktemp("faults")
    server = make_server(
        FAMILY, "--mmtok-budget=1", "--is-embedding", "--enable-metrics", num_ranks=1, **fault_environment(folder)
    )
    with running(server):
        yield Served(FAMILY, server, judge_of(FAMILY)), Faults(folder)


def body(*images: Image.Image) -> dict[str, Any]:
    return {"text": TOKEN * len(images) + "What is it?", "image_data": [data_url(image) for image in images]}


def test_images_are_pruned(embedding: tuple[Served, Faults]) -> None:
    served, _ = embedding
    answer = served.post("/encode", body(small("coffee")))
    assert len(answer["embedding"]) > 1
    assert served.metric("selection_tokens_kept_total") == 1
    assert answer["embedding"] != served.post("/encode", body(small("chelsea")))["embedding"]


def test_positions_beyond_the_context_are_refused(embedding: tuple[Served, Faults]) -> None:
    served, _ = embedding
    # One token each, and 200 positions, of a context of 8192.
    status, text = post(served, "/encode", body(*[Image.new("RGB", (5600, 28), "red")] * 45))
    assert (status, "positions, more than the model's context of 8192" in text) == (400, True), text
    served.post("/encode", body(small("coffee")))


@pytest.mark.parametrize("point", ["key", "encode", "write"])
def test_an_error_ends_the_request(embedding: tuple[Served, Faults], point: str) -> None:
    served, faults = embedding
    served.flush_cache()
    before = served.post("/encode", body(small("rocket")))["embedding"]
    served.flush_cache()
    faults.set(point, list(range(1, 20)))
    status, text = post(served, "/encode", body(small("rocket")))
    assert faults.clear() > 0
    assert (status, "MMTok" in text) == (500, True), text
    assert served.post("/encode", body(small("rocket")))["embedding"] == pytest.approx(before, abs=1e-5)
