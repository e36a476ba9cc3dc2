"""Videos on a real server, held against the Hugging Face model whose videos are pruned by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from mmtok_bench.families import FamilyName
from mmtok_bench.server import running
from mmtok_deploy.methods import MethodName, comparator
from mmtok_deploy.presets import PRESETS
from mmtok_deploy.problem import SelectionProblem
from mmtok_deploy.repeated_tokens import share_of_distinct
from mmtok_soak.event_loop import polled_health
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import judge_of, make_server
from tests.runtime.films import Film, film, needs_ffmpeg, sound
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

pytestmark = needs_ffmpeg()

QUESTION = "Where does the square go?"
NUM_TOKENS = {
    **{"qwen2.5-vl": 560, "qwen3-vl": 352, "qwen3-vl-moe": 352, "qwen3.5": 352, "qwen3.5-moe": 352},
    # GLM-4.5V takes more frames.
    "glm-4.1v": 560,
}
"""Those of a film, of 4 steps in time."""


def tokens_of(method: MethodName, served: Served, budget: int) -> list[int]:
    """Returns what a method keeps of a film."""
    prompt = served.judge.prompt(Chat.ask(film(), QUESTION).for_template())
    (vision,) = served.judge.film_tokens(prompt, [film()])
    asked = SelectionProblem(vision, vision, vision[:0], budget, num_frames=4)
    (selection,) = comparator(method)([asked], PRESETS[served.family].config)
    kept: list[int] = selection.kept.tolist()
    return kept


@pytest.fixture(scope="module", params=list(NUM_TOKENS))
def family(request: pytest.FixtureRequest) -> FamilyName:
    chosen: FamilyName = request.param
    return chosen


@pytest.fixture(scope="module")
def server(family: FamilyName) -> Iterator[Served]:
    # Chunks end within films; SGLang reads 140 tokens of each pair of frames at least.
    started = make_server(family, "--mmtok-budget=10%", "--chunked-prefill-size=64", "--mmtok-max-video-frames=24")
    with running(started):
        yield Served(family, started, judge_of(family))


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    yield server
    assert server.server.is_alive()


CHATS = {
    "a film": lambda: Chat.ask(film(), QUESTION),
    # 4 frames of 2.4 s: 1.2 s, and so 2.4 places, between two pairs.
    "frames at other times": lambda: Chat.ask(film(12, 5.0, seed=1), QUESTION),
    "a film and an image": lambda: Chat.ask(film(), small("chelsea"), QUESTION),
    "an image and two films": lambda: Chat.ask(small("chelsea"), film(), "And", film(12, 5.0, seed=1), QUESTION),
    "a film, later an image": lambda: (
        Chat.ask(film(), QUESTION).then("assistant", "Right.").then("user", small("rocket"), "And this?")
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_equals_the_hand_pruned_model(served: Served, name: str) -> None:
    chat = CHATS[name]()
    account = served.ask(chat)
    served.check(chat, account)
    videos = account["mmtok"][0]["videos"]
    assert [video["tokens_kept"] for video in videos] == [video["tokens_in"] // 10 for video in videos]
    assert len(videos) == len(chat.films)


def test_auto_bounds_images_beside_films(served: Served) -> None:
    page = Image.new("RGB", (336, 252), "white")
    page.paste(small("coffee", 84, 63), (126, 95))
    chat = Chat.ask(small("chelsea"), film(), page, film(seed=2), "What does it say?")
    (told,) = served.ask(chat, mmtok_budget="auto")["mmtok"]
    distinct = [
        share_of_distinct(each, image["tokens_in"]) for each, image in zip(chat.images, told["images"], strict=True)
    ]
    assert distinct[0] > Fraction(50, 100) > distinct[1]
    assert [image["auto"] for image in told["images"]] == [
        {"asks": "read", "distinct": f"{100 * distinct[0]}%", "share": "50%"},
        {"asks": "read", "distinct": f"{100 * distinct[1]}%", "share": f"{100 * distinct[1]}%"},
    ]
    # A film goes by the question alone.
    assert [video["auto"] for video in told["videos"]] == [{"asks": "read", "distinct": None, "share": "50%"}] * 2


def test_a_film_and_then_an_image(served: Served) -> None:
    for chat in (Chat.ask(film(seed=2), QUESTION), Chat.ask(small("coffee"), "What is it?"), Chat.ask("Hello.")):
        served.check(chat, served.ask(chat))


def test_wrong_places_in_time_would_be_seen(served: Served) -> None:
    """The control of the tests above."""
    chat = Chat.ask(film(), QUESTION)
    prompt = served.judge.prompt(chat.for_template())
    pruned = served.judge.prune(prompt, [], chat.guidance, 0.1, films=chat.films, original_positions=False)
    assert served.judge.max_error(pruned, served.ask(chat)) > 10 * LOGPROB_TOLERANCE


def test_caches_know_film_and_question(served: Served) -> None:
    served.flush_cache()
    # In other films (seed 3) rounding decides which of some tokens is kept.
    chat, other = (Chat.ask(film(seed=4), question) for question in (QUESTION, "What colour is it?"))
    first, again, of_other = served.ask(chat), served.ask(chat), served.ask(other)
    assert again["cached_tokens"] == served.from_cache(first["prompt_tokens"] - 1)
    is_glm = served.family.startswith("glm")
    before_the_film = served.judge.prompt(chat.for_template()).partition("<|video|>" if is_glm else "<|video_pad|>")[0]
    # The first timestamp is text as well, of a Qwen3; a GLM's stands behind the frames.
    before_the_film += "<0.2 seconds><|vision_start|>" if served.family.startswith("qwen3") else ""
    before_the_film += "<|begin_of_image|>" if is_glm else ""
    num_before = len(served.judge.processor.tokenizer(before_the_film)["input_ids"])
    assert of_other["cached_tokens"] == served.from_cache(num_before)
    for asked, account in ((chat, first), (chat, again), (other, of_other)):
        served.check(asked, account)


def test_a_requests_own_budget(served: Served) -> None:
    chat = Chat.ask(film(), QUESTION)
    served.check(chat, served.ask(chat, mmtok_budget=7), 7)
    whole = served.ask(chat, mmtok_budget="all")
    assert whole["video_tokens"] == NUM_TOKENS[served.family]
    if served.family != "qwen2.5-vl":  # whose videos SGLang reads otherwise than Hugging Face
        served.check(chat, whole, None)


def test_a_budget_of_all_tokens(served: Served) -> None:
    """Where nothing is cut, frames have their own times all the same, and are encoded each by itself."""
    for chat in (Chat.ask(film(seed=7), QUESTION), Chat.ask(film(seed=7), small("chelsea"), QUESTION)):
        served.check(chat, served.ask(chat, mmtok_budget=1_000_000), None)
        served.check(chat, served.ask(chat))


def test_fewer_tokens_than_frames(served: Served) -> None:
    """Frames of which no token is kept: their timestamps and marks stay."""
    chat = Chat.ask(film(), QUESTION)
    for budget in (1, 2):
        served.check(chat, served.ask(chat, mmtok_budget=budget), budget)


@pytest.mark.parametrize("method", ["evs", "frames"])
def test_methods_that_go_by_frames(served: Served, method: MethodName) -> None:
    chat, budget = Chat.ask(film(), QUESTION), NUM_TOKENS[served.family] // 2 + 5
    prompt = served.judge.prompt(chat.for_template())
    kept = torch.tensor(tokens_of(method, served, budget))
    pruned = served.judge.prune(prompt, [], chat.guidance, budget, films=chat.films, kept=[kept])
    account = served.ask(chat, mmtok_method=method, mmtok_budget=budget)
    assert account["video_tokens"] == budget
    assert served.judge.max_error(pruned, account) < LOGPROB_TOLERANCE
    assert account["mmtok"][0]["videos"][0]["is_fallback"] is False
    with pytest.raises(openai.BadRequestError, match=f"mmtok_method {method} goes by the frames of a video"):
        served.ask(Chat.ask(film(), small("coffee"), QUESTION), mmtok_method=method)
    with pytest.raises(openai.BadRequestError, match=f"mmtok_method {method} goes by the frames of a video"):
        served.ask(Chat.ask(small("coffee"), QUESTION), mmtok_method=method)


def test_each_frame_its_share(served: Served) -> None:
    chat = Chat.ask(film(), small("chelsea"), QUESTION)
    served.check(chat, served.ask(chat, mmtok_video_budget="frame"), by_frame=True)
    first = served.ask(chat, mmtok_video_budget="frame", mmtok_budget=30)
    assert first["mmtok"][0]["videos"][0]["tokens_kept"] == 28  # 7 of each of 4 pairs of frames
    served.check(chat, first, 30, by_frame=True)
    # Neither takes the other's tokens from a cache.
    served.check(chat, served.ask(chat, mmtok_budget=30), 30)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (lambda: Film(b"hello"), {}, r"a video cannot be decoded \(Failed to open .*\): send a whole file"),
        (lambda: Film(b""), {}, "a video cannot be"),
        (lambda: film(0), {}, r"a video cannot be decoded \(the file has no frames\)"),
        (lambda: film(1), {}, "a video has at least 2 frames .*, got 1 at"),
        (lambda: Film(sound()), {}, r"a video cannot be decoded \(the file has no frames\)"),
        (film, {"mmtok_encoder_scale": 0.5}, "brings a video.*mmtok_encoder_scale"),
        (film, {"mmtok_method": "downsample"}, "brings a video.*downsample"),
        (film, {"mmtok_method": "evs", "mmtok_budget": 20}, "evs keeps the first step in time of a video whole"),
        (film, {"mmtok_method": "frames", "mmtok_video_budget": "frame"}, "method frames shares a video's budget"),
        (film, {"mmtok_video_budget": "second"}, "mmtok_video_budget is one of video, frame"),
        (film, {"mmtok_video_budget": "frame", "mmtok_budget": 3}, "less than one for each of the 4 steps in time"),
    ],
)
def test_bad_videos_are_refused(served: Served, make: Callable[[], Film], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        served.ask(Chat.ask(make(), QUESTION), **fields)


def test_a_request_says_how_many_frames_a_glm_takes(served: Served) -> None:
    if not served.family.startswith("glm"):
        pytest.skip("SGLang takes as many frames of every video of this family")
    for fps, num_steps in ((2.0, 4), (1.0, 2)):
        video = {"type": "video_url", "video_url": {"url": film().url, "fps": fps}}
        with pytest.raises(openai.BadRequestError, match=f"less than one for each of the {num_steps} steps in time"):
            served.server.client().chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": [video, {"type": "text", "text": QUESTION}]}],  # type: ignore[list-item, misc]
                extra_body={"mm_processor_kwargs": {"mmtok_video_budget": "frame", "mmtok_budget": 1}},
            )


def test_a_broken_and_a_long_video_are_refused(served: Served) -> None:
    whole = film().data
    for cut, message in (
        (Film(whole[: len(whole) // 3]), "a video cannot be"),
        (film(60, 4.0), r"3[08] frames would be read"),
    ):
        for chat in (Chat.ask(cut, QUESTION), Chat.ask(small("coffee"), film(), cut, QUESTION)):
            with pytest.raises(openai.BadRequestError, match=message):
                served.ask(chat)
    served.check(Chat.ask(film(), QUESTION), served.ask(Chat.ask(film(), QUESTION)))


def test_the_server_answers_while_frames_are_decoded(served: Served) -> None:
    if served.family != "qwen2.5-vl":
        pytest.skip("all families decode in the same thread: seen once, with qwen2.5-vl")

    def ask(seed: int) -> None:
        # The encoder would read more pixels than it may, which shows once the frames are there.
        with pytest.raises(openai.BadRequestError, match="the encoder would read"):
            served.ask(Chat.ask(film(48, 4.0, seed, scale=12), QUESTION))

    films = range(10, 14)
    for seed in films:
        film(48, 4.0, seed, scale=12)
    with polled_health(served.server) as latencies_s, ThreadPoolExecutor(len(films)) as pool:
        list(pool.map(ask, films))
    assert 0 < max(latencies_s) < 1.0
