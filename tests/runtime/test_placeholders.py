from __future__ import annotations

import asyncio
import pickle
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput, msgpack_decode, msgpack_encode
from sglang.srt.sampling.sampling_params import SamplingParams
from torch import Tensor

from mmtok_deploy.methods import MethodName
from mmtok_deploy.photographs import photograph
from mmtok_sglang import placeholders
from mmtok_sglang.cut import cut_placeholders
from mmtok_sglang.families import Family
from mmtok_sglang.families.internvl3 import InternVL3
from mmtok_sglang.limits import Limits
from mmtok_sglang.placeholders import PlaceholderCutter
from mmtok_sglang.plan import ImagePlan, joined_parts, places_in_prompt, plan_of, share_guidance
from mmtok_sglang.request import guidance_texts, requested
from mmtok_sglang.request_checks import refuse_scattered_placeholders
from mmtok_sglang.typed_placeholders import PlaceholderRule
from tests.runtime.stand_ins import (
    IMAGE_ID,
    Request,
    image_item,
    make_settings,
    mrope_positions,
    prompt_output,
    stand_in_processor,
)

IMAGE = Image.new("RGB", (4, 4))
# Text 1 2, an image of 4 tokens, text 3, an image of 3 tokens, text 4.
TWO_IMAGES = [1, 2, *[IMAGE_ID] * 4, 3, *[IMAGE_ID] * 3, 4]


def planned(output: Any, *nums_kept: int | None) -> Any:
    for item, num_kept in zip(output.mm_items, nums_kept, strict=True):
        if num_kept is not None:
            ((start, end),) = item.offsets
            ImagePlan(end - start + 1, num_kept, guidance=[5]).attach(item)
    return output


def offsets(output: Any) -> list[tuple[int, int]]:
    return [span for item in output.mm_items for span in item.offsets]


@pytest.mark.parametrize(
    ("nums_kept", "stays", "spans"),
    [
        ((2, 1), [0, 1, 2, 3, 6, 7, 10], [(2, 3), (5, 5)]),
        ((1, None), [0, 1, 2, 6, 7, 8, 9, 10], [(2, 2), (4, 6)]),
        ((None, 2), [0, 1, 2, 3, 4, 5, 6, 7, 8, 10], [(2, 5), (7, 8)]),
        ((4, 1), [0, 1, 2, 3, 4, 5, 6, 7, 10], [(2, 5), (7, 7)]),
    ],
)
def test_everything_laid_out_by_token_is_cut(
    nums_kept: tuple[int | None, ...], stays: list[int], spans: list[tuple[int, int]]
) -> None:
    num_tokens = len(TWO_IMAGES)
    token_types = torch.tensor([token == IMAGE_ID for token in TWO_IMAGES]).int()
    output = prompt_output(TWO_IMAGES, mrope=True, padded_input_ids=[0] * num_tokens, token_type_ids=token_types[None])
    cut_placeholders(planned(output, *nums_kept))
    assert output.input_ids == [TWO_IMAGES[place] for place in stays]
    assert offsets(output) == spans
    assert output.padded_input_ids is None
    assert output.token_type_ids.tolist() == token_types[stays].tolist()
    assert output.mrope_positions.tolist() == mrope_positions(num_tokens)[:, stays].tolist()
    # Decoding goes on at `length + delta`, where it would have without pruning.
    assert len(stays) + output.mrope_position_delta.item() == num_tokens - 3


def test_the_plan_holds_the_original_positions() -> None:
    output = prompt_output(TWO_IMAGES, mrope=True)
    cut_placeholders(planned(output, 2, None))
    pruned, unpruned = (plan_of(item) for item in output.mm_items)
    assert unpruned is None
    assert pruned is not None
    assert pruned.positions is not None
    assert pruned.positions.tolist() == mrope_positions(len(TWO_IMAGES))[:, 2:6].tolist()


def test_a_model_without_mrope_is_cut_by_ids_alone() -> None:
    output = prompt_output(TWO_IMAGES)
    cut_placeholders(planned(output, 1, 1))
    assert output.input_ids == [1, 2, IMAGE_ID, 3, IMAGE_ID, 4]
    assert (output.mrope_positions, output.mrope_position_delta, output.token_type_ids) == (None, None, None)


def test_images_without_text_between_them_are_told_apart() -> None:
    output = prompt_output([IMAGE_ID] * 5)
    output.mm_items = [image_item((0, 2)), image_item((3, 4))]
    cut_placeholders(planned(output, 2, 1))
    assert (output.input_ids, offsets(output)) == ([IMAGE_ID] * 3, [(0, 1), (2, 2)])


# Text 1, a video of three frames of two tokens with text 3 4 and 5 6 between them, text 2.
FRAMES = [1, *[IMAGE_ID] * 2, 3, 4, *[IMAGE_ID] * 2, 5, 6, *[IMAGE_ID] * 2, 2]
BETWEEN = [[3, 4], [5, 6]]


