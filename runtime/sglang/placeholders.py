"""Cutting an image's placeholders to its budget, in the tokenizer process, before anything counts tokens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from sglang.srt.managers.io_struct import EmbeddingReqInput
from torch import Tensor

from mmtok_deploy.guidance import guidance_words
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.methods import MethodName, coverage_of, reads_question
from mmtok_deploy.runtime.executors import check_selection
from mmtok_deploy.runtime.sglang.agent import Agent
from mmtok_deploy.runtime.sglang.refusals import refusal
from mmtok_deploy.runtime.sglang.request import Requested, guidance_texts, requested
from mmtok_deploy.runtime.sglang.settings import Settings

__all__ = ["ImagePlan", "PlaceholderCutter", "plan_of"]

_KEY = "mmtok"


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
        seed: Of a method that draws; 0 for the others.
    """

    num_tokens: int
    num_kept: int
    guidance: list[int]
    excluded: Tensor | None = None
    positions: Tensor | None = None
    method: MethodName = "mmtok"
    seed: int = 0

    @property
    def encoding(self) -> tuple[object, ...]:
        """What sets the image's features apart from those under other methods."""
        if self.method == "downsample":
            return ("downsample", self.num_kept)
        return ("attention",) if self.method == "visionzip" else ()

    def attach(self, item: Any) -> None:
        """Leaves the plan on SGLang's item, as plain values that its transport can carry."""
        item.model_specific_data[_KEY] = asdict(self)


def plan_of(item: Any) -> ImagePlan | None:
    """Returns the plan of SGLang's item, None for one that is not pruned."""
    values = item.model_specific_data.get(_KEY)
    return None if values is None else ImagePlan(**values)


class PlaceholderCutter:
    """Plans and cuts every image of a request; one a tokenizer process."""

    def __init__(self, settings: Settings, family: Any) -> None:
        self._settings = settings
        self._family = family
        self._engine = None if settings.engine is None else Manifest.load(settings.engine)
        self._agent = None
        if settings.agent_url is not None:
            self._agent = Agent(settings.agent_url, settings.agent_model, settings.agent_timeout_ms)

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

        Hooks: sglang 0.5.23 srt/multimodal/processors, `process_mm_data_async`: before the context length is
        checked, and what both of Qwen's paths return through. Can go when processors have a post-processing stage.
        """
        request = kwargs["request_obj"]
        asked = requested(getattr(request, "mm_processor_kwargs", None), self._settings)
        images = image_data
        if not asked.budget.is_all:
            _refuse_what_cannot_be_pruned(request, image_data)
            self._refuse_method(asked.method, processor.hf_config)
            if asked.method == "downsample":
                images = await self._family.shrink_images(image_data, asked.budget, self._settings, processor, request)
        output = await original(processor, images, *args, **kwargs)
        if output is None or not output.mm_items:
            return output
        self._family.separate_images(output, processor)
        if not asked.budget.is_all:
            _refuse_scattered_placeholders(output.mm_items)
            output.mm_items.sort(key=lambda item: item.offsets[0])
            await self._plan_images(output.mm_items, asked, processor, image_data, **kwargs)
            cut_placeholders(output)
        return output

    async def _plan_images(
        self, items: Sequence[Any], asked: Requested, processor: Any, image_data: Any, **kwargs: Any
    ) -> None:
        """Leaves a plan on the item of each image that is to be pruned."""
        tokenizer = getattr(processor._processor, "tokenizer", processor._processor)
        fields, prompt = getattr(kwargs["request_obj"], "mm_processor_kwargs", None), kwargs["input_text"]
        texts = guidance_texts(fields, prompt, len(items), self._family.placeholder, tokenizer.decode)
        if not reads_question(asked.method):
            texts = [""] * len(items)
        # Images of one turn share their text, and tokenising keeps every other request waiting.
        words_of = cache(partial(self._guidance, tokenizer))
        num_words = sum(len(words_of(text)) for text in dict.fromkeys(texts))
        _refuse_endless_guidance(num_words, kwargs.get("max_req_input_len"))
        plans = [self._plan(item, asked, processor.hf_config) for item in items]
        covers_text = coverage_of(asked.method, self._settings.config) in ("multimodal", "text")
        if self._agent is not None and covers_text:
            texts = await self._agent.join(image_data, texts, [plan is not None for plan in plans])
        for item, text, plan in zip(items, texts, plans, strict=True):
            if plan is not None:
                guided = replace(plan, guidance=words_of(text))
                self._check_engine(item, guided, processor.hf_config)
                guided.attach(item)

    def _plan(self, item: Any, asked: Requested, config: Any) -> ImagePlan | None:
        """Returns an image's plan, its guidance aside; None for one that is not to be pruned."""
        ((start, end),) = item.offsets
        num_tokens = end - start + 1
        num_kept = self._family.num_kept(item, num_tokens, asked.budget, config)
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
        return ImagePlan(num_tokens, num_kept, [], excluded, method=asked.method, seed=asked.seed)

    def _guidance(self, tokenizer: Any, text: str) -> list[int]:
        return _token_ids(tokenizer, guidance_words(text, self._settings.guidance))

    def _check_engine(self, item: Any, plan: ImagePlan, config: Any) -> None:
        if self._engine is not None:
            from_tokens, keeps = self._family.selection_size(item, plan.num_tokens, plan.num_kept, config)
            try:
                check_selection(self._engine, from_tokens, keeps, len(plan.guidance))
            except ValueError as error:
                raise refusal("engine", error) from None

    def _refuse_method(self, method: MethodName, config: Any) -> None:
        obstacle = self._family.obstacle_to(method, config)
        if obstacle is not None:
            raise refusal("method", f"mm_processor_kwargs.mmtok_method {method} does not run on this model: {obstacle}")


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


