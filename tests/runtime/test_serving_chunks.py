"""Chunked prefill through the middle of images and videos, retraction, and caches that lose one between its chunks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mmtok_bench.families import FamilyName
from tests.runtime.chats import Chat, Part, small
from tests.runtime.conftest import FAMILIES, judge_of, make_server
from tests.runtime.emulated_graphs import ARGUMENTS, graph_environment
from tests.runtime.films import film, needs_ffmpeg, steady
from tests.runtime.serving import Served, prunes_videos

CHUNK = 32
QUESTION = "What is in this picture, and which colours are there?"
BUDGET: dict[str, float] = {
    "qwen2-vl": 0.5,
    "qwen2.5-vl": 0.5,
    "qwen3-vl": 0.5,
    "qwen3-vl-moe": 0.5,
    "qwen3.5": 0.5,
    "qwen3.5-moe": 0.5,
    "llava-1.5": 0.1,
    "llava-next": 0.1,
    "internvl3": 0.1,
    "glm-4.1v": 0.5,
    "glm-4.5v": 0.5,
}
# Room for the features of one photograph of the size below.
FEATURE_CACHE_MB = {**dict.fromkeys(FAMILIES, 1), "llava-next": 3, "internvl3": 2}
SIZE = {
    "qwen2-vl": (728, 728),
    "qwen2.5-vl": (728, 728),
    "qwen3-vl": (416, 416),
    "qwen3-vl-moe": (416, 416),
    # Features without what DeepStack adds take less.
    "qwen3.5": (672, 672),
    "qwen3.5-moe": (672, 672),
    "llava-1.5": (336, 252),
    "llava-next": (336, 252),
    "internvl3": (336, 252),
    "glm-4.1v": (728, 728),
    "glm-4.5v": (728, 728),
}
# SGLang keeps no embedding, so each chunk of an image asks for its features anew, and every eleventh step retracts a
# request if two or more are decoding.
ENVIRONMENT: dict[str, Any] = {
    "SGLANG_VLM_CACHE_SIZE_MB": "0",
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "11",
}

pytestmark = pytest.mark.slow


GRAPHS = "-graphs"
"""Families whose prefills are replayed: `tests.runtime.emulated_graphs`."""


@pytest.fixture(
    scope="module", params=[*FAMILIES, *(name + GRAPHS for name in FAMILIES if name not in ("qwen2-vl", "internvl3"))]
)
def chunked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Chunks of 32 tokens, no cache of embeddings, a cache of one image's features, retractions."""
    name: str = request.param
    family: FamilyName = next(each for each in FAMILIES if each == name.removesuffix(GRAPHS))
    arguments = [
        f"--mmtok-budget={BUDGET[family]}",
        f"--chunked-prefill-size={CHUNK}",
        "--enable-metrics",
        f"--mmtok-feature-cache-mb={FEATURE_CACHE_MB[family]}",
    ]
    environment = ENVIRONMENT
    if name.endswith(GRAPHS):
        # In mixed chunks, requests that decode are part of the batch.
        arguments += [*ARGUMENTS, "--enable-mixed-chunk", "--cuda-graph-bs-prefill", "8", "16", "32", "48"]
        environment = environment | graph_environment(tmp_path_factory.mktemp("graphs"))
    with make_server(family, *arguments, **environment) as server:
        served = Served(family, server, judge_of(family))
        yield served
        if name.endswith(GRAPHS):
            assert len(re.findall(r"Prefill batch.*graph: True", server.log_text())) > 20
            assert served.metric("vision_encoder_replays_total") >= 3


@pytest.fixture
def filmed(chunked: Served) -> Served:
    if not prunes_videos(chunked.family):
        pytest.skip("videos of this family are not pruned")
    return chunked


def test_chunks_through_the_middle_of_images(chunked: Served) -> None:
    for chat in (
        Chat.ask(small("coffee"), QUESTION),
        Chat.ask(small("chelsea"), small("astronaut", 196, 280), QUESTION),
        Chat.ask("First some text, so that the image starts elsewhere in a chunk.", small("coffee"), QUESTION),
    ):
        chunked.check(chat, chunked.ask(chat), BUDGET[chunked.family])


def test_prompts_that_share_their_first_image(chunked: Served) -> None:
    chat = Chat.ask(small("coffee"), small("chelsea"), QUESTION)
    chunked.ask(chat)
    shorter = Chat.ask(small("coffee"), QUESTION)
    chunked.check(shorter, chunked.ask(shorter), BUDGET[chunked.family])
    chunked.check(chat, chunked.ask(chat), BUDGET[chunked.family])


def test_images_that_drive_each_other_out_between_chunks(chunked: Served) -> None:
    one, other = (small(name, *SIZE[chunked.family]) for name in ("coffee", "chelsea"))
    chat = Chat.ask(one, other, one, QUESTION)
    chunked.flush_cache()
    encoded, hits = chunked.metric("encoded_images_total"), chunked.metric("feature_cache_hits_total")
    chunked.check(chat, chunked.ask(chat), BUDGET[chunked.family])
    # Each time the other comes in between; chunks of the one that is held are hits.
    assert chunked.metric("encoded_images_total") - encoded >= 3
    assert chunked.metric("feature_cache_hits_total") - hits >= 3
    assert 0 < chunked.metric("feature_cache_bytes") <= FEATURE_CACHE_MB[chunked.family] << 20