def a_video(num_kept: int) -> Any:
    output = prompt_output(FRAMES, mrope=True)
    output.mm_items = [image_item((1, 2))]
    output.mm_items[0].offsets = [(1, 2), (5, 6), (9, 10)]
    ImagePlan(6, num_kept, guidance=[5], num_frames=3, between=BETWEEN).attach(output.mm_items[0])
    return output


@pytest.mark.parametrize("num_kept", [1, 2, 3, 5])
def test_the_runs_of_a_video_become_one_span_with_all_of_the_text_between(num_kept: int) -> None:
    output = a_video(num_kept)
    cut_placeholders(output)
    assert offsets(output) == [(1, 1 + num_kept + 4 - 1)]
    assert [token for token in output.input_ids if token != IMAGE_ID] == [1, 3, 4, 5, 6, 2]
    assert output.input_ids.count(IMAGE_ID) == num_kept
    plan = plan_of(output.mm_items[0])
    assert plan is not None
    assert plan.positions is not None
    assert plan.positions.tolist() == mrope_positions(len(FRAMES))[:, 1:11].tolist()


@pytest.mark.parametrize(
    ("kept", "ids"),
    [
        ([0, 1, 2, 3, 4, 5], FRAMES[1:11]),
        ([0, 5], [IMAGE_ID, 3, 4, 5, 6, IMAGE_ID]),
        # Frames without a kept token.
        ([2], [3, 4, IMAGE_ID, 5, 6]),
        ([4, 5], [3, 4, 5, 6, IMAGE_ID, IMAGE_ID]),
        ([1, 2, 3], [IMAGE_ID, 3, 4, IMAGE_ID, IMAGE_ID, 5, 6]),
    ],
)
def test_kept_tokens_and_text_stand_as_in_the_unpruned_prompt(kept: list[int], ids: list[int]) -> None:
    plan = ImagePlan(6, len(kept), [], num_frames=3, between=BETWEEN)
    places = places_in_prompt(torch.tensor(kept), plan)
    region = torch.tensor(FRAMES[1:11])
    assert region[places[: len(kept)]].tolist() == [IMAGE_ID] * len(kept)
    assert region[places[len(kept) :]].tolist() == [3, 4, 5, 6]
    assert region[places.sort().values].tolist() == ids


def test_where_nothing_is_planned_nothing_is_touched() -> None:
    output = prompt_output(TWO_IMAGES, mrope=True, padded_input_ids=[0] * len(TWO_IMAGES))
    ids, positions, padded = output.input_ids, output.mrope_positions, output.padded_input_ids
    cut_placeholders(output)
    assert output.input_ids is ids
    assert output.mrope_positions is positions
    assert output.padded_input_ids is padded
    assert offsets(output) == [(2, 5), (7, 9)]


def by_msgpack(output: Any) -> Any:
    """Sends the output as the tokenizer process does."""
    request = TokenizedGenerateReqInput(
        input_text="",
        input_ids=None,
        input_embeds=None,
        mm_inputs=output,
        token_type_ids=None,
        sampling_params=SamplingParams(),
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )
    return msgpack_decode(msgpack_encode(request)).mm_inputs


def by_pickle(output: Any) -> Any:
    return pickle.loads(pickle.dumps(output))


@pytest.mark.parametrize("send", [by_msgpack, by_pickle])
def test_the_plan_survives_the_way_to_the_scheduler(send: Callable[[Any], Any]) -> None:
    excluded = torch.tensor([True, False, False, True])
    output = prompt_output(TWO_IMAGES, mrope=True)
    ImagePlan(4, 2, guidance=[7, 8], excluded=excluded).attach(output.mm_items[0])
    ImagePlan(3, 1, guidance=[], auto={"asks": "read", "share": "50%"}).attach(output.mm_items[1])
    cut_placeholders(output)
    sent = [plan_of(item) for item in output.mm_items]
    for before, after in zip(sent, [plan_of(item) for item in send(output).mm_items], strict=True):
        assert before is not None
        assert after is not None
        assert (after.num_tokens, after.num_kept) == (before.num_tokens, before.num_kept)
        assert (after.guidance, after.auto) == (before.guidance, before.auto)
        assert same(after.excluded, before.excluded)
        assert same(after.positions, before.positions)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


class StandInFamily(Family):
    placeholder = "<|image_pad|>"
    placeholder_rule = PlaceholderRule(re.compile(r"<\|image_pad\|>"))

    def __init__(self, excluded: Tensor | None = None) -> None:
        self._excluded = excluded

    def excluded(self, item: Any) -> Tensor | None:
        return self._excluded

    def vision_width(self, config: Any) -> int:
        return 8

    def keys_width(self, config: Any) -> int:
        return 6


