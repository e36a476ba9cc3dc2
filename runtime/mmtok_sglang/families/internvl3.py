"""InternVL3 and InternVL3.5 on SGLang's own implementation: one selection from all tiles of an image.

An image is one or up to 12 tiles of 448 x 448 pixels and, after those of two or more, a thumbnail of the whole; their
tokens follow one another between `<img>` and `</img>`. The budget is the image's: coverage shares it among the tiles.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

from sglang.srt.managers import mm_utils
from sglang.srt.models import internvl
from sglang.srt.multimodal.processors import internvl as processors
from torch import Tensor, nn
from typing_extensions import override

from mmtok_deploy.backends.triton_plan import MAX_TOKENS
from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import MethodName
from mmtok_deploy.shown import shown
from mmtok_sglang.families.base import Family
from mmtok_sglang.feature_cache import Features
from mmtok_sglang.images import is_raw
from mmtok_sglang.model import PrunedModel
from mmtok_sglang.processor import PrunedProcessor
from mmtok_sglang.processor_thread import ProcessorThread
from mmtok_sglang.refusals import refusal, token_ids_refusal
from mmtok_sglang.server import current
from mmtok_sglang.stages import image_stage
from mmtok_sglang.typed_placeholders import PlaceholderRule

__all__ = ["InternVL3"]

# Whatever the checkpoint's size of an image is: sglang 0.5.23, `dynamic_preprocess`.
_TILE_PX = 448
_LANGUAGE_MODELS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")


class InternVLChatModel(PrunedModel, internvl.InternVLChatModel):
    """The model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pp_group = self.language_model.pp_group

    @override
    def pad_input_ids(self, input_ids: array[int], mm_inputs: Any) -> array[int]:
        """Returns the ids with each image's own value for its placeholders, by which the embedding path finds it.

        SGLang's goes by `<img>` pairs of the whole prompt: in a session, it gives an earlier turn's image the value of
        a later one.
        """
        padded: array[int] = mm_utils.pad_mm_tokens(input_ids, mm_inputs)
        return padded

    def get_input_embeddings(self) -> nn.Module:
        """Returns the language model's input embedding."""
        embedding: nn.Module = self.language_model.get_input_embeddings()
        return embedding

    def encode(self, items: Sequence[Any]) -> Tensor:
        """Returns the tokens of images, [tokens, D]."""
        # Embeddings that a request brings ready-made are [tokens, D] already.
        return super().encode(items).flatten(0, -2)

    def features_of(self, items: Sequence[Any]) -> list[Features]:
        """Returns what `encode` does, and as keys what goes into the projector `mlp1`, of all tiles of an image."""
        before_projector: list[Tensor] = []
        hook = self.mlp1.register_forward_pre_hook(lambda _, inputs: before_projector.append(inputs[0]))
        try:
            vision = self.encode(items)
        finally:
            hook.remove()
        (keys,) = before_projector
        counts = [len(item.feature) * keys.shape[1] for item in items]
        return [
            Features(*each)
            for each in zip(vision[None].split(counts, 1), keys.flatten(0, 1)[None].split(counts, 1), strict=True)
        ]


class InternVLProcessor(PrunedProcessor, processors.InternVLProcessor):
    """The processor."""

    models: ClassVar[list[type]] = [InternVLChatModel]

    @staticmethod
    @override
    def dynamic_preprocess(*args: Any, **kwargs: Any) -> Tensor:
        """Returns the tiles of an image."""
        with image_stage("preprocess"):
            tiles: Tensor = processors.InternVLProcessor.dynamic_preprocess(*args, **kwargs)
            return tiles


