"""The real server over HTTP, with the official client: every answer against the hand-pruned model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from tests.runtime.chats import Chat, data_url, small
from tests.runtime.conftest import MAX_ASPECT_RATIO, MIN_TOKENS_IN
from tests.runtime.serving import LOGPROB_TOLERANCE, Served, prunes_videos

CUP = "What is in this cup?"
CATS = "How many cats are on the red table?"

CHATS = {
    "one image": Chat.ask(small("coffee"), CUP),
    "another question": Chat.ask(small("coffee"), CATS),
    "question first": Chat.ask(CATS, small("chelsea")),
    "two images": Chat.ask(small("chelsea"), small("astronaut", 280, 448), CATS),
    "one image twice": Chat.ask(small("coffee"), small("coffee"), CUP),
    "text between": Chat.ask("Left:", small("coffee"), "right:", small("chelsea"), "Which is darker?"),
    "system prompt": Chat((("system", ("Answer about cats only.",)),)).then("user", small("coffee"), CUP),
    "no text": Chat.ask(small("coffee")),
    "only stop words": Chat.ask(small("coffee"), "What is it?"),
    "later turn": Chat.ask(small("coffee"), CUP).then("assistant", "Coffee.").then("user", CATS),
    "image in each turn": Chat.ask(small("coffee"), CUP).then("assistant", "Yes.").then("user", small("chelsea"), CATS),
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
def test_reads_what_the_hand_pruned_model_reads(served: Served, chat: Chat) -> None:
    served.check(chat, served.ask(chat))


def _error_of_a_judge_with(served: Served, **mistake: Any) -> float:
    """Returns how far the served logprobs are from those of a hand-pruned model that makes a mistake."""
    chat = CHATS["one image"]
    account = served.ask(chat)
    prompt = served.judge.prompt(chat.for_template())
    wrong = served.judge.prune(prompt, chat.images, chat.guidance, 0.1, **mistake)
    return served.judge.max_error(wrong, account)


def test_a_wrong_position_would_be_caught(served: Served) -> None:
    if served.token_px is None:
        pytest.skip("positions of this family run on: there is no other position to take")
    assert _error_of_a_judge_with(served, original_positions=False) > 1e-2


def test_another_order_would_be_caught(served: Served) -> None:
    if not served.family.startswith("qwen3.5"):
        pytest.skip("this family has no linear attention")
    assert _error_of_a_judge_with(served, raster_order=False) > 1e-2


def test_levels_of_another_token_would_be_caught(served: Served) -> None:
    if not served.family.startswith("qwen3-vl"):
        pytest.skip("this family has no DeepStack")
    assert _error_of_a_judge_with(served, own_levels=False) > 1e-2


def test_mixed_batch(served: Served) -> None:
    served.flush_cache()
    cases: list[tuple[Chat, dict[str, Any], float | int | None]] = [
        (CHATS["one image"], {}, 0.1),
        (CHATS["one image"], {"mmtok_budget": "all"}, None),
        (Chat.ask("Tell me about cats."), {}, 0.1),
        (CHATS["two images"], {}, 0.1),
        (CHATS["another question"], {"mmtok_budget": "50%"}, 0.5),
        (CHATS["later turn"], {"mmtok_budget": 0.02}, 0.02),
        (CHATS["one image"], {}, 0.1),
        (Chat.ask("And dogs?"), {"mmtok_budget": "all"}, None),
    ]
    with ThreadPoolExecutor(len(cases)) as pool:
        accounts = list(pool.map(lambda case: served.ask(case[0], **case[1]), cases))
    for (chat, _, budget), account in zip(cases, accounts, strict=True):
        served.check(chat, account, budget)


@pytest.mark.parametrize("budget", [5, "5", "20%", 0.2, "all"])
def test_a_request_sets_its_budget(served: Served, budget: float | str) -> None:
    chat = CHATS["one image"]
    # For tiles, the judge's count is of each tile: 5 tokens of up to 5 tiles is one of each.
    count = 1 if served.family == "llava-next" else 5
    expected = {"5": count, 5: count, "20%": 0.2, 0.2: 0.2, "all": None}[budget]
    served.check(chat, served.ask(chat, mmtok_budget=budget), expected)


def test_a_small_image_stays_whole_beside_a_large_one(served: Served) -> None:
    if served.token_px is None:
        pytest.skip("no image of this family has fewer than 8 tokens")
    icon, photograph = small("chelsea", 56, 56), small("coffee")
    for images, budgets in (((icon, photograph), [1.0, 0.1]), ((photograph, icon), [0.1, 1.0])):
        chat = Chat.ask(*images, CATS)
        account = served.ask(chat)
        assert account["image_tokens"] == 4 + {28: 10, 32: 8}[served.token_px]
        served.check(chat, account, budgets)


def test_more_positions_than_the_context(served: Served) -> None:
    """A token is kept of each column of 200, after which the text goes on 200 positions later."""
    if served.token_px is None:
        pytest.skip("positions of this family are those of its tokens")
    size = (served.token_px, 200 * served.token_px)
    columns = [Image.new("RGB", size, (red, 99, 9)) for red in range(45)]
    with pytest.raises(openai.BadRequestError, match=r"span 9\d\d\d positions, more than the model's context of 8192"):
        served.ask(Chat.ask(*columns, CUP), mmtok_budget=1)
    chat = Chat.ask(*columns[:4], "x " * 3600)
    account = served.ask(chat, max_tokens=900, mmtok_budget=1)
    prompt = served.judge.prune(served.judge.prompt(chat.for_template()), chat.images, chat.guidance, None)
    assert account["prompt_tokens"] < prompt.next_position - 700
    assert account["completion_tokens"] == 8191 - prompt.next_position < 200
    served.check(CHATS["one image"], served.ask(CHATS["one image"]))


def test_parallel_sampling(served: Served) -> None:
    """n = 2 copies a request's items after they are planned."""
    completion = served.server.client().chat.completions.create(
        model="default",
        messages=CHATS["one image"].for_server(),  # type: ignore[arg-type]
        max_tokens=4,
        temperature=0,
        n=2,
        logprobs=True,
        top_logprobs=5,
        extra_body={"return_meta_info": True, "ignore_eos": True},
    )
    for choice in completion.choices:
        served.check(CHATS["one image"], choice.meta_info)  # type: ignore[attr-defined]