def processed(
    output: Any,
    budget: str | int = "all",
    *,
    fields: Any = None,
    excluded: Tensor | None = None,
    images: Sequence[Any] | None = (),
    videos: Sequence[Any] | None = None,
    prompt: str | list[int] | None = "",
    max_prompt_tokens: int | None = None,
    min_tokens_in: int = 0,
    agent_url: str | None = None,
    limits: Limits | None = None,
) -> Any:
    """Runs the cutter around a processor that returns `output`; by default with as many images as it has."""
    num_images = len(output.mm_items) if output is not None else 1
    images = [IMAGE] * num_images if images == () else images
    prompt = "<|image_pad|>" * len(images or ()) if prompt == "" else prompt

    async def original(processor: Any, image_data: Any, **kwargs: Any) -> Any:
        assert image_data == images
        assert kwargs["input_text"] is prompt
        return output

    settings = replace(make_settings(budget), min_tokens_in=min_tokens_in, agent_url=agent_url)
    settings = replace(settings, limits=limits or Limits())
    cutter = PlaceholderCutter(settings, StandInFamily(excluded))
    request = Request(mm_processor_kwargs=fields, video_data=videos)
    return asyncio.run(
        cutter.process_mm_data(
            original,
            stand_in_processor(),
            images,
            audio_data=None,
            input_text=prompt,
            request_obj=request,
            max_req_input_len=max_prompt_tokens,
        )
    )


def test_the_servers_budget_is_cut_to() -> None:
    output = processed(prompt_output(TWO_IMAGES), 2, prompt="<|image_pad|>ab<|image_pad|>")
    plans = [plan_of(item) for item in output.mm_items]
    question = [ord(letter) for letter in "Question:ab"]
    assert plans == [ImagePlan(4, 2, question), ImagePlan(3, 2, question)]
    assert output.input_ids == [1, 2, IMAGE_ID, IMAGE_ID, 3, IMAGE_ID, IMAGE_ID, 4]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (None, (3, 3)),
        ({"mmtok_budget": 1}, (1, 1)),
        ({"mmtok_budget": "50%"}, (2, 1)),
        ({"mmtok_budget": "all"}, (4, 3)),
        ({"mmtok_budget": 100}, (4, 3)),
    ],
)
def test_a_requests_budget_is_cut_to(fields: Any, kept: tuple[int, int]) -> None:
    output = processed(prompt_output(TWO_IMAGES), 3, fields=fields)
    assert tuple(end - start + 1 for start, end in offsets(output)) == kept


def blank_page() -> Image.Image:
    """Returns white paper with a photograph on a quarter of it."""
    page = Image.new("RGB", (400, 400), "white")
    page.paste(photograph("chelsea").resize((200, 200)), (80, 80))
    return page


def test_auto_keeps_what_each_images_question_needs() -> None:
    texts = ["Where is the cat?", "How many cats are there?"]
    fields = {"mmtok_budget": "auto", "mmtok_guidance": texts}
    # All of the photograph is distinct, and less than half of the page.
    images = [photograph("chelsea"), blank_page()]
    output = processed(prompt_output([1, *[IMAGE_ID] * 100, 2, *[IMAGE_ID] * 80]), 3, fields=fields, images=images)
    plans = [plan_of(item) for item in output.mm_items]
    assert [(plan.num_tokens, plan.num_kept, plan.auto) for plan in plans if plan is not None] == [
        (100, 5, {"asks": "where", "distinct": "100%", "share": "5%"}),
        (80, 20, {"asks": "count", "distinct": "46%", "share": "25%"}),
    ]
    questions = {**fields, "mmtok_guidance": "What does it say?"}
    output = processed(prompt_output([1, *[IMAGE_ID] * 100, 2, *[IMAGE_ID] * 80]), 3, fields=questions, images=images)
    plans = [plan_of(item) for item in output.mm_items]
    assert [(plan.num_kept, plan.auto) for plan in plans if plan is not None] == [
        (50, {"asks": "read", "distinct": "100%", "share": "50%"}),
        (36, {"asks": "read", "distinct": "46%", "share": "46%"}),
    ]
    # A method that does not read the question keeps as many tokens.
    output = processed(
        *(prompt_output([1, *[IMAGE_ID] * 100, 2, *[IMAGE_ID] * 80]), 3),
        fields={**fields, "mmtok_method": "even"},
        images=images,
    )
    others = [plan_of(item) for item in output.mm_items]
    assert [(plan.num_kept, plan.guidance) for plan in others if plan is not None] == [(5, []), (20, [])]


def test_auto_goes_by_the_file_whatever_decoded_it() -> None:
    buffer = BytesIO()
    blank_page().save(buffer, "JPEG")
    told = []
    # As Pillow and a GPU decode it: pixels that differ a little, and may be no picture at all.
    for pixels in (torch.zeros(1), torch.ones(1), torch.rand(100, 12)):
        output = prompt_output([1, *[IMAGE_ID] * 100, 2])
        output.mm_items[0].feature = pixels
        fields = {"mmtok_budget": "auto", "mmtok_guidance": "What does it say?"}
        plan = plan_of(processed(output, 3, fields=fields, images=[buffer.getvalue()]).mm_items[0])
        assert plan is not None
        told.append((plan.num_kept, plan.auto))
    assert told == [(26, {"asks": "read", "distinct": "26%", "share": "26%"})] * 3