def test_features_that_are_held_change_nothing(chunked: Served) -> None:
    """The same prompt after a question about its image and after one about another: to the last bit."""
    image, another = (small(name, *SIZE[chunked.family]) for name in ("astronaut", "rocket"))
    chat = Chat.ask(image, QUESTION)
    accounts, encoded = [], []
    for first in (another, image):
        chunked.flush_cache()
        chunked.ask(Chat.ask(first, "Is it dark?"))
        before = chunked.metric("encoded_images_total")
        accounts.append(chunked.ask(chat))
        encoded.append(chunked.metric("encoded_images_total") - before)
    assert encoded == [1, 0]
    for field in ("text", "cached_tokens", "output_token_logprobs", "output_top_logprobs"):
        assert accounts[0][field] == accounts[1][field]
    chunked.check(chat, accounts[1], BUDGET[chunked.family])


@needs_ffmpeg()
@pytest.mark.parametrize("by_frame", [True, False], ids=["frame", "video"])
def test_chunks_end_anywhere_in_a_film(filmed: Served, by_frame: bool) -> None:
    shown, budget = film(seed=6) if by_frame else steady(filmed.family), BUDGET[filmed.family]
    fields: dict[str, Any] = {"mmtok_video_budget": "frame"} if by_frame else {}
    ids = _read(filmed, _behind("x", shown), by_frame)
    config, is_glm = filmed.judge.model.config, filmed.family.startswith("glm")
    token = config.image_token_id if is_glm else config.video_token_id
    first, last = ids.index(token), len(ids) - 1 - ids[::-1].index(token)
    # Within a run of placeholders, and where each step in time has a timestamp: behind a run, within the timestamp,
    # and before the next run.
    places = [next(place for place in range((first + last) // 2, last) if ids[place - 1] == ids[place] == token)]
    behind = next((place for place in range(first, last) if ids[place] != token), None)
    if behind is not None:
        before = ids.index(token, behind)
        # A GLM's time is a number of seconds alone.
        assert before - behind > (2 if is_glm else 10)
        places += [behind, (behind + before) // 2, before]
    for place in places:
        num_more = -place % CHUNK
        moved = _behind("x" * (1 + num_more), shown)
        # The same tokens from the film on, behind as many more of the system prompt: a chunk ends before the place.
        assert _read(filmed, moved, by_frame)[place + num_more :] == ids[place:]
        filmed.flush_cache()
        filmed.check(moved, filmed.ask(moved, **fields), budget, by_frame=by_frame)


@needs_ffmpeg()
def test_films_that_drive_each_other_out_between_chunks(filmed: Served) -> None:
    # Of a Qwen3.5, whose tokens have no levels of DeepStack, the features of two films fit.
    chat = Chat.ask(film(), small("chelsea"), film(seed=1), film(seed=2), film(), QUESTION)
    filmed.flush_cache()
    encoded = filmed.metric("encoded_images_total")
    filmed.check(chat, filmed.ask(chat, mmtok_video_budget="frame"), BUDGET[filmed.family], by_frame=True)
    # The first film is encoded again where it stands last.
    assert filmed.metric("encoded_images_total") - encoded >= 5


IMAGE_CHATS = [Chat.ask(small(name), f"{QUESTION} {name}") for name in ("coffee", "chelsea", "astronaut", "rocket")]


def test_retracted_requests(chunked: Served) -> None:
    _check_retracted(chunked, IMAGE_CHATS)


@needs_ffmpeg()
def test_retracted_requests_with_films(filmed: Served) -> None:
    films = [Chat.ask(film(seed=seed), f"{QUESTION} {seed}") for seed in (1, 2)]
    chats = [*films, Chat.ask(film(), small("chelsea"), QUESTION), IMAGE_CHATS[0]]
    _check_retracted(filmed, chats, mmtok_video_budget="frame")
    _check_retracted(filmed, [Chat.ask(steady(filmed.family), f"{QUESTION} {number}") for number in range(4)])


def _check_retracted(served: Served, chats: list[Chat], **fields: Any) -> None:
    with ThreadPoolExecutor(len(chats)) as pool:
        accounts = list(pool.map(lambda chat: served.ask(chat, max_tokens=40, **fields), chats))
    assert sum(account["num_retractions"] for account in accounts) > 0
    for chat, account in zip(chats, accounts, strict=True):
        served.check(chat, account, BUDGET[served.family], by_frame=bool(fields))


def _behind(text: str, *parts: Part) -> Chat:
    """Returns a chat about the parts behind a system prompt, which guides no selection."""
    return Chat((("system", (text,)),)).then("user", *parts, QUESTION)


def _read(served: Served, chat: Chat, by_frame: bool) -> list[int]:
    """Returns the tokens that the hand-pruned model reads of a chat."""
    prompt, budget = served.judge.prompt(chat.for_template()), BUDGET[served.family]
    pruned = served.judge.prune(prompt, [], chat.guidance, budget, films=chat.films, by_frame=by_frame)
    ids: list[int] = pruned.token_ids.tolist()
    return ids