@pytest.mark.parametrize("budget", ["10%", "all"])
def test_beams(served: Served, budget: str) -> None:
    """The score of each beam is the mean of its tokens' logprobs."""
    if served.family.startswith("qwen3.5"):
        pytest.skip("SGLang has no beams of a model with linear attention")
    chat = CHATS["one image"]
    prompt = served.judge.prompt(chat.for_template())
    body = {
        "text": prompt,
        "image_data": [data_url(image) for image in chat.images],
        "sampling_params": {"max_new_tokens": 4, "beam_width": 3, "n": 3, "ignore_eos": True},
        "mm_processor_kwargs": {"mmtok_budget": budget},
    }
    pruned = served.judge.prune(prompt, chat.images, chat.guidance, None if budget == "all" else 0.1)
    beams = served.post("/generate", body)["meta_info"]["beam_results"]
    assert len(beams) == 3
    for beam in beams:
        logprobs = served.judge.logprobs(pruned, beam["output_ids"])
        expected = sum(logprobs[step, token].item() for step, token in enumerate(beam["output_ids"])) / 4
        assert abs(beam["meta_info"]["sequence_score"] - expected) < LOGPROB_TOLERANCE


def test_a_request_sets_its_guidance(served: Served) -> None:
    chat = CHATS["two images"]
    served.check(chat, served.ask(chat, mmtok_guidance="astronaut helmet"), guidance=["astronaut helmet"] * 2)
    served.check(chat, served.ask(chat, mmtok_guidance=["cat", "flag"]), guidance=["cat", "flag"])


# Images of no other test: SGLang keeps embeddings, and one from a batch with others differs in its last bits.
UNSEEN = {
    "one image": Chat.ask(small("rocket"), CUP),
    "two images": Chat.ask(small("rocket", 280, 280), small("coffee", 280, 224), CATS),
    "no image": Chat.ask("No image here."),
}


