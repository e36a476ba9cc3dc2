from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputFormat
from sglang.srt.multimodal.processors import glm4v, qwen_vl
from sglang.srt.utils import VideoData
from transformers import Glm4vVideoProcessor, Glm46VVideoProcessor

from mmtok_sglang import limits as limits_module
from mmtok_sglang.families.glm_4_1v import Glm41V
from mmtok_sglang.images import ImageLoader
from mmtok_sglang.limits import Limits
from mmtok_sglang.videos import Video, VideoLoader, is_raw_video
from tests.runtime.films import film, has_ffmpeg, needs_ffmpeg, sound

PROCESSOR = SimpleNamespace(server_args=None, video_config={})


def load(*videos: Any, limits: Limits | None = None, processor: Any = PROCESSOR) -> list[Video]:
    limits = limits or Limits()
    loader = VideoLoader(limits, ImageLoader(limits))
    return asyncio.run(loader.load(videos, processor, are_pruned=True))


@needs_ffmpeg()
def test_files_are_opened_wherever_they_are(tmp_path: Any) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(film().data)
    sources = (film().url, film().data, str(path), path.as_uri(), VideoData(film().url))
    assert all(map(is_raw_video, sources))
    for video in load(*sources):
        assert video.is_pruned
        assert (len(video), video.avg_fps, video.frame_shape) == (16, 4.0, (64, 96))


@needs_ffmpeg()
def test_the_frames_that_were_taken_are_told() -> None:
    (video,) = load(film().data)
    frames = video.get_frames_as_tensor([0, 5, 15])
    assert (frames.shape, frames.dtype) == ((3, 64, 96, 3), torch.uint8)
    assert video.metadata == {"fps": 4.0, "total_num_frames": 16, "frames_indices": [0, 5, 15]}


@needs_ffmpeg()
@pytest.mark.parametrize(
    ("limits", "config", "message"),
    [
        # Two a second of 4 seconds.
        ({"max_video_frames": 15}, {}, r"16 frames would be read .* takes 15 \(--mmtok-max-video-frames\)"),
        ({"max_video_frames": 31}, {"fps": 4}, "32 frames would be read"),
        # 16 x 96 x 64 are 98,304, of which eight times the limit are allowed.
        ({"max_image_pixels": 12_287}, {}, "the 16 frames .* have 98,304 pixels, this server takes 98,296"),
    ],
)
def test_too_many_frames_are_refused_before_they_are_decoded(
    limits: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    processor = SimpleNamespace(server_args=None, video_config=config)
    with pytest.raises(ValueError, match=message):
        load(film().data, film(seed=1).data, limits=Limits(**limits), processor=processor)
    allowed = {name: value + 1 for name, value in limits.items()}
    assert len(load(film().data, film(seed=1).data, limits=Limits(**allowed), processor=processor)) == 2


@needs_ffmpeg()
def test_frames_that_are_not_taken_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a file with one key frame, all are decoded: 2 x 16 of 96 x 64 are 196,608 pixels.
    monkeypatch.setattr(limits_module, "_MAX_DECODED", 16)
    processor = SimpleNamespace(server_args=None, video_config={"nframes": 2})
    videos = (film().data, film(seed=1).data)
    assert len(load(*videos, limits=Limits(max_image_pixels=12_288), processor=processor)) == 2
    with pytest.raises(
        ValueError, match="have 196,608 pixels in all of their frames, this server decodes 196,592, 16 t"
    ):
        load(*videos, limits=Limits(max_image_pixels=12_287), processor=processor)


@needs_ffmpeg()
def test_files_of_a_request_are_bounded_together() -> None:
    # A megabyte behind the film, which a decoder passes over.
    data = film().data + (1 << 20).to_bytes(4, "big") + b"free" + bytes((1 << 20) - 8)
    processor = SimpleNamespace(server_args=SimpleNamespace(media_url_max_file_size_mb=2), video_config={})
    assert len(load(*[data] * 15, processor=processor)) == 15
    with pytest.raises(ValueError, match="the videos of a request have more than 16,777,216 bytes"):
        load(*[data] * 16, processor=processor)


@needs_ffmpeg()
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello", r"a video cannot be decoded \(Failed to open .*\): send a whole file that FFmpeg reads"),
        (b"", r"a video cannot be decoded \(the file is empty\)"),
        ("data:video/mp4;base64,???", "a video cannot be read"),
        ("/nowhere/film.mp4", "a video cannot be read"),
    ],
)
def test_what_is_no_video_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(data)


@needs_ffmpeg()
def test_fewer_than_two_frames_are_no_video() -> None:
    for data in (film(0).data, sound()):
        with pytest.raises(ValueError, match=r"a video cannot be decoded \(the file has no frames\)"):
            load(data)
    with pytest.raises(ValueError, match=r"at least 2 frames .*, got 1 at 4.* a second: send a single frame"):
        load(film(1).data)


@pytest.mark.skipif(has_ffmpeg(), reason="FFmpeg is installed")
def test_a_server_without_ffmpeg_says_so() -> None:
    with pytest.raises(ValueError, match="the libraries of FFmpeg, by which SGLang decodes videos, are not installed"):
        load(b"hello")


