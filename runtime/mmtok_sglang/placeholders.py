"""Cutting an image's placeholders to its budget, in the tokenizer process, before anything counts tokens."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from sglang.srt.managers.io_struct import EmbeddingReqInput
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from torch import Tensor

from mmtok_deploy.auto_budget import AutoBudget, what_is_asked
from mmtok_deploy.budget import Budget, tokens_per_tile
from mmtok_deploy.executors import check_selection
from mmtok_deploy.guidance import guidance_words
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.methods import MethodName, coverage_of, reads_attention, reads_question
from mmtok_sglang.agent import Agent
from mmtok_sglang.images import ImageLoader, is_raw
from mmtok_sglang.pixels import compact_items
from mmtok_sglang.refusals import refusal
from mmtok_sglang.request import Requested, guidance_texts, requested
from mmtok_sglang.settings import Settings

__all__ = ["ImagePlan", "PlaceholderCutter", "joined_parts", "plan_of", "share_guidance"]

_KEY = "mmtok"
# Letters or token ids from which on a prompt is looked at before SGLang tokenises it: a shorter one takes it some
# milliseconds, and is looked at once.
_LONG_PROMPT = 1 << 16


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What the tokenizer process decides about one image; it travels to the scheduler with the image.

    Args:
        num_tokens: N, the image's placeholders before the cut.
        num_kept: K, its placeholders after it; the selection must return exactly as many tokens.
        guidance: Token ids of the guidance words.
        excluded: [N] bool, tokens never to pick; None if all may be.
        positions: [3, N] int64, the M-RoPE positions of the N placeholders; None for models with 1-D positions.
        method: What chooses the tokens.
        seed: What a method that draws is seeded with; 0 for the others.
        auto: For the answer's account, what the question asks and the share of the tokens that it has; None where the
            budget is not "auto".
        num_parts: Parts of equal size, each selected by itself with an equal budget: the frames of a video whose budget
            is shared by them evenly; 1 for one selection of all tokens.
    """

    num_tokens: int
    num_kept: int
    guidance: list[int]
    excluded: Tensor | None = None
    positions: Tensor | None = None
    method: MethodName = "mmtok"
    seed: int = 0
    auto: dict[str, str] | None = None
    num_parts: int = 1

    @property
    def encoding(self) -> tuple[object, ...]:
        """What sets the image's features apart from those under other methods."""
        if self.method == "downsample":
            return ("downsample", self.num_kept)
        return ("attention",) if reads_attention(self.method) else ()

    def attach(self, item: Any) -> None:
        """Leaves the plan on SGLang's item, as plain values that its transport can carry."""
        # Not `asdict`, which copies the guidance.
        item.model_specific_data[_KEY] = {field.name: getattr(self, field.name) for field in fields(self)}


def plan_of(item: Any) -> ImagePlan | None:
    """Returns the plan of SGLang's item, None for one that is not pruned."""
    values = item.model_specific_data.get(_KEY)
    return None if values is None else ImagePlan(**values)


def joined_parts(kept: Sequence[Tensor], plan: ImagePlan) -> Tensor:
    """Returns the kept tokens of all parts of an image, [K] int64 of its N tokens.

    Args:
        kept: Those of each part, [k] int64 of its tokens.
        plan: The image's.
    """
    size = plan.num_tokens // plan.num_parts
    return kept[0] if len(kept) == 1 else torch.cat([each + part * size for part, each in enumerate(kept)])


def share_guidance(items: Sequence[Any]) -> None:
    """Has the images of a request hold equal guidance once: on the way to the scheduler each had its own."""
    known: dict[tuple[int, ...], list[int]] = {}
    for item in items:
        plan = item.model_specific_data.get(_KEY)
        if plan is not None:
            plan["guidance"] = known.setdefault(tuple(plan["guidance"]), plan["guidance"])