@pytest.mark.parametrize(
    ("min_tokens_in", "kept"), [(0, (2, 2)), (3, (2, 2)), (4, (2, 3)), (5, (4, 3))], ids=["off", "both", "one", "none"]
)
@pytest.mark.parametrize("fields", [None, {"mmtok_budget": 2}])
def test_an_image_of_fewer_tokens_than_asked_for_is_left_unpruned(
    min_tokens_in: int, kept: tuple[int, int], fields: Any
) -> None:
    output = processed(prompt_output(TWO_IMAGES), 2, fields=fields, min_tokens_in=min_tokens_in)
    assert tuple(end - start + 1 for start, end in offsets(output)) == kept
    assert [plan_of(item) is None for item in output.mm_items] == [kept[0] == 4, kept[1] == 3]


@pytest.mark.parametrize(
    ("fields", "method", "seed", "reads"),
    [
        ({"mmtok_method": "divprune"}, "divprune", 0, False),
        ({"mmtok_method": "even", "mmtok_seed": 5}, "even", 0, False),
        ({"mmtok_method": "text-coverage"}, "text-coverage", 0, True),
        ({"mmtok_method": "random", "mmtok_seed": 5}, "random", 5, True),
        ({"mmtok_method": "mmtok"}, "mmtok", 0, True),
    ],
)
def test_a_requests_method_is_in_the_plan(fields: Any, method: MethodName, seed: int, reads: bool) -> None:
    output = processed(prompt_output(TWO_IMAGES), 2, fields=fields, prompt="<|image_pad|>ab<|image_pad|>")
    question = [ord(letter) for letter in "Question:ab"] if reads else []
    expected = [ImagePlan(tokens, 2, question, method=method, seed=seed) for tokens in (4, 3)]
    assert [plan_of(item) for item in output.mm_items] == expected


@pytest.mark.parametrize("method", ["evs", "frames"])
def test_a_method_that_goes_by_frames_is_refused_for_an_image(method: str) -> None:
    fields = {"mmtok_method": method}
    with pytest.raises(ValueError, match=f"^mm_processor_kwargs.mmtok_method {method} goes by the frames of a video"):
        processed(None, 2, fields=fields)
    with pytest.raises(ValueError, match=f"mmtok_method {method} shares a video's budget among its frames itself"):
        processed(None, 2, fields=fields | {"mmtok_video_budget": "frame"})
    processed(prompt_output(TWO_IMAGES), 2, fields=fields | {"mmtok_budget": "all"})


def test_a_server_by_frames_of_a_method_that_shares_them_itself_does_not_start() -> None:
    with pytest.raises(ValueError, match=r"^method evs shares a video's budget among its frames itself"):
        replace(make_settings(2), method="evs", video_budget="frame")


class VideoFamily(StandInFamily):
    """Images are videos of two frames, each with a run of its own."""

    def num_frames(self, item: Any) -> int:
        return 2

    def num_runs(self, item: Any) -> int:
        return 2


def planned_video(runs: Sequence[tuple[int, int]], **fields: Any) -> Any:
    """Returns the plan of a video whose runs of placeholders have ids from 0 on between them."""
    cutter = PlaceholderCutter(make_settings(4), VideoFamily())
    output = prompt_output([1, IMAGE_ID])
    (item,) = output.mm_items
    item.offsets, output.input_ids = list(runs), list(range(runs[-1][1] + 1))
    asked = requested(fields, cutter._settings)
    asyncio.run(cutter._planner.plan_images(output, ["a"], asked, stand_in_processor(), None, None))
    return plan_of(item)


def test_the_plan_of_a_video_holds_the_text_between_its_runs() -> None:
    plan = planned_video([(3, 7), (11, 15)])
    assert (plan.num_tokens, plan.num_kept, plan.num_frames, plan.between) == (10, 4, 2, [[8, 9, 10]])
    by_frame = planned_video([(3, 7), (11, 15)], mmtok_video_budget="frame", mmtok_budget=7)
    assert (by_frame.num_kept, by_frame.num_parts, by_frame.between) == (6, 2, [[8, 9, 10]])


def test_a_video_whose_runs_differ_is_refused() -> None:
    with pytest.raises(ValueError, match="each step in time of a video has as many placeholders, one here has fewer"):
        planned_video([(3, 7), (11, 14)])


def test_evs_of_less_than_a_frame_is_refused() -> None:
    assert planned_video([(3, 7), (11, 15)], mmtok_method="evs", mmtok_budget=5).num_kept == 5
    with pytest.raises(ValueError, match=r"evs keeps the first step in time of a video whole, 5 tokens here, and .* 4"):
        planned_video([(3, 7), (11, 15)], mmtok_method="evs")
    assert planned_video([(3, 7), (11, 15)], mmtok_method="frames", mmtok_budget=1).num_kept == 1