def _refuse_what_cannot_be_pruned(request: Any, image_data: Any) -> None:
    advice = 'send mm_processor_kwargs={"mmtok_budget": "all"} to have it read unpruned'
    if isinstance(request, EmbeddingReqInput):  # which has no such field
        advice = "embed it on a server without --mmtok-budget"
    if getattr(request, "video_data", None):
        raise refusal("video", f"MMTok prunes images, this request brings a video: {advice}")
    objects = [image for image in image_data or [] if isinstance(image, dict)]
    if any(not {"format", "feature"} & set(image) for image in objects):
        raise refusal(
            "image",
            f"an image is an address, a path or base64 text, got an object of {', '.join(map(str, objects[0]))}: send "
            'the text itself, "image_data": "https://..." and not {"url": "https://..."}',
        )
    if objects:
        raise refusal(
            "features", f"MMTok prunes raw images, this request brings precomputed embeddings or features: {advice}"
        )


def _refuse_endless_guidance(num_tokens: int, max_prompt_tokens: int | None) -> None:
    # A question is bounded by the prompt that it stands in, `mmtok_guidance` by nothing, and its embeddings would take
    # the scheduler's memory. Words on their own may take more tokens than in their text, but not four times as many.
    if max_prompt_tokens is not None and num_tokens > 4 * max_prompt_tokens:
        raise refusal(
            "guidance",
            f"the guidance of the images has {num_tokens} tokens, more than any prompt of this server "
            f"({max_prompt_tokens}): shorten mm_processor_kwargs.mmtok_guidance",
        )


def _refuse_scattered_placeholders(items: list[Any]) -> None:
    for item in items:
        if len(item.offsets or ()) != 1:
            raise refusal(
                "placeholders",
                f"each image has one run of placeholders in the prompt, one here has {len(item.offsets or ())}: "
                "write one placeholder for each image",
            )


def _token_ids(tokenizer: Any, words: list[str]) -> list[int]:
    if not words:
        return []
    # Word by word, without BOS, as the authors tokenise: "_encode_text_with_token_pooling" in their mmtok_core.py.
    return list(tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"])
