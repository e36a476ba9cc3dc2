"""What the LLaVAs have in common: CLIP features, a projector as wide as the language model, positions that run on."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from sglang.srt.model_loader.utils import _is_moe_model

from mmtok_deploy.methods import MethodName
from mmtok_sglang.families.base import Family
from mmtok_sglang.images import decoded
from mmtok_sglang.processor_thread import ProcessorThread
from mmtok_sglang.refusals import token_ids_refusal
from mmtok_sglang.typed_placeholders import PlaceholderRule

__all__ = ["Llava"]


_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Family):
    """A LLaVA on SGLang's Transformers backend."""

    placeholder = "<image>"
    placeholder_rule = PlaceholderRule(re.compile("<image>"))

    def __init__(self) -> None:
        self._thread = ProcessorThread()

    async def process(
        self, original: Callable[..., Awaitable[Any]], processor: Any, images: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what SGLang's processor makes of a request, in a thread of its own.

        SGLang's Transformers processor decodes, resizes and tokenises on the event loop.

        Raises:
            ValueError: A prompt of token ids, which the Transformers processor does not take (HTTP 400).
        """
        if not isinstance(kwargs["input_text"], str):
            raise token_ids_refusal()

        async def run(copied: Any) -> Any:
            # Here, so that one request's images are decoded at a time: they take far more memory than they came in.
            pixels = [decoded(image) for image in images or ()]
            return await original(copied, pixels, *args, **kwargs)

        return await self._thread.run(run, processor)

    def obstacle(self, config: Any) -> str | None:
        """Returns why a model of this architecture cannot be pruned.

        Pixtral's has tokens that end rows of patches; SGLang makes a mixture of experts of another class.
        """
        if _is_moe_model(SimpleNamespace(hf_text_config=config.text_config), []):
            return "its language model is a mixture of experts"
        tower = config.vision_config.model_type
        return None if tower in _TOWERS else f"its vision encoder is {tower}, not one of {', '.join(_TOWERS)}"

    def obstacle_to(self, method: MethodName, config: Any) -> str | None:
        """Returns why the model cannot run a method: other towers than CLIP have no class token to read."""
        if method == "visionzip" and config.vision_config.model_type == "clip_vision_model":
            return None
        return super().obstacle_to(method, config)

    def vision_width(self, config: Any) -> int:
        """Returns D: the projector's output is as wide as the language model."""
        return int(config.text_config.hidden_size)

    def keys_width(self, config: Any) -> int:
        """Returns d: one layer's features, or those of several side by side."""
        layers = config.vision_feature_layer
        return int(config.vision_config.hidden_size) * (1 if isinstance(layers, int) else len(layers))

    def num_selected_from(self, config: Any) -> int | None:
        """Returns the number of patches of the square that CLIP reads: an image or a tile."""
        return self.tile_tokens(config)

    def tile_tokens(self, config: Any) -> int:
        """Returns the number of patches of the square that CLIP reads."""
        return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2