def test_runs_that_the_family_does_not_write_are_refused() -> None:
    item = image_item((0, 1))
    item.offsets = [(0, 1), (3, 4)]
    with pytest.raises(ValueError, match=r"each image has one run of placeholders .*, one here has 2"):
        refuse_scattered_placeholders([item], lambda _: 1)
    with pytest.raises(ValueError, match=r"each video of 3 steps in time has as many runs .*, one here has 2"):
        refuse_scattered_placeholders([item], lambda _: 3)
    refuse_scattered_placeholders([item], lambda _: 2)


def test_a_video_of_internvl_is_refused_with_the_reason() -> None:
    cutter = PlaceholderCutter(make_settings(2, "internvl3"), InternVL3())
    call = cutter.process_mm_data(
        *(None, stand_in_processor(), []),  # type: ignore[arg-type]
        input_text="<video>What?",
        request_obj=Request(mm_processor_kwargs=None, video_data=["film.mp4"]),
    )
    with pytest.raises(ValueError, match=r"brings a video.*of an InternVL3's video SGLang writes each frame"):
        asyncio.run(call)


@pytest.mark.parametrize("method", ["visionzip", "downsample"])
def test_a_method_that_the_model_cannot_run_is_refused(method: str) -> None:
    fields = {"mmtok_method": method}
    with pytest.raises(ValueError, match=rf"^mm_processor_kwargs.mmtok_method {method} does not run on this model: "):
        processed(None, 2, fields=fields)
    processed(prompt_output(TWO_IMAGES), 2, fields=fields | {"mmtok_budget": "all"})


def test_texts_belong_to_images_in_the_order_of_the_prompt() -> None:
    output = prompt_output(TWO_IMAGES)
    output.mm_items.reverse()
    processed(output, 1, fields={"mmtok_guidance": ["a", "b"]})
    assert [plan_of(item).guidance[-1] for item in output.mm_items] == [ord("a"), ord("b")]  # type: ignore[union-attr]
    assert offsets(output) == [(2, 2), (4, 4)]


@pytest.mark.parametrize(
    ("prompt", "kwargs", "message"),
    [
        (
            "<|image_pad|>" + "cat " * 10**5,
            None,
            "the prompt has 400,013 characters, the longest prompt",
        ),
        ([65] * 10**6, None, "the prompt has 1,000,000 token ids, the longest"),
        ([IMAGE_ID] + [66] * 310_000, {"mmtok_budget": 1}, "--mmtok-max-guidance-tokens"),
        ("<|image_pad|>" + "b" * 310_000, None, "--mmtok-max-guidance-tokens"),
        ("b" * 310_000, {"mmtok_budget": "all"}, "0 image placeholders for 1 image"),
    ],
    ids=["text", "ids", "guidance of ids", "guidance", "no placeholder"],
)
def test_a_long_prompt_is_refused_before_it_is_tokenised(prompt: str | list[int], kwargs: Any, message: str) -> None:
    given = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenized(GenerateReqInput(**given, image_data=IMAGE, mm_processor_kwargs=kwargs))


def test_more_images_than_the_limit_are_refused() -> None:
    output = prompt_output([IMAGE_ID, 1] * 4)
    with pytest.raises(ValueError, match=r"the request has 4 images, this server takes 3 \(--mmtok-max-images\)"):
        processed(output, limits=Limits(max_images=3))
    assert processed(output, limits=Limits(max_images=4)) is output


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({"text": "<|image_pad|>" + "b" * 310_000, "image_data": IMAGE}, {"mmtok_budget": "all"}),
        ({"text": "<|image_pad|>" + "b" * 310_000, "image_data": IMAGE}, {"mmtok_guidance": "a cat"}),
        ({"input_ids": [IMAGE_ID] + [66] * 310_000, "image_data": [IMAGE]}, {"mmtok_method": "even"}),
        ({"text": "b" * 10**6}, None),
        ({"text": "short", "image_data": IMAGE}, None),
    ],
    ids=["unpruned", "other guidance", "no guidance", "no image", "short"],
)
def test_other_prompts_are_tokenised(fields: dict[str, Any], kwargs: Any) -> None:
    assert tokenized(GenerateReqInput(**fields, mm_processor_kwargs=kwargs)) == "tokenised"


def tokenized(request: GenerateReqInput) -> str:
    """Has the request tokenised by a server of 10,000 tokens."""
    cutter = PlaceholderCutter(make_settings(2), StandInFamily())
    manager = SimpleNamespace(mm_processor=stand_in_processor(), max_req_input_len=10_000)

    async def original(same_manager: Any, obj: Any) -> str:
        assert (same_manager, obj) == (manager, request)
        return "tokenised"

    found: str = asyncio.run(cutter.tokenize_one_request(original, manager, request))
    return found


def test_the_guidance_of_a_long_prompt_is_found_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []

    def found(*args: Any) -> list[str]:
        threads.append(threading.current_thread() is threading.main_thread())
        return guidance_texts(*args)

    monkeypatch.setattr(placeholders, "guidance_texts", found)
    for num_letters in (10, 100_000):
        prompt = "<|image_pad|>" + "b" * num_letters
        processed(prompt_output([IMAGE_ID] * 3), 1, prompt=prompt, limits=Limits(max_guidance_tokens=10**6))
    # A short one is read at once, on the event loop.
    assert threads == [True, False]


