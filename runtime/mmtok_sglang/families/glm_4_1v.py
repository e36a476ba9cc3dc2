"""GLM-4.1V to GLM-4.6V on SGLang's own implementation: a convolution joins 2 x 2 patches before the merger."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from sglang.srt.models import glm4v, glm4v_moe
from sglang.srt.multimodal.processors import glm4v as processors
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mmtok_sglang.families.base import Family
from mmtok_sglang.families.qwen import ColourProcessor, QwenModel, QwenWithTimestamps
from mmtok_sglang.images import ImageLoader
from mmtok_sglang.limits import Limits
from mmtok_sglang.typed_placeholders import PlaceholderRule
from mmtok_sglang.videos import Video, VideoLoader

__all__ = ["Glm41V", "Glm45V"]

_TOKENS = tuple(
    token for kind in ("image", "video") for token in (f"<|begin_of_{kind}|>", f"<|{kind}|>", f"<|end_of_{kind}|>")
)


class _GlmModel(QwenModel):
    """A model whose projector begins with a convolution."""

    def watch_patches(self, seen: list[Tensor]) -> RemovableHandle:
        """Appends [N, 4, d] patches, as they go into the convolution, at each call of the encoder."""
        handle: RemovableHandle = self.visual.downsample.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].flatten(2).transpose(1, 2))
        )
        return handle


class Glm4vForConditionalGeneration(_GlmModel, glm4v.Glm4vForConditionalGeneration):
    """The model."""


class Glm4vMoeForConditionalGeneration(_GlmModel, glm4v_moe.Glm4vMoeForConditionalGeneration):
    """The model with a mixture of experts."""


class Glm4vProcessor(ColourProcessor, processors.Glm4vImageProcessor):
    """The processor of both."""

    models: ClassVar[list[type]] = [Glm4vForConditionalGeneration, Glm4vMoeForConditionalGeneration]


class Glm41V(QwenWithTimestamps):
    """GLM-4.1V and GLM-4.6V-Flash: tokens of 28 x 28 pixels, with positions as Qwen2.5-VL's."""

    model_class = Glm4vForConditionalGeneration
    processor_class = Glm4vProcessor
    placeholder = "<|image|>"
    video_placeholder = "<|video|>"
    # SGLang's processor takes each `<|image|>` for an image.
    placeholder_rule = PlaceholderRule(
        re.compile(r"<\|begin_of_image\|><\|image\|><\|end_of_image\|>|<\|image\|>"),
        _TOKENS,
        re.compile(r"<\|begin_of_video\|><\|video\|><\|end_of_video\|>"),
    )
    obstacle_to_skipping = Family.obstacle_to_skipping

    def video_loader(self, limits: Limits, images: ImageLoader) -> VideoLoader:
        """Returns what opens a request's videos."""
        return VideoLoader(limits, images, _num_taken)

    def num_sized_frames(self, processor: Any) -> int:
        """Returns the frames that a patch holds: an image is sized by the pixels of all."""
        return int(processor._processor.image_processor.temporal_patch_size)


class Glm45V(Glm41V):
    """GLM-4.5V and GLM-4.6V: the same encoder and positions before a mixture of experts."""

    model_class = Glm4vMoeForConditionalGeneration


def _num_taken(video: Video, processor: Any) -> int:
    """Returns how many frames of a video SGLang's processor takes.

    Source: sglang 0.5.23 multimodal/processors/glm4v.py, `process_mm_data_async` and `glm_sample_and_decode_sync`.

    Raises:
        ValueError: A request that asks for no number of frames (HTTP 400).
    """
    video_processor = getattr(processor._processor, "video_processor", None)
    of_server = processors.glm_processor_video_config(video_processor) | processor.video_config
    _, of_request = processors.split_glm_video_items([video])
    (config,) = processors._merge_glm_video_configs(of_server, of_request)
    of_file = len(video), video.avg_fps, len(video) / video.avg_fps
    taken = processors._hf_sample_frame_indices(video_processor, *of_file, config)
    if taken is None:
        taken = processors.glm_sample_frame_indices(
            *of_file, target_fps=config.get("fps"), max_frame_count=config.get("max_frames")
        )
    return len(taken)
