"""Videos as the tests send them: files that are encoded and decoded by FFmpeg, whose libraries SGLang needs for it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.multimodal.processors import qwen_vl
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional
from transformers.video_utils import VideoMetadata

__all__ = ["Film", "film", "has_ffmpeg", "needs_ffmpeg", "sound", "steady"]


@cache
def has_ffmpeg() -> bool:
    """True where videos can be decoded: TorchCodec looks for FFmpeg's libraries when it is used."""
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"")
    except Exception as error:  # without the libraries, or of a video that is none
        return "Could not load libtorchcodec" not in str(error)
    return True


def needs_ffmpeg() -> pytest.MarkDecorator:
    """Returns the mark of tests that decode videos."""
    return pytest.mark.skipif(not has_ffmpeg(), reason="videos are decoded by FFmpeg, which is not installed")


@dataclass(frozen=True)
class Film:
    """An MP4 file."""

    data: bytes

    @property
    def url(self) -> str:
        return "data:video/mp4;base64," + base64.b64encode(self.data).decode()

    def frames(self, device: str = "cpu", of_glm: Any = None) -> tuple[Tensor, dict[str, Any]]:
        """Returns [frames, 3, H, W] uint8, those that SGLang takes at the size it gives them, and when they are.

        Args:
            device: What decodes them, "cuda" where SGLang runs on one: the two round differently.
            of_glm: A GLM's video processor, which chooses frames and sizes them; None for a Qwen.
        """
        decoder = qwen_vl.VideoDecoderWrapper(self.data, device=device)
        num_frames, frames_per_s = len(decoder), decoder.avg_fps
        if of_glm is not None:
            of_file = VideoMetadata(num_frames, fps=frames_per_s, duration=num_frames / frames_per_s)
            taken = [int(index) for index in of_glm.sample_frames(of_file)]
            metadata = {"fps": frames_per_s, "total_num_frames": num_frames, "frames_indices": taken}
            return decoder.get_frames_as_tensor(taken).permute(0, 3, 1, 2), metadata
        num_taken = qwen_vl.smart_nframes({}, num_frames, frames_per_s)
        taken = np.unique(np.linspace(0, num_frames - 1, num_taken, dtype=np.int64)).tolist()
        # The colours of a pixel lie together: otherwise PyTorch resizes with other roundings.
        frames = decoder.get_frames_as_tensor(taken).permute(0, 3, 1, 2)
        sizes = qwen_vl.VIDEO_MIN_PIXELS, qwen_vl.VIDEO_MAX_PIXELS
        height, width = qwen_vl.smart_resize(*frames.shape[-2:], min_pixels=sizes[0], max_pixels=sizes[1])
        # What SGLang does: other sizes than Hugging Face's.
        frames = functional.resize(frames, [height, width], interpolation=InterpolationMode.BILINEAR)
        return frames, {"fps": frames_per_s, "total_num_frames": num_frames, "frames_indices": taken}


@cache
def film(num_frames: int = 16, frames_per_s: float = 4.0, seed: int = 0, *, scale: int = 1) -> Film:
    """Returns a film of a square that moves over noise, of 96 x 64 pixels times the scale; without frames, too."""
    from torchcodec.encoders import VideoEncoder

    generator = torch.Generator().manual_seed(seed)
    background = torch.randint(0, 256, (3, 8, 12), generator=generator).to(torch.uint8)
    frames = background.repeat_interleave(8, 1).repeat_interleave(8, 2).repeat(num_frames, 1, 1, 1)
    for place in range(num_frames):
        left = place * 72 // num_frames
        frames[place, :, 20:44, left : left + 24] = torch.tensor([255, 40 * seed % 255, 0]).to(torch.uint8)[
            :, None, None
        ]
    frames = frames.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    encoded = VideoEncoder(frames, frame_rate=frames_per_s).to_tensor("mp4")
    return Film(encoded.numpy().tobytes())


def steady(family: str) -> Film:
    """Returns a film of which half of the tokens are chosen by more than rounding.

    So large a share of other films is decided by the last bits of tokens of the background, which stands still.
    """
    return film(12, 5.0, seed=3 if family.startswith("glm") else 1)


def sound() -> bytes:
    """Returns a file of sound alone."""
    from torchcodec.encoders import AudioEncoder

    encoded: Tensor = AudioEncoder(torch.zeros(1, 16_000), sample_rate=16_000).to_tensor("wav")
    return encoded.numpy().tobytes()