def test_images_are_planned_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # `downsample` scales the pixels of a LLaVA there: 64 images kept the event loop for 0.4 s.
    threads: list[bool] = []

    def num_kept(*_: Any) -> int:
        threads.append(threading.current_thread() is threading.main_thread())
        return 1

    monkeypatch.setattr(StandInFamily, "num_kept", num_kept)
    processed(prompt_output(TWO_IMAGES), 1)
    assert threads == [False, False]


def test_a_prompt_of_ids_and_an_image_without_text() -> None:
    with_text = processed(prompt_output([IMAGE_ID] * 3), 1, prompt=[IMAGE_ID, ord("a")]).mm_items[0]
    without = processed(prompt_output([IMAGE_ID] * 3), 1, prompt=[IMAGE_ID]).mm_items[0]
    assert plan_of(with_text) == ImagePlan(3, 1, [ord(letter) for letter in "Question:a"])
    assert plan_of(without) == ImagePlan(3, 1, [])


@pytest.mark.parametrize(
    ("excluded", "num_kept"),
    [([0, 1], 2), ([0, 1, 2], 1), ([0], 3), ([0, 1, 2, 3], 3)],
    ids=["as many as may be picked", "one may be picked", "enough may be picked", "none may be picked: the budget"],
)
def test_no_more_is_kept_than_may_be_picked(excluded: list[int], num_kept: int) -> None:
    mask = torch.isin(torch.arange(4), torch.tensor(excluded))
    (item,) = processed(prompt_output([IMAGE_ID] * 4), 3, excluded=mask).mm_items
    plan = plan_of(item)
    assert plan is not None
    assert plan.num_kept == num_kept
    assert same(plan.excluded, mask)


def test_padding_alone_prunes_nothing() -> None:
    mask = torch.tensor([True, False, False, False])
    (item,) = processed(prompt_output([IMAGE_ID] * 4), 4, excluded=mask).mm_items
    assert plan_of(item) is None


@pytest.mark.parametrize("empty", [None, prompt_output([1, 2])])
def test_a_request_without_images_is_not_touched(empty: Any) -> None:
    assert processed(empty, 2, images=None) is empty


UNPRUNABLE: list[tuple[dict[str, Any], str]] = [
    ({"videos": ["cat.mp4"]}, "brings a video"),
    ({"images": [{"format": "precomputed_embedding", "feature": 1.0}]}, "precomputed embeddings"),
]


@pytest.mark.parametrize(("inputs", "message"), UNPRUNABLE)
def test_what_cannot_be_pruned_is_refused_before_it_is_processed(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f'{message}.*"mmtok_budget": "all"'):
        processed(None, 2, **inputs)
    with pytest.raises(ValueError, match=f'{message}.*"mmtok_budget": "all", "mmtok_encoder_scale": 1'):
        processed(None, fields={"mmtok_encoder_scale": 0.5}, **inputs)


@pytest.mark.parametrize(
    ("budget", "num_kept", "num_parts"), [("50%", 6, 3), (7, 6, 3), (3, 3, 3), (100, None, None), ("all", None, None)]
)
def test_frames_share_a_budget_evenly(budget: str | int, num_kept: int | None, num_parts: int | None) -> None:
    class OfThree(StandInFamily):
        def num_frames(self, item: Any) -> int:
            return 3

    output = prompt_output([1, *[IMAGE_ID] * 12, 2])
    cutter = PlaceholderCutter(replace(make_settings(budget), video_budget="frame"), OfThree())
    asked = requested(None, cutter._settings)
    plan = cutter._planner.plan(output.mm_items[0], "", None, asked, stand_in_processor())
    assert (plan and plan.num_kept, plan and plan.num_parts) == (num_kept, num_parts)
    if budget == 3:
        asked = requested({"mmtok_budget": 2}, cutter._settings)
        with pytest.raises(ValueError, match="a budget of 2 tokens is less than one for each of the 3 steps in time"):
            cutter._planner.plan(output.mm_items[0], "", None, asked, stand_in_processor())


def test_kept_tokens_of_parts_are_numbered_in_the_whole() -> None:
    plan = ImagePlan(12, 6, [], num_parts=3)
    kept = [torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([0, 1])]
    assert joined_parts(kept, plan).tolist() == [0, 3, 5, 6, 8, 9]
    assert joined_parts(kept[:1], replace(plan, num_parts=1)).tolist() == [0, 3]


def test_a_scale_is_refused_for_a_model_whose_encoder_reads_one_size() -> None:
    with pytest.raises(ValueError, match=r"mmtok_encoder_scale 0.5 does not run on this model: .* images of one size"):
        processed(None, fields={"mmtok_encoder_scale": 0.5})
    processed(prompt_output(TWO_IMAGES), fields={"mmtok_encoder_scale": 1})