@pytest.mark.parametrize("budget", ["all", 1_000_000])
@pytest.mark.parametrize("chat", UNSEEN.values(), ids=UNSEEN.keys())
def test_the_whole_image_equals_the_server_without_the_plugin(
    servers: tuple[Served, Served], chat: Chat, budget: int | str
) -> None:
    answers = []
    for served in servers:
        served.flush_cache()
        fields: dict[str, Any] = {"mmtok_budget": budget} if served is servers[0] else {}
        answers.append(served.ask(chat, **fields))
    for field in ("text", "prompt_tokens", "image_tokens", "output_token_logprobs", "output_top_logprobs"):
        assert answers[0].get(field) == answers[1].get(field)


def test_the_native_endpoint_finds_the_question_in_the_prompt(served: Served) -> None:
    for name in ("one image", "two images", "system prompt", "later turn", "no text"):
        chat = CHATS[name]
        served.check(chat, served.generate(served.judge.prompt(chat.for_template()), chat))


def test_image_and_question_as_two_messages(served: Served) -> None:
    chat = Chat.ask(small("coffee")).then("user", CUP)
    served.check(chat, served.ask(chat), guidance=[CUP])


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "150%": {"mmtok_budget": "150%"},
    "0": {"mmtok_budget": 0},
    "-3": {"mmtok_budget": -3},
    "1.5": {"mmtok_budget": 1.5},
    "ten": {"mmtok_budget": "ten"},
    "true": {"mmtok_budget": True},
    "list": {"mmtok_budget": [10]},
    "unknown field": {"mmtok_bugdet": 10},
    "method": {"mmtok_method": "fastv"},
    "seed": {"mmtok_seed": "one", "mmtok_method": "random"},
    "guidance of another length": {"mmtok_guidance": ["a", "b", "c"]},
    "guidance of another type": {"mmtok_guidance": 7},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_bad_fields_are_refused_by_name(served: Served, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=next(iter(fields))):
        served.ask(CHATS["one image"], **fields)
    served.check(CHATS["one image"], served.ask(CHATS["one image"]))


def test_corrupt_image_is_refused(served: Served) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}, _text(CUP)]
    with pytest.raises(openai.APIStatusError) as refusal:
        served.server.client().chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        )
    assert refusal.value.status_code == 400
    served.check(CHATS["one image"], served.ask(CHATS["one image"]))


def test_a_video_that_is_none_or_of_another_model_is_refused(served: Served) -> None:
    content = [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGVsbG8="}}, _text(CUP)]
    message = "it prunes images alone of this model"
    if prunes_videos(served.family):
        message = "a video cannot be decoded"
    elif served.family == "internvl3":
        message = "each frame as an image of its own"
    with pytest.raises(openai.BadRequestError, match=message):
        served.server.client().chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        )
    served.check(CHATS["one image"], served.ask(CHATS["one image"]))


def test_image_of_one_pixel(served: Served) -> None:
    chat = Chat.ask(Image.new("RGB", (1, 1), "red"), CUP)
    served.check(chat, served.ask(chat, mmtok_budget="all"), None)
    account = served.ask(chat)
    if served.token_px is not None:
        # 4 tokens, where pruning begins at 8.
        served.check(chat, account, None)
        chat = Chat.ask(Image.new("RGB", (112, 112), "red"), CUP)
        account = served.ask(chat)
    # Its tokens are equal but for rounding, so any of them may be kept: only their number is determined.
    prompt = served.judge.prompt(chat.for_template())
    pruned = served.judge.prune(prompt, chat.images, chat.guidance, 0.1)
    assert (account["prompt_tokens"], account["image_tokens"]) == (len(pruned.embeddings), pruned.num_image_tokens)
    served.check(CHATS["one image"], served.ask(CHATS["one image"]))