class InternVL3(Family):
    """A multiple of 256 tokens an image; kept tokens take its place, tile by tile, and positions run on."""

    model_class = InternVLChatModel
    processor_class = InternVLProcessor
    placeholder = "<image>"
    # SGLang's chat template of the family has <IMG_CONTEXT>, which its processor takes for an image, too. The last two
    # are what the processor puts in their places before it expands them.
    placeholder_rule = PlaceholderRule(
        re.compile("<image>|<IMG_CONTEXT>"),
        ("<img>", "</img>", "<video>", "<|video_pad|>", "<<<__IMG_PLACEHOLDER__>>>", "<<<__VID_PLACEHOLDER__>>>"),
    )
    obstacle_to_videos = (
        "of an InternVL3's video SGLang writes each frame as an image of its own, with its number before it, and MMTok "
        "prunes its images alone: send frames as images to have each of them pruned"
    )
    embeds = False
    obstacle_to_sharing = "its tiles share the budget of their image already"

    def __init__(self) -> None:
        self._thread = ProcessorThread()

    async def process(
        self, original: Callable[..., Awaitable[Any]], processor: Any, images: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what SGLang's processor makes of a request, in a thread of its own.

        SGLang's processor scales images on the event loop.

        Raises:
            ValueError: A prompt of token ids, which the processor does not take, or more tiles than the selection or
                the server takes (HTTP 400).
        """
        if not isinstance(kwargs["input_text"], str) and any(map(is_raw, images or ())):
            raise token_ids_refusal()
        num_tiles = _num_tiles(kwargs["request_obj"], processor)
        current().settings.limits.check_tiles(len(images or ()), num_tiles, _TILE_PX**2)
        return await self._thread.run(original, processor, images, *args, **kwargs)

    def num_kept(self, item: Any, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns what the budget keeps of the image, all its tiles together.

        Raises:
            ValueError: The prompt's placeholders are not those of the image (HTTP 400).
        """
        expected = len(item.feature) * _tile_tokens(config)
        if num_tokens != expected:
            raise refusal("placeholders", f"the prompt has {num_tokens} placeholders for an image of {expected} tokens")
        return budget.num_kept(num_tokens)

    def obstacle(self, config: Any) -> str | None:
        """Returns why a model of this architecture cannot be pruned."""
        (name, *_) = config.llm_config.architectures
        return None if name in _LANGUAGE_MODELS else f"its language model is a {name}, not verified"

    def obstacle_to(self, method: MethodName, config: Any) -> str | None:
        """Returns why the model cannot run a method."""
        if method == "visionzip":
            return "a token is 2 x 2 patches, and what its class token attends to are patches"
        if method == "downsample":
            return "its image is cut into tiles of one size, however small it is"
        return super().obstacle_to(method, config)

    def obstacle_to_stages(self, num_stages: int, config: Any) -> str | None:
        """Returns why it cannot be a pipeline: SGLang's class of it runs all layers."""
        return None if num_stages == 1 else "SGLang 0.5.23 has no pipeline stages for it"

    def vision_width(self, config: Any) -> int:
        """Returns D: the projector's output is as wide as the language model."""
        return int(config.llm_config.hidden_size)

    def keys_width(self, config: Any) -> int:
        """Returns d: the features of the patches that a token is made of, side by side."""
        return int(config.vision_config.hidden_size) * int(1 / config.downsample_ratio) ** 2


def _tile_tokens(config: Any) -> int:
    side = (config.force_image_size or config.vision_config.image_size) // config.vision_config.patch_size
    return int(side**2 * config.downsample_ratio**2)


def _num_tiles(request: Any, processor: Any) -> int:
    """Returns the most tiles that an image of the request is cut into, its thumbnail counted.

    Raises:
        ValueError: More than are selected from (HTTP 400); SGLang takes any number.
    """
    most = MAX_TOKENS // processor.num_image_token - 1
    num_tiles = 0
    for name in ("image_max_dynamic_patch", "max_dynamic_patch"):
        asked = getattr(request, name, None)
        if asked is not None and not (isinstance(asked, int) and 0 <= asked <= most):
            raise refusal(
                "pixels",
                f"{name} is a whole number of tiles that an image is cut into, at most {most}, got {shown(asked)}",
            )
        # As SGLang reads them, for which 0 is none.
        num_tiles = num_tiles or asked or 0
    return 1 + int(num_tiles or processor.IMAGE_MAX_NUM)
