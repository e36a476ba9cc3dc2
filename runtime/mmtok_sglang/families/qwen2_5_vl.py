"""Qwen2.5-VL on SGLang's own implementation: features in the order of attention windows."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

import torch
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from sglang.srt.models import qwen2_5_vl
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
from torch import Tensor
from typing_extensions import override

from mmtok_sglang.families.qwen import Qwen, QwenModel, QwenProcessor
from mmtok_sglang.videos import Video

__all__ = ["Qwen25VL", "by_frame"]

# On the item of a video whose pairs of frames are encoded each by itself. As a part of its data, it is in the keys of
# its features.
_FRAMES_APART = "frames_apart"


class Qwen2_5_VLForConditionalGeneration(QwenModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """The model."""

    replays_encoder = True

    def encode(self, items: Sequence[Any]) -> Tensor:
        """Returns the tokens of images or videos.

        Each pair of frames is encoded as an image is, of videos whose request has a budget: also where it keeps all.
        """
        return super().encode([by_frame(item) for item in items])

    def in_raster_order(self, groups: Tensor, grids: Tensor) -> Tensor:
        """Returns the rows in the order of the tokens: the encoder works in window order."""
        window_order, _ = self.visual.get_window_index(grids)
        return groups[torch.argsort(window_order).to(groups.device, non_blocking=True)]


class Qwen2_5_VLProcessor(QwenProcessor, QwenVLImageProcessor):  # noqa: N801
    """The processor."""

    models: ClassVar[list[type]] = [Qwen2_5_VLForConditionalGeneration]
    videos: Sequence[Video] = ()
    """Those of a request, on the copy that processes it."""

    @override
    def process_mm_data(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the Hugging Face processor makes of a request; it is told when the frames of a video are.

        SGLang 0.5.23 (multimodal/processors/qwen_vl.py, `_process_mm_data_uncached`) tells that of Qwen3-VL's alone,
        and Hugging Face's takes 24 frames a second for the rest: all frames get nearly the same place in time.
        """
        if self.videos:
            kwargs |= {"video_metadata": [video.metadata for video in self.videos], "do_sample_frames": False}
        return super().process_mm_data(*args, **kwargs)


def by_frame(item: Any) -> Any:
    """Returns the item of a video whose frames are encoded apart with a grid for each step in time, any other as it is.

    The model's encoder attends within a step. SGLang 0.5.23 (models/qwen2_5_vl.py, `cu_seqlens`) has its blocks of full
    attention attend to all steps of a grid.
    """
    # An image that comes ready-made may bring the mark, too.
    if not (item.is_video() and _FRAMES_APART in item.model_specific_data):
        return item
    ((num_steps, rows, columns),) = item.video_grid_thw.tolist()
    separated = copy.copy(item)
    grid = torch.tensor([[1, rows, columns]] * num_steps)
    separated.model_specific_data = {**item.model_specific_data, "video_grid_thw": grid}
    return separated


class Qwen25VL(Qwen):
    """Tokens of 28 x 28 pixels."""

    model_class = Qwen2_5_VLForConditionalGeneration
    speculative_algorithms = ("NGRAM", "EAGLE3")
    processor_class = Qwen2_5_VLProcessor
    replays_prefills = True
    video_placeholder = "<|video_pad|>"

    async def process(
        self, original: Callable[..., Awaitable[Any]], processor: Any, images: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what SGLang's processor makes of a request.

        Videos that are not pruned have the places in time that they have on a server without a budget.
        """
        videos = kwargs["request_obj"].video_data or ()
        if not videos or not all(isinstance(video, Video) and video.is_pruned for video in videos):
            return await super().process(original, processor, images, *args, **kwargs)

        async def with_times(processor: Any, *args: Any, **kwargs: Any) -> Any:
            processor = copy.copy(processor)
            processor.videos = videos
            return await original(processor, *args, **kwargs)

        return await super().process(with_times, processor, images, *args, **kwargs)

    def separate_videos(self, output: Any) -> None:
        """Splits what SGLang 0.5.23 leaves as one item of several videos, and has their frames encoded apart.

        Its `get_new_expanded_mm_items` (managers/mm_utils.py) counts on a run of placeholders for each step in time.
        """
        items: list[Any] = []
        for item in output.mm_items:
            if not item.is_video() or len(item.offsets) == 1:
                items.append(item)
                continue
            grids, data = item.video_grid_thw, item.model_specific_data
            pixels = item.feature.split(grids.prod(-1).tolist())
            for place, (offset, rows) in enumerate(zip(item.offsets, pixels, strict=True)):
                of_one = slice(place, place + 1)
                items.append(
                    MultimodalDataItem(
                        modality=item.modality,
                        offsets=[offset],
                        feature=rows.clone(),
                        model_specific_data={
                            "video_grid_thw": grids[of_one],
                            "second_per_grid_ts": data["second_per_grid_ts"][of_one],
                        },
                    )
                )
        for item in items:
            if item.is_video():
                item.model_specific_data[_FRAMES_APART] = True
        output.mm_items[:] = items