@pytest.mark.parametrize("budget", ["all", 2])
@pytest.mark.parametrize(
    "image",
    [
        {"url": "https://a/cat.png"},
        {"path": "cat.png"},
        {"feature": 1.0, "url": "https://a/cat.png"},
        {"format": "png", "image": "https://a/cat.png"},
        {},
    ],
)
def test_an_object_that_holds_an_address_is_told_what_an_image_is(budget: str | int, image: dict[str, Any]) -> None:
    named = ", ".join(image)
    with pytest.raises(ValueError, match=f"got an object of {named}: send the text itself, .* and not .*url"):
        processed(None, budget, images=["cat.png", image])


@pytest.mark.parametrize("budget", ["all", 2])
@pytest.mark.parametrize("image", [["cat.png"], [["cat.png"]], [], None, 5, 1.5, True])
def test_what_stands_in_an_images_place_and_is_none_is_refused(budget: str | int, image: Any) -> None:
    # An address within a list would be loaded without a limit.
    with pytest.raises(ValueError, match=f"got a {type(image).__name__}: send one list of images for a prompt"):
        processed(None, budget, images=["cat.png", image])


@pytest.mark.parametrize("budget", ["all", 2])
@pytest.mark.parametrize("video", [["a.mp4"], [["https://a/a.mp4"]], [[0.5], ["/a.mp4"]], [b"film"], None, 5, True])
def test_what_stands_in_a_videos_place_and_is_none_is_refused(budget: str | int, video: Any) -> None:
    with pytest.raises(
        ValueError, match=f"a video is an address, .* got a {type(video).__name__}: send one list of vid"
    ):
        processed(None, budget, images=None, videos=["a.mp4", video])
    with pytest.raises(ValueError, match=r"got an object of url, fps: send the text itself, .video_data.: .https"):
        processed(None, budget, images=None, videos=[{"url": "a.mp4", "fps": 2}])


@pytest.mark.parametrize("inputs", [inputs for inputs, _ in UNPRUNABLE])
@pytest.mark.parametrize(("budget", "fields"), [("all", None), (2, {"mmtok_budget": "all"})])
def test_what_cannot_be_pruned_passes_unpruned(inputs: dict[str, Any], budget: str | int, fields: Any) -> None:
    output = prompt_output(TWO_IMAGES)
    # As SGLang leaves them: several spans of one item, or none yet, in no order of ours.
    output.mm_items = [image_item((7, 9)), image_item((2, 5))]
    output.mm_items[0].offsets = [(2, 5), (7, 9)]
    output.mm_items[1].offsets = None
    before = list(output.mm_items)
    assert processed(output, budget, fields=fields, **inputs) is output
    assert output.mm_items == before
    assert output.input_ids == TWO_IMAGES


@pytest.mark.parametrize("spans", [None, [], [(2, 5), (7, 9)]])
def test_an_image_without_one_run_of_placeholders_is_refused(spans: Any) -> None:
    output = prompt_output([1, IMAGE_ID])
    output.mm_items[0].offsets = spans
    with pytest.raises(ValueError, match=r"one run of placeholders .* one placeholder for each image"):
        processed(output, 2)


@pytest.mark.parametrize("fields", [{"mmtok_budget": 0}, {"mmtok_buget": 2}, {"mmtok_guidance": 5}])
def test_bad_fields_are_refused(fields: Any) -> None:
    with pytest.raises(ValueError, match=r"^mm_processor_kwargs"):
        processed(prompt_output(TWO_IMAGES), 2, fields=fields)


def test_guidance_is_bounded() -> None:
    limits = Limits(max_guidance_tokens=200)
    processed(prompt_output(TWO_IMAGES), 2, fields={"mmtok_guidance": "x" * 191}, limits=limits)
    with pytest.raises(ValueError, match=r"has 201 tokens, this server takes 200 \(--mmtok-max-guidance-tokens\)"):
        processed(prompt_output(TWO_IMAGES), 2, fields={"mmtok_guidance": "x" * 192}, limits=limits)
    with pytest.raises(ValueError, match=r"more than 3,200 bytes, 16 for each of the 200 tokens .*max-guidance-tokens"):
        processed(prompt_output(TWO_IMAGES), 2, fields={"mmtok_guidance": "x" * 3201}, limits=limits)
    with pytest.raises(ValueError, match="more than 3,200 bytes"):
        processed(prompt_output(TWO_IMAGES), 2, fields={"mmtok_guidance": "\u732b" * 1067}, limits=limits)


@pytest.mark.parametrize("text", ["\ud800", "a cat\udfff", "\ude00\ud83d"])
def test_guidance_of_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"guides the selection of an image has half of a surrogate pair, '.ud"):
        processed(prompt_output(TWO_IMAGES), 2, fields={"mmtok_guidance": text})


