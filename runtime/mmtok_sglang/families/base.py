"""What a model family tells the plugin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import MethodName
from mmtok_sglang.account import account_hook, remembered_by
from mmtok_sglang.agent import Agent, refuse_chains
from mmtok_sglang.cache_key import CacheKeys, naming
from mmtok_sglang.entry_points import entry_point_hooks
from mmtok_sglang.failures import failures
from mmtok_sglang.feature_cache import FeatureCache
from mmtok_sglang.flush import flushing
from mmtok_sglang.hooks import Hook
from mmtok_sglang.invalidation import Invalidation
from mmtok_sglang.memory import reserving
from mmtok_sglang.metrics import SelectionMetrics
from mmtok_sglang.placeholders import PlaceholderCutter
from mmtok_sglang.request import add_chat_guidance
from mmtok_sglang.selection import TokenSelector
from mmtok_sglang.settings import Settings
from mmtok_sglang.stages import StageMetrics
from mmtok_sglang.typed_placeholders import PlaceholderRule

__all__ = ["Family"]


class Family(ABC):
    """A model family: where its placeholders stand, what its features are, how its positions run.

    The first three methods run in the tokenizer process on one request's images, the hooks of `model_hooks` in the
    scheduler process.
    """

    architecture: ClassVar[str]
    """The checkpoint's `architectures[0]`."""
    model_impl: ClassVar[Literal["sglang", "transformers"]]
    """Which of SGLang's implementations of the model is hooked."""
    placeholder: ClassVar[str]
    """What stands for one image in a prompt's text."""
    placeholder_rule: ClassVar[PlaceholderRule]
    """What the processor takes for an image in a prompt's text."""
    processor_hook: ClassVar[tuple[str, str]]
    """Target and parameters of the processor's `process_mm_data_async`."""

    async def process(
        self, original: Callable[..., Awaitable[Any]], processor: Any, images: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what SGLang's processor makes of a request, without keeping the event loop waiting."""
        return await original(processor, images, *args, **kwargs)

    def separate_images(self, output: Any, processor: Any) -> None:  # noqa: B027 - most processors have done it
        """Makes `output.mm_items` one item an image with one span of placeholders, where it is not so already.

        Args:
            output: SGLang's processor output, before the cut.
            processor: SGLang's processor, with the Hugging Face one in `_processor` and the model's `hf_config`.
        """

    def num_kept(self, item: Any, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns how many of an image's placeholders stay.

        Args:
            item: SGLang's item of the image.
            num_tokens: N, its placeholders; returned for an image that is to stay unpruned.
            budget: The request's budget.
            config: The model's Hugging Face configuration.
        """
        return budget.num_kept(num_tokens)

    def excluded(self, item: Any) -> Tensor | None:
        """Returns the [N] bool mask of an image's tokens that are never to be picked, None if there are none."""
        return None

    def obstacle(self, config: Any) -> str | None:
        """Returns why a model of this architecture cannot be pruned, None if it can."""
        return None

    def obstacle_to(self, method: MethodName, config: Any) -> str | None:
        """Returns why the model cannot run a method, None if it can."""
        if method == "visionzip":
            return "its vision encoder has no class token whose attention could be read"
        if method == "downsample":
            return "its vision encoder takes no smaller image"
        return None

    async def shrink_images(
        self, images: Sequence[Any], budget: Budget, settings: Settings, processor: Any, request: Any
    ) -> Sequence[Any]:
        """Returns the images for `downsample`, where the processor makes fewer tokens of smaller ones; else as given.

        Args:
            images: What SGLang can load: addresses, bytes, PIL images.
            budget: The request's budget, of the tokens of each image at its own size.
            settings: The server's.
            processor: SGLang's processor.
            request: SGLang's request.

        Raises:
            ValueError: A budget that the processor cannot be given (HTTP 400).
        """
        return images

    def shrink_item(self, item: Any, num_tokens: int, num_kept: int, config: Any) -> int:
        """Returns the tokens of an image after `downsample`; one that `shrink_images` has not made smaller is now.

        Args:
            item: SGLang's item of the image, after the processor.
            num_tokens: Its placeholders.
            num_kept: What the budget keeps of them.
            config: The model's Hugging Face configuration.
        """
        return num_tokens

    keys_dtype: ClassVar[torch.dtype | None] = None
    """Of the features before the projector, where it is not the model's."""

    @abstractmethod
    def vision_width(self, config: Any) -> int:
        """Returns D, the width of a vision token."""

    @abstractmethod
    def keys_width(self, config: Any) -> int:
        """Returns d, the width of a vision feature before the projector."""

    def num_selected_from(self, config: Any) -> int | None:
        """Returns N of every selection, None where images have different numbers of tokens."""
        return None

    def max_num_kept(self, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns the most tokens that a selection from `num_tokens` keeps."""
        return budget.num_kept(num_tokens)

    def selection_size(self, item: Any, num_tokens: int, num_kept: int, config: Any) -> tuple[int, int]:
        """Returns N and K of each selection that an image is made of."""
        return num_tokens, num_kept

    @abstractmethod
    def model_hooks(self, cache: FeatureCache, selector: TokenSelector, stages: StageMetrics) -> list[Hook]:
        """Returns the hooks on the family's model.

        Args:
            cache: Gives an image's features, encoded now or before.
            selector: Picks tokens from them.
            stages: Times calls of the vision encoder.
        """

    @classmethod
    def hooks(cls, settings: Settings) -> list[Hook]:
        """Returns every hook of a server of this family."""
        family = cls()
        target, parameters = cls.processor_hook
        metrics = SelectionMetrics()
        keys = CacheKeys(settings)
        cache = FeatureCache(settings.feature_cache_mb << 20, metrics)
        selector = TokenSelector(settings, metrics)
        stages = StageMetrics()
        cutter = PlaceholderCutter(settings, family)
        return [
            Hook(
                "entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
                "self request raw_request",
                add_chat_guidance if cutter.agent is None else refuse_chains(add_chat_guidance),
            ),
            Hook(target, parameters, naming(cutter.process_mm_data, settings)),
            *_agent_hooks(cutter.agent),
            *entry_point_hooks(),
            Hook(
                "managers.schedule_batch.MultimodalInputs.from_processor_output",
                "obj requires_mm_token_modalities",
                keys.from_processor_output,
            ),
            *Invalidation(keys, cache, selector).hooks(),
            reserving(settings.feature_cache_mb << 20, metrics),
            Hook("managers.scheduler.Scheduler.flush_cache", "self empty_cache", flushing(cache, selector)),
            Hook("managers.scheduler.Scheduler.init_model_worker", "self", selector.init_model_worker),
            account_hook(remembered_by(selector)),
            *failures().hooks(),
            *(failures().guarding(hook) for hook in stages.hooks()),
            *(failures().guarding(hook) for hook in family.model_hooks(cache, selector, stages)),
        ]


def _agent_hooks(agent: Agent | None) -> list[Hook]:
    if agent is None:
        return []
    target = "multimodal.processors.base_processor.BaseMultimodalProcessor.clear_preprocess_cache"
    return [Hook(target, "self", agent.clearing)]
