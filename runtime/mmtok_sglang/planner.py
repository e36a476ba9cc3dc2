"""Planning what each image and video of a processed request keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from sglang.srt.utils import ImageData

from mmtok_deploy.auto_budget import AutoBudget, what_is_asked
from mmtok_deploy.budget import Budget, tokens_per_tile
from mmtok_deploy.executors import check_selection
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.methods import MethodName, coverage_of, needs_frames, reads_question
from mmtok_deploy.repeated_tokens import share_of_distinct
from mmtok_sglang.agent import Agent
from mmtok_sglang.guidance_tokenizer import GuidanceTokenizer, tokenizer_of
from mmtok_sglang.metrics import collectors, never_raises
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.refusals import refusal
from mmtok_sglang.request import Requested
from mmtok_sglang.settings import Settings
from mmtok_sglang.stages import image_stage

__all__ = ["ImagePlanner"]


class ImagePlanner:
    """Plans the images of requests; one a tokenizer process.

    Args:
        settings: The server's.
        family: The model's family.
        engine: The exported file that selects, None if none does.
        words: Tokenises guidance.
    """

    def __init__(self, settings: Settings, family: Any, engine: Manifest | None, words: GuidanceTokenizer) -> None:
        self._settings = settings
        self._family = family
        self._engine = engine
        self._words = words
        self.agent: Agent | None = None
        """The agent that is asked, None if none is."""
        if settings.agent_url is not None:
            self.agent = Agent(
                settings.agent_url, settings.agent_model, settings.agent_timeout_ms, settings.flush_count
            )

    async def plan_images(
        self, output: Any, texts: list[str], asked: Requested, processor: Any, image_data: Any, images: Any
    ) -> None:
        """Leaves a plan on the item of each image that is to be pruned.

        Args:
            output: SGLang's processor output, with its items in the order of the prompt.
            texts: The questions about them.
            asked: How they are to be pruned.
            processor: SGLang's.
            image_data: The images as they came, for the agent.
            images: As `ImageLoader` has loaded them, in the order of the prompt, for the budget auto.

        Raises:
            ValueError: A budget that is not possible (HTTP 400).
        """
        items, limits, config = output.mm_items, self._settings.limits, processor.hf_config
        if len(items) != len(texts):
            raise refusal("placeholders", f"the prompt has placeholders of {len(items)} images, {len(texts)} came")
        left = iter(images or ())
        pictures = [next(left, None) if item.is_image() else None for item in items]
        # In a thread: `downsample` scales the pixels of a LLaVA, and `auto` decodes a picture: 5 to 300 ms each.
        plans = await asyncio.to_thread(
            lambda: [self.plan(*each, asked, processor) for each in zip(items, texts, pictures, strict=True)]
        )
        if not reads_question(asked.method):
            texts = [""] * len(texts)
        words = await self._words.of(texts, tokenizer_of(processor))
        limits.check_guidance([len(ids) for ids in words.values()])
        covers_text = coverage_of(asked.method) in ("multimodal", "text")
        if self.agent is not None and covers_text:
            guided_ones = [plan is not None and reads_question(plan.method) for plan in plans]
            texts = await self.agent.join(image_data, texts, guided_ones)
            words = await self._words.of(texts, tokenizer_of(processor))
        cost = 0
        for item, text, plan in zip(items, texts, plans, strict=True):
            if plan is not None:
                guidance = words[text] if reads_question(plan.method) else []
                guided = replace(plan, guidance=guidance, between=_text_between(item.offsets, output.input_ids))
                self._check_engine(item, guided, config)
                cost += self._cost(item, guided, config)
                guided.attach(item)
        limits.check_cost(cost)

    def _cost(self, item: Any, plan: ImagePlan, config: Any) -> int:
        """Returns how many gains the selection of an image computes, of all its tiles."""
        if plan.method in ("random", "even", "downsample", "evs", "frames"):
            return 0
        from_tokens, keeps = self._selection_size(item, plan, config)
        num_selections: int = max(1, plan.num_kept // max(1, keeps))
        cost: int = num_selections * keeps * from_tokens * (len(plan.guidance) + from_tokens)
        return cost

    def plan(self, item: Any, text: str, picture: Any, asked: Requested, processor: Any) -> ImagePlan | None:
        """Returns an image's plan, its guidance aside; None for one that is not to be pruned.

        Args:
            item: SGLang's item of the image or video.
            text: The question about it.
            picture: The image as `ImageLoader` has loaded it, None for a video.
            asked: How it is to be pruned.
            processor: SGLang's.
        """
        config = processor.hf_config
        num_tokens = sum(end - start + 1 for start, end in item.offsets)
        if num_tokens < self._settings.min_tokens_in:
            return None
        budget, auto = self._chosen(asked.budget, text, picture, num_tokens, processor)
        num_kept = self._family.num_kept(item, num_tokens, budget, config)
        num_frames = self._family.num_frames(item)
        num_parts = num_frames if asked.video_budget == "frame" else 1
        if num_parts > 1:
            num_kept = _shared_evenly(budget, num_tokens, num_parts)
        excluded = encoded = None
        if asked.method == "downsample":
            num_kept = self._family.shrink_item(item, num_tokens, num_kept, config)
        else:
            excluded = self._family.excluded(item)
            if asked.skip_repeats >= 0 and item.is_image():
                encoded = self._family.encoded(item, asked.skip_repeats, config)
        if num_kept == num_tokens and encoded is None:
            return None
        if needs_frames(asked.method):
            _check_frames(asked.method, num_tokens, num_kept, num_frames)
        if excluded is not None:
            # Fewer tokens than the budget may be pickable; where none is, the budget stands and the scheduler
            # falls back to evenly spaced tokens.
            num_kept = min(num_kept, num_tokens - int(excluded.sum())) or num_kept
        plan = ImagePlan(
            *(num_tokens, num_kept, [], excluded),
            method=asked.method,
            seed=asked.seed,
            auto=auto,
            num_parts=num_parts,
            num_frames=num_frames,
            keys=asked.keys,
        )
        if encoded is None:
            return plan
        _count_skipped(num_tokens - len(encoded))
        plan = replace(plan, num_kept=min(num_kept, len(encoded)), encoded=encoded)
        # Where all that is encoded is kept, questions share it in the prefix cache.
        return replace(plan, method="even", seed=0, keys="input") if plan.num_kept == len(encoded) else plan

    def _chosen(
        self, budget: Budget | AutoBudget, text: str, picture: Any, num_tokens: int, processor: Any
    ) -> tuple[Budget, dict[str, str | None] | None]:
        """Returns the budget of an image, and why it is that if it was chosen for this image and text."""
        if isinstance(budget, Budget):
            return budget, None
        asked = what_is_asked(text)
        distinct = None if picture is None else self._share_of_distinct(picture, num_tokens, processor)
        chosen = budget.of(asked, Fraction(1) if distinct is None else distinct)
        told = None if distinct is None else f"{100 * distinct}%"
        return chosen, {"asks": asked, "distinct": told, "share": str(chosen)}

    def _share_of_distinct(self, picture: Any, num_tokens: int, processor: Any) -> Fraction | None:
        """Returns the share of an image that repeats nothing beside it.

        None for an image of tiles with equal budgets: one of them may have all that is not blank.
        """
        if self._family.obstacle_to_sharing is None and not self._settings.share_tiles:
            return None
        source = picture.url if isinstance(picture, ImageData) else picture
        try:
            with image_stage("decode"):
                return share_of_distinct(source, num_tokens, partial(self._family.box_seen, processor))
        except Exception as error:  # each of Pillow's formats has errors of its own
            raise refusal("image", f"an image cannot be decoded: {error!s:.300}") from error

    def _selection_size(self, item: Any, plan: ImagePlan, config: Any) -> tuple[int, int]:
        """Returns N and K of each selection that an image or video is made of."""
        if plan.num_parts > 1:
            return plan.num_tokens // plan.num_parts, plan.num_kept // plan.num_parts
        size: tuple[int, int] = self._family.selection_size(item, plan.num_encoded, plan.num_kept, config)
        return size

    def _check_engine(self, item: Any, plan: ImagePlan, config: Any) -> None:
        # Where all that is encoded is kept, the file selects nothing.
        if self._engine is not None and plan.method == self._settings.executor_method:
            from_tokens, keeps = self._selection_size(item, plan, config)
            try:
                check_selection(self._engine, from_tokens, keeps, len(plan.guidance))
            except ValueError as error:
                raise refusal("engine", error) from None


@never_raises
def _count_skipped(num_tokens: int) -> None:
    collectors()["skipped_tokens"].inc(num_tokens)


def _text_between(runs: Sequence[tuple[int, int]], input_ids: Any) -> list[list[int]]:
    """Returns the token ids between the runs of placeholders of one item, a list for each two.

    Raises:
        ValueError: The runs differ in length (HTTP 400).
    """
    if len({end - start for start, end in runs}) > 1:
        raise refusal("placeholders", "each step in time of a video has as many placeholders, one here has fewer")
    return [torch.as_tensor(input_ids[end + 1 : start]).tolist() for (_, end), (start, _) in pairwise(runs)]


def _check_frames(method: MethodName, num_tokens: int, num_kept: int, num_frames: int) -> None:
    """Raises ValueError (HTTP 400) for a video that a method which goes by frames cannot choose tokens of."""
    if num_frames < 2:
        raise refusal(
            "video", f"mmtok_method {method} goes by the steps in time of a video, one here has a single one: send more"
        )
    if method == "evs" and num_kept < num_tokens // num_frames:
        raise refusal(
            "video",
            f"mmtok_method evs keeps the first step in time of a video whole, {num_tokens // num_frames} tokens here, "
            f"and the budget is {num_kept}: ask for more, or for another method",
        )


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
