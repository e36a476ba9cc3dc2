"""What a model family's processor class adds to SGLang's: images lose the placeholders that are not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from typing_extensions import override

from mmtok_sglang.pixels import take_over_scaling
from mmtok_sglang.server import current
from mmtok_sglang.stages import image_stage

__all__ = ["PrunedProcessor"]

# To a type checker a processor of SGLang's, whose methods this class calls and replaces.
_Base: Any = BaseMultimodalProcessor if TYPE_CHECKING else object


class PrunedProcessor(_Base):
    """Goes before SGLang's class of a processor among the bases of a family's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SGLang has some models' tokenizer in its place, and processes images itself.
        image_processor = getattr(self._processor, "image_processor", None)
        self.pixel_scale = None if image_processor is None else take_over_scaling(image_processor, self.image_config)

    @override
    async def process_mm_data_async(self, image_data: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns SGLang's processed request with each pruned image's placeholders cut from N to K.

        That is before the context's length is checked.

        Raises:
            ValueError: A bad budget, or an input that cannot be pruned (HTTP 400).
        """

        async def original(processor: Any, *args: Any, **kwargs: Any) -> Any:
            # A family may have a copy of the processor work.
            return await super(PrunedProcessor, processor).process_mm_data_async(*args, **kwargs)  # noqa: UP008

        return await current().process(original, self, image_data, *args, **kwargs)

    @classmethod
    @override
    def _load_single_item(cls, *args: Any, **kwargs: Any) -> Any:
        with image_stage("decode"):
            return super()._load_single_item(*args, **kwargs)

    @override
    def process_mm_data(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the Hugging Face processor makes of a request."""
        with image_stage("preprocess"):
            return super().process_mm_data(*args, **kwargs)

    @override
    def clear_preprocess_cache(self) -> None:
        """Forgets what was made of images in this process, answers of the agent included."""
        super().clear_preprocess_cache()
        agent = current().cutter.agent
        if agent is not None:
            agent.clear()