def test_image_without_a_token_to_pick(served: Served) -> None:
    """A line of 1 x 1000 pixels, padded to a square: every patch is padding."""
    if served.family != "llava-1.5":
        pytest.skip("only LLaVA-1.5 excludes padding")
    chat = Chat.ask(Image.new("RGB", (1000, 1), "red"), CUP)
    account = served.ask(chat)
    evenly = torch.tensor([575 * place // 56 for place in range(57)])
    prompt = served.judge.prompt(chat.for_template())
    pruned = served.judge.prune(prompt, chat.images, chat.guidance, 0.1, kept=[evenly])
    assert served.judge.max_error(pruned, account) < LOGPROB_TOLERANCE
    assert "57 evenly spaced tokens instead" in served.server.log_text()
    assert "\nmmtok:selection_fallbacks_total" in served.get("/metrics")
    served.check(CHATS["one image"], served.ask(CHATS["one image"]))


def test_the_tokenizer_process_times_each_step_of_an_image(served: Served) -> None:
    # Reading and decoding are one step each; without images there is nothing to time. InternVL's are cut one by one.
    served.flush_cache()  # of what was made of these images before
    counts = {"decode": 4, "preprocess": 2 if served.family == "internvl3" else 1, "hash": 1, "transport": 1}
    for chat, factor in ((CHATS["two images"], 1), (Chat.ask("Tell me about cats."), 0)):
        before = {name: served.metric(f"image_{name}_milliseconds_count") for name in counts}
        served.ask(chat)
        after = {name: served.metric(f"image_{name}_milliseconds_count") for name in counts}
        assert {name: after[name] - before[name] for name in counts} == {
            name: factor * count for name, count in counts.items()
        }
    assert all(served.metric(f"image_{name}_milliseconds_sum") > 0 for name in counts)


def test_question_of_four_thousand_words(served: Served) -> None:
    chat = Chat.ask(small("coffee", 112, 112), " ".join("bcdfgjkl"[i % 8] for i in range(4000)))
    if served.family == "llava-next":
        # Three tiles or more of 57 tokens and 8,000 of text: above the 8,192 of the model.
        with pytest.raises(openai.BadRequestError, match="context length"):
            served.ask(chat)
    else:
        served.check(chat, served.ask(chat))
    served.check(CHATS["one image"], served.ask(CHATS["one image"]))


def test_aborted_request(served: Served) -> None:
    for _ in range(3):
        stream = served.server.client().chat.completions.create(
            model="default",
            messages=CHATS["two images"].for_server(),  # type: ignore[arg-type]
            max_tokens=500,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert isinstance(stream, openai.Stream)
        next(iter(stream))
        stream.close()
    served.check(CHATS["one image"], served.ask(CHATS["one image"]))


def test_the_flags_are_in_server_info(servers: tuple[Served, Served]) -> None:
    pruned, plain = (served.server.server_info() for served in servers)
    preset = servers[0].judge.preset
    assert {name: value for name, value in pruned.items() if name.startswith("mmtok")} == {
        "mmtok_budget": "10%",
        "mmtok_min_tokens": 1,
        "mmtok_auto_min": None,
        "mmtok_auto_max": None,
        "mmtok_min_tokens_in": MIN_TOKENS_IN,
        "mmtok_encoder_scale": 1.0,
        "mmtok_skip_repeats": -1,
        "mmtok_share_tiles": False,
        "mmtok_tv_temp": preset.config.tv_temp,
        "mmtok_vv_temp": preset.config.vv_temp,
        "mmtok_alpha": preset.config.alpha,
        "mmtok_guidance": preset.guidance,
        "mmtok_method": "mmtok",
        "mmtok_keys": "input",
        "mmtok_video_budget": "video",
        "mmtok_seed": 0,
        "mmtok_agent_url": None,
        "mmtok_agent_model": "default",
        "mmtok_agent_timeout_ms": 1000,
        "mmtok_backend": "auto",
        "mmtok_engine": None,
        "mmtok_engine_sha256": None,
        "mmtok_onnxruntime_provider": None,
        "mmtok_feature_cache_mb": 256,
        "mmtok_max_images": 64,
        "mmtok_max_image_pixels": 4_194_304 if servers[0].token_px is not None else 64_000_000,
        "mmtok_max_video_frames": 64,
        "mmtok_max_video_pixels": 4_194_304 if servers[0].token_px is not None else 96_000_000,
        "mmtok_max_aspect_ratio": MAX_ASPECT_RATIO,
        "mmtok_max_guidance_tokens": 16_384,
        "mmtok_max_selection_cost": 2e11,
        "mmtok_trust_image_hashes": False,
    }
    assert all(value is None for name, value in plain.items() if name.startswith("mmtok"))


def test_without_the_flag_nothing_is_hooked(servers: tuple[Served, Served]) -> None:
    assert "MMTok: installed" in servers[0].server.log_text()
    assert "MMTok" not in servers[1].server.log_text()


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
