"""Cutting an image's placeholders to its budget, in the tokenizer process, before anything counts tokens."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from sglang.srt.managers.io_struct import EmbeddingReqInput

from mmtok_deploy.auto_budget import AutoBudget
from mmtok_deploy.budget import Budget
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.methods import IMAGE_METHODS, needs_frames, reads_question
from mmtok_sglang.agent import Agent
from mmtok_sglang.cut import cut_placeholders
from mmtok_sglang.guidance_tokenizer import GuidanceTokenizer, tokenizer_of
from mmtok_sglang.images import ImageLoader, is_raw
from mmtok_sglang.pixels import compact_items
from mmtok_sglang.planner import ImagePlanner
from mmtok_sglang.refusals import refusal
from mmtok_sglang.request import Requested, guidance_texts, requested
from mmtok_sglang.request_checks import (
    advice,
    drop_our_names,
    refuse_features,
    refuse_no_media,
    refuse_our_names,
    refuse_scattered_placeholders,
    videos_of,
)
from mmtok_sglang.settings import Settings

__all__ = ["PlaceholderCutter"]

# Letters or token ids from which on a prompt is looked at before SGLang tokenises it: a shorter one takes it some
# milliseconds, and is looked at once.
_LONG_PROMPT = 1 << 16


class PlaceholderCutter:
    """Plans and cuts every image of a request; one a tokenizer process."""

    def __init__(self, settings: Settings, family: Any) -> None:
        self._settings = settings
        self._family = family
        self._engine = None if settings.engine is None else Manifest.load(settings.engine)
        self._loader = ImageLoader(settings.limits)
        self._videos = family.video_loader(settings.limits, self._loader)
        self._words = GuidanceTokenizer(settings)
        self._planner = ImagePlanner(settings, family, self._engine, self._words)

    @property
    def agent(self) -> Agent | None:
        """The agent that is asked, None if none is."""
        return self._planner.agent

    async def process_mm_data(
        self, original: Callable[..., Awaitable[Any]], processor: Any, image_data: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns SGLang's processed request with each pruned image's placeholders cut from N to K.

        Raises:
            ValueError: A bad budget, or an input that cannot be pruned (HTTP 400).
        """
        request = kwargs["request_obj"]
        videos = videos_of(request)
        refuse_our_names(image_data, videos, getattr(request, "audio_data", None))
        refuse_no_media("image", image_data)
        refuse_no_media("video", videos)
        asked = requested(getattr(request, "mm_processor_kwargs", None), self._settings)
        if not asked.changes_nothing:
            if videos:
                self._refuse_videos(request, videos, asked)
            refuse_features(request, image_data, asked)
            self._refuse_scale(asked.encoder_scale)
            self._refuse_skipping(asked.skip_repeats)
        if not asked.budget.is_all:
            self._refuse_method(asked, processor.hf_config, has_images=bool(image_data))
            self._refuse_auto(asked.budget)
        # SGLang hands an empty prompt on as None.
        prompt, max_prompt_tokens = kwargs["input_text"] or "", kwargs.get("max_req_input_len")
        texts = await self._check_prompt(image_data or [], processor, asked, prompt, request, max_prompt_tokens)
        images = loaded = image_data
        if image_data:
            images = loaded = await self._loader.load(image_data, getattr(processor, "server_args", None))
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
            drop_our_names(item)
        if self._videos is not None:
            self._videos.check(output.mm_items, processor.hf_config)
        self._family.separate_images(output, processor)
        if processor.pixel_scale is not None:
            await asyncio.to_thread(compact_items, output.mm_items, processor.pixel_scale)
        if asked.prunes_images:
            self._family.separate_videos(output)
            refuse_scattered_placeholders(output.mm_items, self._family.num_runs)
            output.mm_items.sort(key=lambda item: item.offsets[0])
            await self._planner.plan_images(output, texts, asked, processor, image_data, loaded)
            await asyncio.to_thread(cut_placeholders, output)
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
        limits, videos = self._settings.limits, videos_of(request)
        limits.check_num_images(len(images))
        if not all(map(is_raw, images)) or not (self._videos is None or all(map(self._videos.opens, videos))):
            return []
        unit = "characters" if isinstance(prompt, str) else "token ids"
        limits.check_prompt(len(prompt), unit, max_prompt_tokens)
        if not isinstance(prompt, str):
            prompt = await self._words.decode(prompt, tokenizer_of(processor))
        if images or (videos and self._videos is not None):
            self._family.placeholder_rule.check(prompt, len(images), len(videos))
        if asked.budget.is_all:
            return [""] * (len(images) + len(videos))
        given = getattr(request, "mm_processor_kwargs", None)
        placeholders = [each for each in (self._family.placeholder, self._family.video_placeholder) if each is not None]
        found = partial(guidance_texts, given, prompt, len(images) + len(videos), *placeholders)
        # Some milliseconds for each MB, or seconds where it has a role's mark at every few letters.
        texts = await asyncio.to_thread(found) if len(prompt) > _LONG_PROMPT else found()
        if reads_question(asked.method) or isinstance(asked.budget, AutoBudget):
            limits.check_texts(texts)
        return texts

    def _refuse_videos(self, request: Any, videos: Sequence[Any], asked: Requested) -> None:
        """Raises ValueError (HTTP 400) for videos that cannot be pruned, or not as asked for."""
        why = None
        if self._videos is None:
            why = self._family.obstacle_to_videos
        elif isinstance(request, EmbeddingReqInput):
            why = "it prunes images alone of embedding requests"
        elif not all(map(self._videos.opens, videos)):
            why = "it prunes videos that come as files, not as frames or features"
        elif asked.encoder_scale < 1 or asked.method == "downsample":
            why = "mmtok_encoder_scale and the method downsample are for images"
        elif asked.budget.is_all:
            why = "mmtok_skip_repeats without a budget is for images"
        elif self.agent is not None:
            why = "the agent of --mmtok-agent-url is shown images alone"
        if why is not None:
            raise refusal(
                "video",
                f"this request brings a video, which MMTok does not prune ({why}): {advice(request, asked)}",
            )

    def _refuse_method(self, asked: Requested, config: Any, *, has_images: bool) -> None:
        method = asked.method
        obstacle = self._family.obstacle_to(method, config)
        if obstacle is not None:
            raise refusal("method", f"mm_processor_kwargs.mmtok_method {method} does not run on this model: {obstacle}")
        if needs_frames(method) and has_images:
            raise refusal(
                "method",
                f"mm_processor_kwargs.mmtok_method {method} goes by the frames of a video, and this request brings an "
                f"image: ask for one of {', '.join(IMAGE_METHODS)}",
            )

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

    def _refuse_skipping(self, max_difference: int) -> None:
        obstacle = self._family.obstacle_to_skipping
        if max_difference >= 0 and obstacle is not None:
            raise refusal(
                "field",
                f"mm_processor_kwargs.mmtok_skip_repeats {max_difference} does not run on this model: {obstacle}",
            )
