"""What a model family tells the plugin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok_deploy.backends.triton_plan import MAX_TOKENS, FeatureTypes
from mmtok_deploy.budget import Budget
from mmtok_deploy.config import KeySource
from mmtok_deploy.methods import MethodName
from mmtok_deploy.repeated_tokens import WHOLE, Box
from mmtok_sglang.images import ImageLoader
from mmtok_sglang.limits import Limits
from mmtok_sglang.model import PrunedModel
from mmtok_sglang.processor import PrunedProcessor
from mmtok_sglang.request import Requested
from mmtok_sglang.selection import ExpectedFeatures
from mmtok_sglang.settings import Settings
from mmtok_sglang.typed_placeholders import PlaceholderRule

__all__ = ["Family"]


class Family(ABC):
    """A model family: its classes, where its placeholders stand, how wide its features are, what it cannot do.

    Its methods run in the tokenizer process, on one request's images, and at the start of every process.
    """

    model_class: ClassVar[type[PrunedModel]]
    """What SGLang makes the model of; it has the name of the checkpoint's `architectures[0]`."""
    processor_class: ClassVar[type[PrunedProcessor]]
    """What SGLang makes the multimodal processor of."""
    placeholder: ClassVar[str]
    """What stands for one image in a prompt's text."""
    video_placeholder: ClassVar[str | None] = None
    """What stands for one video in a prompt's text; None where videos are not pruned."""
    obstacle_to_videos: ClassVar[str] = "it prunes images alone of this model"
    """Why videos are not pruned, where they are not."""
    placeholder_rule: ClassVar[PlaceholderRule]
    """What the processor takes for an image in a prompt's text."""
    keys_dtype: ClassVar[torch.dtype | None] = None
    """The dtype of the features before the projector, where it is not the model's."""
    max_pixels_on_cpu: ClassVar[int | None] = None
    """The most pixels of an image on a CPU by default, where the encoder's memory bounds them."""
    obstacle_to_scale: ClassVar[str | None] = "its vision encoder reads images of one size, however small they are sent"
    """Why images cannot be scaled by `--mmtok-encoder-scale`, None if they can."""
    obstacle_to_skipping: ClassVar[str | None] = "its vision encoder reads whole images or tiles alone"
    """Why repeated patches cannot be left out by `--mmtok-skip-repeats`, None if they can."""
    obstacle_to_sharing: ClassVar[str | None] = "its images are read in one piece, which has all of the budget already"
    """Why the tiles of an image cannot share its budget by `--mmtok-share-tiles`, None if they can."""
    speculative_algorithms: ClassVar[tuple[str, ...]] = ("NGRAM",)
    """Algorithms of `--speculative-algorithm` whose answers were compared with the hand-pruned model's."""
    drafts_are_chains: ClassVar[bool] = False
    """Whether drafts of a draft model were compared as chains alone (`--speculative-eagle-topk 1`)."""
    replays_prefills: ClassVar[bool] = False
    """Whether its prefills may be replayed as CUDA graphs: answers were then compared with the hand-pruned model's."""
    embeds: ClassVar[bool] = True
    """Whether SGLang's class of the model answers embedding requests."""

    def configured(self, settings: Settings) -> Family:
        """Returns the family as it is in a server with these settings."""
        return self

    @property
    def architecture(self) -> str:
        """The checkpoint's `architectures[0]`."""
        return self.model_class.__name__

    async def process(
        self, original: Callable[..., Awaitable[Any]], processor: Any, images: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what SGLang's processor makes of a request, without keeping the event loop waiting."""
        return await original(processor, images, *args, **kwargs)

    def video_loader(self, limits: Limits, images: ImageLoader) -> Any:
        """Returns what opens a request's videos (`videos.VideoLoader`), None where they are not pruned.

        Args:
            limits: What a request is refused for.
            images: Downloads files.
        """
        return None

    def separate_images(self, output: Any, processor: Any) -> None:  # noqa: B027 - most processors have done it
        """Makes `output.mm_items` one item an image with one span of placeholders, where it is not so already.

        Args:
            output: SGLang's processor output, before the cut.
            processor: SGLang's processor, with the Hugging Face one in `_processor` and the model's `hf_config`.
        """

    def separate_videos(self, output: Any) -> None:  # noqa: B027 - most processors have done it
        """Makes `output.mm_items` one item a video, of a request whose videos are pruned."""

    def num_kept(self, item: Any, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns how many of an image's placeholders stay.

        Args:
            item: SGLang's item of the image.
            num_tokens: N, its placeholders; returned for an image that is to stay unpruned.
            budget: The request's budget.
            config: The model's Hugging Face configuration.
        """
        return budget.num_kept(num_tokens)

    def num_frames(self, item: Any) -> int:
        """Returns the steps in time that a video's tokens are of, as many of each; 1 for an image."""
        return 1

    def num_runs(self, item: Any) -> int:
        """Returns the runs of placeholders that an image or video has in the prompt, equal in length."""
        return 1

    def box_seen(self, processor: Any, width: int, height: int) -> Box:
        """Returns the part of an image that the model sees.

        Args:
            processor: SGLang's processor.
            width: The image's, in pixels, before the processor.
            height: The same.
        """
        return WHOLE

    def excluded(self, item: Any) -> Tensor | None:
        """Returns the [N] bool mask of an image's tokens that are never to be picked, None if there are none."""
        return None

    def encoded(self, item: Any, max_difference: int, config: Any) -> Tensor | None:
        """Returns the [M] int64 tokens of an image that do not repeat a neighbour, None if none does.

        Args:
            item: SGLang's item of the image, with 8-bit pixels.
            max_difference: By which two pixels may differ, 0 to 255.
            config: The model's Hugging Face configuration.
        """
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

    def obstacle_to_stages(self, num_stages: int, config: Any) -> str | None:
        """Returns why a pipeline of that many stages would lose a part of an image, None if it does not."""
        return None

    async def shrink_images(
        self, images: Sequence[Any], asked: Requested, settings: Settings, processor: Any, request: Any
    ) -> Sequence[Any]:
        """Returns the images at the encoder scale, or for `downsample` at that of the budget.

        As given where the processor makes no fewer tokens of a smaller image.

        Args:
            images: What SGLang can load: addresses, bytes, PIL images.
            asked: How the request is to be pruned. For `downsample` the budget is of the tokens of each image at its
                own size.
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

    @abstractmethod
    def vision_width(self, config: Any) -> int:
        """Returns D, the width of a vision token."""

    @abstractmethod
    def keys_width(self, config: Any) -> int:
        """Returns d, the width of a vision feature before the projector."""

    def num_selected_from(self, config: Any) -> int | None:
        """Returns N of every selection, None where images have different numbers of tokens."""
        return None

    def feature_types(self, config: Any, dtype: torch.dtype, keys: KeySource = "input") -> FeatureTypes:
        """Returns the dtypes and widths of what tokens are selected from, for a model of that dtype.

        Args:
            config: The model's Hugging Face configuration.
            dtype: What it is served in.
            keys: The side of the projector that keys are taken from.
        """
        vision_width = self.vision_width(config)
        if keys == "output":
            return FeatureTypes(dtype, dtype, vision_width, vision_width)
        return FeatureTypes(dtype, self.keys_dtype or dtype, vision_width, self.keys_width(config))

    def expected_features(self, config: Any, dtype: torch.dtype, keys: KeySource = "input") -> ExpectedFeatures:
        """Returns what tokens are selected from; arguments as of `feature_types`."""
        types = self.feature_types(config, dtype, keys)
        num_tokens = self.num_selected_from(config)
        return ExpectedFeatures(types, (1, MAX_TOKENS) if num_tokens is None else (num_tokens, num_tokens))

    def max_num_kept(self, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns the most tokens that a selection from `num_tokens` keeps."""
        return budget.num_kept(num_tokens)

    def selection_size(self, item: Any, num_tokens: int, num_kept: int, config: Any) -> tuple[int, int]:
        """Returns N and K of each selection that an image is made of."""
        return num_tokens, num_kept