def test_a_video_that_the_encoder_would_read_too_much_of_is_refused() -> None:
    items = [
        MultimodalDataItem(modality=Modality.VIDEO, model_specific_data={"video_grid_thw": torch.tensor([[4, 20, 28]])})
    ]
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14))
    for most in (4 * 20 * 28 * 14**2, 4 * 20 * 28 * 14**2 - 1):
        limits = Limits(max_video_pixels=most)
        loader = VideoLoader(limits, ImageLoader(limits))
        if most % 2:
            with pytest.raises(ValueError, match="would read 439,040 pixels of a video, this server takes 439,039"):
                loader.check(items, config)
        else:
            loader.check(items, config)


@pytest.mark.parametrize("grid", [{}, {"video_grid_thw": [[4, 20, 28]]}])
@pytest.mark.parametrize("kind", ["PROCESSOR_OUTPUT", "PRECOMPUTED_EMBEDDING"])
def test_what_comes_ready_made_is_left_to_sglang(grid: Any, kind: str) -> None:
    item = MultimodalDataItem(
        modality=Modality.VIDEO, format=MultimodalInputFormat[kind], model_specific_data=dict(grid)
    )
    limits = Limits(max_video_pixels=1)
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14))
    VideoLoader(limits, ImageLoader(limits)).check([item], config)


def pixels_read(width: int, height: int, num_frames: int) -> int:
    """Returns what the encoder reads of a video, of every second frame, at the sizes that SGLang gives it."""
    most = min(qwen_vl.VIDEO_MAX_PIXELS, qwen_vl.VIDEO_TOTAL_PIXELS / num_frames * 2)
    rows, columns = qwen_vl.smart_resize(height, width, 28, qwen_vl.VIDEO_MIN_PIXELS, int(most))
    return int(num_frames // 2 * rows * columns)


@pytest.mark.parametrize(("seconds", "width", "height"), [(60, 1280, 720), (60, 1920, 1080), (120, 1280, 720)])
def test_a_usual_video_is_within_the_default_limits(seconds: int, width: int, height: int) -> None:
    num_frames = 2 * seconds
    Limits().check_frames([(num_frames, 30 * seconds, width, height)])
    read = pixels_read(width, height, num_frames)
    Limits().check_encoded(read)
    # The share of 10% of a minute, guided by 50 tokens; of more, by frames.
    num_tokens, size = read // 28**2, read // 28**2 // seconds
    if seconds <= 60:
        Limits().check_cost(num_tokens // 10 * num_tokens * (50 + num_tokens))
    else:
        with pytest.raises(ValueError, match='for a video ask for mmtok_video_budget "frame"'):
            Limits().check_cost(num_tokens // 10 * num_tokens * (50 + num_tokens))
    Limits().check_cost(seconds * (size // 10) * size * (50 + size))


@pytest.mark.parametrize(("seconds", "width", "height"), [(4200, 1920, 1080), (9000, 1280, 720), (28800, 720, 400)])
def test_a_long_video_is_within_the_default_limits(seconds: int, width: int, height: int) -> None:
    Limits().check_frames([(100, 30 * seconds, width, height)])


def test_all_that_sglang_takes_of_a_video_is_encoded() -> None:
    for num_frames in range(4, 769, 2):
        Limits().check_encoded(pixels_read(1920, 1080, num_frames))


@needs_ffmpeg()
@pytest.mark.parametrize("asked", [{}, {"fps": 1.0}, {"max_frames": 3}, {"fps": 0.5, "max_frames": 2}], ids=str)
@pytest.mark.parametrize("of_server", [{}, {"fps": 1.5}, {"max_frames": 6}], ids=str)
@pytest.mark.parametrize("made", [Glm4vVideoProcessor, Glm46VVideoProcessor])
def test_frames_of_a_glm_are_counted_as_they_are_taken(
    made: Any, of_server: dict[str, Any], asked: dict[str, Any]
) -> None:
    video_processor = made()
    processor = SimpleNamespace(
        server_args=None, video_config=of_server, _processor=SimpleNamespace(video_processor=video_processor)
    )
    for limit in (1, 100):
        limits = Limits(max_video_frames=limit)
        loader = Glm41V().video_loader(limits, ImageLoader(limits))
        source = VideoData(film(24, 4.0).url, preprocess_kwargs=asked)
        opening = loader.load([source], processor, are_pruned=True)
        if limit == 1:
            with pytest.raises(ValueError, match=r"\d+ frames would be read") as refused:
                asyncio.run(opening)
            counted = int(str(refused.value).split()[0])
        else:
            (video,) = asyncio.run(opening)
            # As SGLang's processor goes on with it.
            defaults = glm4v.glm_processor_video_config(video_processor) | of_server
            (config,) = glm4v._merge_glm_video_configs(defaults, glm4v.split_glm_video_items([video])[1])
            frames, _ = glm4v.glm_sample_and_decode_sync(video, config, video_processor)
            assert counted == len(frames) == len(video.taken)


@needs_ffmpeg()
@pytest.mark.parametrize("fps", [0, -1, "fast"])
def test_a_glm_refuses_a_rate_that_is_none(fps: Any) -> None:
    processor = SimpleNamespace(server_args=None, video_config={}, _processor=SimpleNamespace(video_processor=None))
    loader = Glm41V().video_loader(Limits(), ImageLoader(Limits()))
    source = VideoData(film().url, preprocess_kwargs={"fps": fps})
    with pytest.raises(ValueError, match="fps must be a positive finite number"):
        asyncio.run(loader.load([source], processor, are_pruned=True))