class PlaceholderCutter:
    """Plans and cuts every image of a request; one a tokenizer process."""

    def __init__(self, settings: Settings, family: Any) -> None:
        self._settings = settings
        self._family = family
        self._engine = None if settings.engine is None else Manifest.load(settings.engine)
        self._loader = ImageLoader(settings.limits)
        self._videos = family.video_loader(settings.limits, self._loader)
        self._words = _GuidanceTokenizer(settings)
        self._agent = None
        if settings.agent_url is not None:
            self._agent = Agent(
                settings.agent_url, settings.agent_model, settings.agent_timeout_ms, settings.flush_count
            )

    @property
    def agent(self) -> Agent | None:
        """The agent that is asked, None if none is."""
        return self._agent

    async def process_mm_data(
        self, original: Callable[..., Awaitable[Any]], processor: Any, image_data: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns SGLang's processed request with each pruned image's placeholders cut from N to K.

        Raises:
            ValueError: A bad budget, or an input that cannot be pruned (HTTP 400).
        """
        request = kwargs["request_obj"]
        videos = _videos_of(request)
        _refuse_our_names(image_data, videos, getattr(request, "audio_data", None))
        _refuse_no_images(image_data)
        asked = requested(getattr(request, "mm_processor_kwargs", None), self._settings)
        if not asked.changes_nothing:
            if videos:
                self._refuse_videos(request, videos, asked)
            _refuse_what_cannot_be_pruned(request, image_data, asked)
            self._refuse_scale(asked.encoder_scale)
        if not asked.budget.is_all:
            self._refuse_method(asked.method, processor.hf_config)
            self._refuse_auto(asked.budget)
        # SGLang hands an empty prompt on as None.
        prompt, max_prompt_tokens = kwargs["input_text"] or "", kwargs.get("max_req_input_len")
        texts = await self._check_prompt(image_data or [], processor, asked, prompt, request, max_prompt_tokens)
        images = image_data
        if image_data:
            images = await self._loader.load(image_data, getattr(processor, "server_args", None))
        if self._videos is not None and videos and all(map(self._videos.opens, videos)):
            kwargs["request_obj"] = copy.copy(request)
            kwargs["request_obj"].video_data = await self._videos.load(
                videos, processor, are_pruned=not asked.budget.is_all
            )
        if asked.encoder_scale < 1 or (asked.method == "downsample" and not asked.budget.is_all):
            images = await self._family.shrink_images(images, asked, self._settings, processor, request)
        output = await self._family.process(original, processor, images, *args, **kwargs)
        if output is None or not output.mm_items:
            return output
        for item in output.mm_items:
            _drop_our_names(item)
        if self._videos is not None:
            self._videos.check(output.mm_items, processor.hf_config)
        self._family.separate_images(output, processor)
        if processor.pixel_scale is not None:
            compact_items(output.mm_items, processor.pixel_scale)
        if not asked.budget.is_all:
            self._family.separate_videos(output)
            _refuse_scattered_placeholders(output.mm_items)
            output.mm_items.sort(key=lambda item: item.offsets[0])
            await self._plan_images(output.mm_items, texts, asked, processor, image_data)
            cut_placeholders(output)
        return output

    async def tokenize_one_request(self, original: Callable[..., Awaitable[Any]], manager: Any, obj: Any) -> Any:
        """Tokenises and processes a request as SGLang does; one with images and too long a text is refused before.

        Hooks: sglang 0.5.23 srt/managers/tokenizer_manager.py TokenizerManager._tokenize_one_request, which tokenises
        on the event loop: a second for each few MB. Can go when it does so in a thread, or refuses a text before.

        Raises:
            ValueError: A prompt that is too long, or guides and is too long (HTTP 400).
        """
        prompt = obj.text or obj.input_ids or ""
        if len(prompt) > _LONG_PROMPT and obj.contains_mm_input() and manager.mm_processor is not None:
            images = obj.image_data if isinstance(obj.image_data, list) else [obj.image_data]
            asked = requested(getattr(obj, "mm_processor_kwargs", None), self._settings)
            await self._check_prompt(images, manager.mm_processor, asked, prompt, obj, manager.max_req_input_len)
        return await original(manager, obj)

    async def _check_prompt(
        self,
        images: Sequence[Any],
        processor: Any,
        asked: Requested,
        prompt: str | Sequence[int],
        request: Any,
        max_prompt_tokens: int | None,
    ) -> list[str]:
        """Returns the guidance text of each image and video; checks what can be checked before an image is loaded.

        Raises:
            ValueError: Placeholders that are not those of images and videos, or too long a text (HTTP 400).
        """
        limits, videos = self._settings.limits, _videos_of(request)
        limits.check_num_images(len(images))
        if not all(map(is_raw, images)) or not (self._videos is None or all(map(self._videos.opens, videos))):
            return []
        unit = "characters" if isinstance(prompt, str) else "token ids"
        limits.check_prompt(len(prompt), unit, max_prompt_tokens)
        if not isinstance(prompt, str):
            prompt = await self._words.decode(prompt, _tokenizer_of(processor))
        if images or (videos and self._videos is not None):
            self._family.placeholder_rule.check(prompt, len(images), len(videos))
        if asked.budget.is_all:
            return []
        given = getattr(request, "mm_processor_kwargs", None)
        placeholders = [each for each in (self._family.placeholder, self._family.video_placeholder) if each is not None]
        found = partial(guidance_texts, given, prompt, len(images) + len(videos), *placeholders)
        # Some milliseconds for each MB, or seconds where it has a role's mark at every few letters.
        texts = await asyncio.to_thread(found) if len(prompt) > _LONG_PROMPT else found()
        if reads_question(asked.method) or isinstance(asked.budget, AutoBudget):
            limits.check_texts(texts)
        return texts

    async def _plan_images(
        self, items: Sequence[Any], texts: list[str], asked: Requested, processor: Any, image_data: Any
    ) -> None:
        """Leaves a plan on the item of each image that is to be pruned; `texts` are the questions about them."""
        limits, config = self._settings.limits, processor.hf_config
        if len(items) != len(texts):
            raise refusal("placeholders", f"the prompt has placeholders of {len(items)} images, {len(texts)} came")
        plans = [self._plan(item, text, asked, config) for item, text in zip(items, texts, strict=True)]
        if not reads_question(asked.method):
            texts = [""] * len(texts)
        words = await self._words.of(texts, _tokenizer_of(processor))
        limits.check_guidance([len(ids) for ids in words.values()])
        covers_text = coverage_of(asked.method) in ("multimodal", "text")
        if self._agent is not None and covers_text:
            texts = await self._agent.join(image_data, texts, [plan is not None for plan in plans])
            words = await self._words.of(texts, _tokenizer_of(processor))
        cost = 0
        for item, text, plan in zip(items, texts, plans, strict=True):
            if plan is not None:
                guided = replace(plan, guidance=words[text])
                self._check_engine(item, guided, config)
                cost += self._cost(item, guided, config)
                guided.attach(item)
        limits.check_cost(cost)

    def _cost(self, item: Any, plan: ImagePlan, config: Any) -> int:
        """Returns how many gains the selection of an image computes, of all its tiles."""
        if plan.method in ("random", "even", "downsample"):
            return 0
        from_tokens, keeps = self._selection_size(item, plan, config)
        num_selections: int = max(1, plan.num_kept // max(1, keeps))
        cost: int = num_selections * keeps * from_tokens * (len(plan.guidance) + from_tokens)
        return cost

    def _plan(self, item: Any, text: str, asked: Requested, config: Any) -> ImagePlan | None:
        """Returns an image's plan, its guidance aside; None for one that is not to be pruned."""
        ((start, end),) = item.offsets
        num_tokens = end - start + 1
        budget, auto = _chosen(asked.budget, text)
        num_kept = self._family.num_kept(item, num_tokens, budget, config)
        num_parts = self._family.num_frames(item) if asked.video_budget == "frame" else 1
        if num_parts > 1:
            num_kept = _shared_evenly(budget, num_tokens, num_parts)
        if num_tokens < self._settings.min_tokens_in:
            return None
        excluded = None
        if asked.method == "downsample":
            num_kept = self._family.shrink_item(item, num_tokens, num_kept, config)
        else:
            excluded = self._family.excluded(item)
        if num_kept == num_tokens:
            return None
        if excluded is not None:
            # Fewer tokens than the budget may be pickable; where none is, the budget stands and the scheduler
            # falls back to evenly spaced tokens.
            num_kept = min(num_kept, num_tokens - int(excluded.sum())) or num_kept
        return ImagePlan(
            *(num_tokens, num_kept, [], excluded),
            method=asked.method,
            seed=asked.seed,
            auto=auto,
            num_parts=num_parts,
        )

    def _selection_size(self, item: Any, plan: ImagePlan, config: Any) -> tuple[int, int]:
        """Returns N and K of each selection that an image or video is made of."""
        if plan.num_parts > 1:
            return plan.num_tokens // plan.num_parts, plan.num_kept // plan.num_parts
        size: tuple[int, int] = self._family.selection_size(item, plan.num_tokens, plan.num_kept, config)
        return size

    def _check_engine(self, item: Any, plan: ImagePlan, config: Any) -> None:
        if self._engine is not None:
            from_tokens, keeps = self._selection_size(item, plan, config)
            try:
                check_selection(self._engine, from_tokens, keeps, len(plan.guidance))
            except ValueError as error:
                raise refusal("engine", error) from None

    def _refuse_videos(self, request: Any, videos: Sequence[Any], asked: Requested) -> None:
        """Raises ValueError (HTTP 400) for videos that cannot be pruned, or not as asked for."""
        why = None
        if self._videos is None:
            why = "it prunes images alone of this model"
        elif isinstance(request, EmbeddingReqInput):
            why = "it prunes images alone of embedding requests"
        elif not all(map(self._videos.opens, videos)):
            why = "it prunes videos that come as files, not as frames or features"
        elif asked.encoder_scale < 1 or asked.method == "downsample":
            why = "mmtok_encoder_scale and the method downsample are for images"
        elif self._agent is not None:
            why = "the agent of --mmtok-agent-url is shown images alone"
        if why is not None:
            raise refusal(
                "video",
                f"this request brings a video, which MMTok does not prune ({why}): {_advice(request, asked)}",
            )

    def _refuse_method(self, method: MethodName, config: Any) -> None:
        obstacle = self._family.obstacle_to(method, config)
        if obstacle is not None:
            raise refusal("method", f"mm_processor_kwargs.mmtok_method {method} does not run on this model: {obstacle}")

    def _refuse_auto(self, budget: Budget | AutoBudget) -> None:
        if isinstance(budget, AutoBudget) and self._engine is not None and not self._engine.takes_budget:
            raise refusal(
                "engine",
                f"mm_processor_kwargs.mmtok_budget auto needs a selection of any number of tokens, this server's "
                f"exported file makes {self._engine.budget} picks always: ask for a share or a count",
            )

    def _refuse_scale(self, scale: float) -> None:
        obstacle = self._family.obstacle_to_scale
        if scale < 1 and obstacle is not None:
            raise refusal(
                "field", f"mm_processor_kwargs.mmtok_encoder_scale {scale:g} does not run on this model: {obstacle}"
            )


def _chosen(budget: Budget | AutoBudget, text: str) -> tuple[Budget, dict[str, str] | None]:
    """Returns the budget of an image, and why it is that if it was chosen for this text."""
    if isinstance(budget, Budget):
        return budget, None
    asked = what_is_asked(text)
    chosen = budget.of(asked)
    return chosen, {"asks": asked, "share": str(chosen)}


def cut_placeholders(output: Any) -> None:
    """Cuts the placeholders of every planned image in place, with all that is laid out by token.

    Text tokens, and decoding after them, keep the M-RoPE positions they have without pruning; the K placeholders that
    stay hold the place of tokens that are not chosen yet, so the N original positions go into the plan.
    """
    input_ids = torch.as_tensor(output.input_ids)
    stays = torch.ones(len(input_ids), dtype=torch.bool)
    for item in output.mm_items:
        plan = plan_of(item)
        if plan is None:
            continue
        ((start, end),) = item.offsets
        stays[start + plan.num_kept : end + 1] = False
        if output.mrope_positions is not None:
            item.model_specific_data[_KEY]["positions"] = output.mrope_positions[:, start : end + 1].clone()
    if stays.all():
        return
    # The new index of a token is the number of tokens that stay up to it, less one: right for first and last of each
    # span, since a cut span's last old index maps to its last placeholder that stays.
    new_index = stays.cumsum(0) - 1
    for item in output.mm_items:
        item.offsets = [(int(new_index[start]), int(new_index[end])) for start, end in item.offsets]
    output.input_ids = input_ids[stays].tolist()
    output.padded_input_ids = None
    if output.token_type_ids is not None:
        output.token_type_ids = torch.as_tensor(output.token_type_ids).flatten()[stays]
    if output.mrope_positions is not None:
        output.mrope_positions = output.mrope_positions[:, stays].contiguous()
        output.mrope_position_delta = output.mrope_position_delta + int((~stays).sum())


def _shared_evenly(budget: Budget, num_tokens: int, num_frames: int) -> int:
    """Returns how many of a video's tokens stay if each frame keeps as many.

    Raises:
        ValueError: A budget of less than a token a frame (HTTP 400).
    """
    if budget.tokens is not None and budget.tokens < num_frames:
        raise refusal(
            "video",
            f"a budget of {budget} tokens is less than one for each of the {num_frames} steps in time that a video has "
            "here, by which mmtok_video_budget frame shares it: ask for more, or for mmtok_video_budget video",
        )
    return num_frames * tokens_per_tile(budget, num_tokens // num_frames, num_frames, num_frames)


def _videos_of(request: Any) -> list[Any]:
    videos = getattr(request, "video_data", None) or []
    return videos if isinstance(videos, list) else [videos]


def _advice(request: Any, asked: Requested) -> str:
    if isinstance(request, EmbeddingReqInput):  # which has no such field
        return "embed it on a server without --mmtok-budget"
    unscaled = "" if asked.encoder_scale == 1 else ', "mmtok_encoder_scale": 1'
    return f'send mm_processor_kwargs={{"mmtok_budget": "all"{unscaled}}} to have it read unpruned'


def _refuse_what_cannot_be_pruned(request: Any, image_data: Any, asked: Requested) -> None:
    if any(isinstance(image, dict) for image in image_data or []):
        raise refusal(
            "features",
            "MMTok prunes raw images, this request brings precomputed embeddings or features: "
            f"{_advice(request, asked)}",
        )


def _refuse_no_images(image_data: Any) -> None:
    """Raises ValueError (HTTP 400) for what JSON may have in an image's place.

    SGLang may load an address from within it, which no limit would have seen.
    """
    for each in image_data or []:
        if isinstance(each, dict) and not BaseMultimodalProcessor._is_preprocessed_input(each):
            raise refusal(
                "image",
                f"an image is an address, a path or base64 text, got an object of {', '.join(map(str, each))}: send "
                'the text itself, "image_data": "https://..." and not {"url": "https://..."}',
            )
        if each is None or isinstance(each, list | tuple | bool | int | float):
            raise refusal(
                "image",
                f"an image is an address, a path or base64 text, got a {type(each).__name__}: send one list of images "
                "for a prompt, and a list of such lists for a list of prompts",
            )


def _refuse_our_names(*sources: Any) -> None:
    """Raises ValueError (HTTP 400) for input that brings what only the plugin writes: a plan could be another's."""
    for source in sources:
        for each in source if isinstance(source, list | tuple) else [source]:
            if not isinstance(each, dict):
                continue
            nested = each.get("model_specific_data")
            names = [*each, *(nested if isinstance(nested, dict) else ())]
            ours = sorted({name for name in names if isinstance(name, str) and name.startswith(_KEY)})
            if ours:
                raise refusal(
                    "features",
                    f"features that come ready-made have {', '.join(ours)}, which MMTok alone sets: leave it out",
                )


def _drop_our_names(item: Any) -> None:
    for name in [name for name in item.model_specific_data if str(name).startswith(_KEY)]:
        del item.model_specific_data[name]


def _refuse_scattered_placeholders(items: list[Any]) -> None:
    for item in items:
        if len(item.offsets or ()) != 1:
            raise refusal(
                "placeholders",
                f"each image has one run of placeholders in the prompt, one here has {len(item.offsets or ())}: "
                "write one placeholder for each image",
            )


class _GuidanceTokenizer:
    """Tokenises and decodes in a thread of its own, with a copy of the tokenizer: two threads cannot share one."""

    def __init__(self, settings: Settings) -> None:
        self._rule = settings.guidance
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mmtok-guidance")
        self._tokenizer: Any = None

    async def of(self, texts: Sequence[str], tokenizer: Any) -> dict[str, list[int]]:
        """Returns the token ids of each distinct text."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._tokenize, texts, tokenizer)

    async def decode(self, ids: Sequence[int], tokenizer: Any) -> str:
        """Returns the text of token ids.

        Raises:
            ValueError: They are none of the model's (HTTP 400).
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._decode, ids, tokenizer)

    def _tokenize(self, texts: Sequence[str], tokenizer: Any) -> dict[str, list[int]]:
        copied = self._copy(tokenizer)
        return {text: _token_ids(copied, guidance_words(text, self._rule)) for text in dict.fromkeys(texts)}

    def _decode(self, ids: Sequence[int], tokenizer: Any) -> str:
        try:
            text: str = self._copy(tokenizer).decode(ids)
            return text
        except (TypeError, ValueError, OverflowError) as error:
            raise refusal("placeholders", f"input_ids are token ids of the model: {error!s:.200}") from error

    def _copy(self, tokenizer: Any) -> Any:
        if self._tokenizer is None:
            self._tokenizer = copy.deepcopy(tokenizer)
        return self._tokenizer


def _tokenizer_of(processor: Any) -> Any:
    return getattr(processor._processor, "tokenizer", processor._processor)


def _token_ids(tokenizer: Any, words: list[str]) -> list[int]:
    if not words:
        return []
    # Word by word, without BOS, as the authors tokenise: "_encode_text_with_token_pooling" in their mmtok_core.py.
    return list(tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"])