def test_guidance_of_a_request_is_bounded_and_each_text_counted_once() -> None:
    limits = Limits(max_guidance_tokens=20)
    five = [IMAGE_ID, IMAGE_ID, 1] * 5
    texts = [letter * 11 for letter in "abcde"]
    processed(prompt_output(five), 1, fields={"mmtok_guidance": texts[:1] * 5}, limits=limits)
    with pytest.raises(ValueError, match=r"has 100 tokens, this server takes 80 in a request, four times --mmtok-max"):
        processed(prompt_output(five), 1, fields={"mmtok_guidance": texts}, limits=limits)
    # Before anything is tokenised, each being short enough by itself.
    long = [letter * 300 for letter in "abcde"]
    with pytest.raises(ValueError, match="more than 1,280 bytes, 16 for each of the 80 tokens that this server"):
        processed(prompt_output(five), 1, fields={"mmtok_guidance": long}, limits=limits)


def test_a_prompt_longer_than_any_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match=r"the prompt has 1,614 characters, the longest prompt .* 50 tokens: shorten"):
        processed(prompt_output([IMAGE_ID] * 3), 2, prompt="<|image_pad|> " + "x" * 1600, max_prompt_tokens=50)


def test_the_selections_of_a_request_are_bounded_together() -> None:
    # 2 of 4 tokens and 2 of 3, guided by the 11 letters of "Question:ab": 2 x 4 x 15 + 2 x 3 x 14.
    prompt = "<|image_pad|>ab<|image_pad|>"
    processed(prompt_output(TWO_IMAGES), 2, prompt=prompt, limits=Limits(max_selection_cost=204))
    with pytest.raises(ValueError, match=r"costs 2e\+02, this server allows 2e\+02 \(--mmtok-max-selection-cost"):
        processed(prompt_output(TWO_IMAGES), 2, prompt=prompt, limits=Limits(max_selection_cost=203))
    fields = {"mmtok_method": "even"}
    processed(prompt_output(TWO_IMAGES), 2, prompt=prompt, fields=fields, limits=Limits(max_selection_cost=1))


@pytest.mark.parametrize("budget", ["all", 2])
def test_an_image_beyond_a_limit_is_refused_before_it_is_processed(budget: str | int) -> None:
    with pytest.raises(ValueError, match=r"4 x 4 = 16 pixels, this server takes 15 \(--mmtok-max-image-pixels\)"):
        processed(None, budget, limits=Limits(max_image_pixels=15))


@pytest.mark.parametrize("budget", ["all", 2])
@pytest.mark.parametrize(
    "prompt", ["<|image_pad|> what is <|image_pad|> ?", "no image", None, [IMAGE_ID, 65, IMAGE_ID]]
)
def test_placeholders_that_are_not_the_images_are_refused(budget: str | int, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"^the prompt has [02] image placeholders.* for 1 image: write one for each"):
        processed(None, budget, prompt=prompt)


@pytest.mark.parametrize("budget", ["all", 2])
@pytest.mark.parametrize(
    "image",
    [
        {"format": "processor_output", "mmtok": {"num_tokens": 1}},
        {"format": "precomputed_embedding", "mmtok_image_key": 5},
        {"model_specific_data": {"mmtok": {}}},
    ],
)
def test_what_the_plugin_alone_writes_is_refused(budget: str | int, image: Any) -> None:
    with pytest.raises(ValueError, match=r"features that come ready-made have mmtok.*, which MMTok alone sets"):
        processed(None, budget, images=[image])
    with pytest.raises(ValueError, match="which MMTok alone sets"):
        processed(None, budget, images=None, videos=[image])


@pytest.mark.parametrize("budget", ["all", 100])
def test_what_the_plugin_alone_writes_is_dropped_from_what_a_processor_gives(budget: str | int) -> None:
    output = planned(prompt_output(TWO_IMAGES), 1, 1)
    output.mm_items[1].model_specific_data["mmtok_image_key"] = 5
    assert [item.model_specific_data for item in processed(output, budget).mm_items] == [{}, {}]


@pytest.mark.parametrize("send", [by_msgpack, by_pickle])
def test_guidance_is_held_once_a_request(send: Callable[[Any], Any]) -> None:
    texts = ["a", "b", "a", "", "b", ""]
    output = send(processed(prompt_output([IMAGE_ID, IMAGE_ID, 1] * 6), 1, fields={"mmtok_guidance": texts}))
    share_guidance(output.mm_items)
    plans = [plan for item in output.mm_items if (plan := plan_of(item))]
    assert [plan.guidance[-1:] for plan in plans] == [[ord(text)] if text else [] for text in texts]
    assert len({id(plan.guidance) for plan in plans}) == 3


def test_one_text_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = stand_in_processor()._processor.tokenizer
    tokenised: list[list[str]] = []
    original = type(tokenizer).__call__

    def watched(self: Any, words: list[str], **options: Any) -> Any:
        tokenised.append(words)
        return original(self, words, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    processed(prompt_output(TWO_IMAGES), 2, prompt="<|image_pad|>ab<|image_pad|>", max_prompt_tokens=50)
    assert len(tokenised) == 1
