"""Opening a request's videos off the event loop, within limits that are checked before a frame is decoded."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import MultimodalInputFormat
from sglang.srt.multimodal.processors.qwen_vl import smart_nframes
from sglang.srt.utils import VideoData
from sglang.srt.utils.video_decoder import VideoDecoderWrapper
from torch import Tensor
from typing_extensions import override

from mmtok_sglang.images import ImageLoader, check_num_bytes
from mmtok_sglang.limits import Limits
from mmtok_sglang.refusals import refusal

__all__ = ["Video", "VideoLoader", "is_raw_video"]

_NUM_READERS = 2
_MIN_FRAMES = 2
"""A token is of two frames."""
_NO_FFMPEG = "Could not load libtorchcodec"
_NO_FRAMES = ("The best video stream is unknown", "Could not seek file to pts=0")
"""What it says of a file of sound alone, and of one whose video has no frames."""
_PLACE_IN_SOURCE = re.compile(r"^\w+, \S+\.cpp:\d+, ")
"""What TorchCodec's messages begin with."""


def is_raw_video(video: Any) -> bool:
    """True for what is decoded as a video; False for frames and features that come ready-made."""
    return isinstance(video, str | bytes | VideoData)


class Video(VideoDecoderWrapper):
    """An opened video, of which SGLang's processor takes frames; one that cannot be decoded is refused (HTTP 400)."""

    is_pruned = False
    """Whether its tokens are."""
    taken: Sequence[int] = ()
    """The frames that were taken of it."""
    preprocess_kwargs: Mapping[str, Any] | None = None
    """What the request says of its frames (SGLang's `VideoData.preprocess_kwargs`), which a GLM's processor reads."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Which frames were taken, and when they are, as Hugging Face's processors read it."""
        return {"fps": self.avg_fps, "total_num_frames": len(self), "frames_indices": list(self.taken)}

    @override
    def get_frames_as_tensor(self, indices: list[int]) -> Tensor:
        """Returns [frames, H, W, 3] uint8 frames.

        Raises:
            ValueError: They cannot be decoded (HTTP 400).
        """
        self.taken = indices
        try:
            frames: Tensor = super().get_frames_as_tensor(indices)
            return frames
        except Exception as error:  # each decoder has errors of its own
            raise _unreadable(error) from error


class VideoLoader:
    """Opens videos and checks how many frames would be read of them; one a tokenizer process.

    Args:
        limits: What a request is refused for.
        images: Downloads files.
        num_taken: Returns how many frames SGLang's processor takes of a video. It gets the video and the processor.
    """

    def __init__(
        self, limits: Limits, images: ImageLoader, num_taken: Callable[[Video, Any], int] | None = None
    ) -> None:
        self._limits = limits
        self._images = images
        self._num_taken = num_taken or _num_taken_for_a_qwen
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="mmtok-video")

    async def load(self, videos: Sequence[Any], processor: Any, *, are_pruned: bool) -> list[Video]:
        """Returns the videos for SGLang's processor, in their order, opened and not decoded.

        Args:
            videos: Addresses, paths, base64 text, bytes.
            processor: SGLang's, whose `video_config` says which frames it takes.
            are_pruned: Whether their tokens are.

        Raises:
            ValueError: A video that cannot be read, or is beyond a limit (HTTP 400).
        """
        opened: list[Video] = []
        sizes: list[tuple[int, int, int, int]] = []
        num_bytes = 0
        # One after another: what is beyond the limits is not loaded any more.
        for video in videos:
            source = video.url if isinstance(video, VideoData) else video
            data = await self._images.read(source, processor.server_args, "a video")
            num_bytes += len(data)
            check_num_bytes(num_bytes, processor.server_args, "the videos of a request have")
            loop = asyncio.get_running_loop()
            found, of_file = await loop.run_in_executor(self._readers, _open, data)
            found.is_pruned = are_pruned
            found.preprocess_kwargs = getattr(video, "preprocess_kwargs", None)
            # Counting what is taken of it may take long where it has far too many.
            self._limits.check_frames([*sizes, (0, *of_file)])
            num_taken = await loop.run_in_executor(self._readers, self._num_taken, found, processor)
            opened.append(found)
            sizes.append((num_taken, *of_file))
            self._limits.check_frames(sizes)
        return opened

    opens = staticmethod(is_raw_video)

    def check(self, items: Sequence[Any], config: Any) -> None:
        """Raises ValueError (HTTP 400) for a video of which the encoder would read too many pixels.

        Args:
            items: SGLang's, after the processor.
            config: The model's Hugging Face configuration.
        """
        patch_px = config.vision_config.patch_size
        for item in items:
            # What comes ready-made, of the processor or of the encoder, may lack a grid, or have a list.
            if item.is_video() and item.format == MultimodalInputFormat.NORMAL:
                self._limits.check_encoded(int(item.video_grid_thw.prod(-1).max()) * patch_px**2)


def _num_taken_for_a_qwen(video: Video, processor: Any) -> int:
    return int(smart_nframes(processor.video_config, len(video), video.avg_fps))


def _open(data: bytes) -> tuple[Video, tuple[int, int, int]]:
    """Returns a video, how many frames it has, their width and height."""
    if not data:
        raise refusal("video", "a video cannot be decoded (the file is empty): send a whole file")
    try:
        video = Video(data, device="cuda" if torch.cuda.is_available() else "cpu")
        num_frames, frames_per_s = len(video), video.avg_fps
        height, width = video.frame_shape
    except Exception as error:  # each decoder has errors of its own
        raise _unreadable(error) from error
    if num_frames < _MIN_FRAMES or not frames_per_s or not 0 < frames_per_s < math.inf:
        raise refusal(
            "video",
            f"a video has at least {_MIN_FRAMES} frames and a number of them a second, got {num_frames} at "
            f"{frames_per_s} a second: send a single frame as an image",
        )
    return video, (num_frames, width, height)


def _unreadable(error: Exception) -> ValueError:
    text = _PLACE_IN_SOURCE.sub("", str(error))
    if _NO_FFMPEG in text:
        why = "the libraries of FFmpeg, by which SGLang decodes videos, are not installed on this server"
        return refusal("video", f"a video cannot be decoded: {why}")
    why = "the file has no frames" if any(each in text for each in _NO_FRAMES) else f"{text:.300}"
    return refusal("video", f"a video cannot be decoded ({why}): send a whole file that FFmpeg reads, such as an MP4")
