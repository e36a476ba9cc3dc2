"""A program: what SGLang's processor of a tiny Qwen makes of requests with a video or an image, with a budget.

`python -m tests.runtime.processed_requests CHECKPOINT` prints one JSON object. A process of its own, since the hooks
stay in the process that they are installed in.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from sglang.srt import runtime_context
from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.managers.multimodal_processor import get_mm_processor, import_processors
from sglang.srt.multimodal.cache.preprocess_cache import MultimodalPreprocessCache
from sglang.srt.multimodal.media_artifacts import base
from sglang.srt.multimodal.processors import base_processor, qwen_vl
from transformers import AutoProcessor

from mmtok_sglang.server_args import MMTokServerArgs
from tests.runtime.chats import data_url, small

_TEXT = "<|im_start|>user\n<|vision_start|><|{}_pad|><|vision_end|>What?<|im_end|>\n"


class Film(qwen_vl.VideoDecoderWrapper):
    """Two seconds of noise: no FFmpeg is needed to decode it."""

    avg_fps = 4.0
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 64, 96, 3), dtype=np.uint8))

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass

    def __len__(self) -> int:
        return len(self.frames)

    def get_frames_as_tensor(self, indices: list[int]) -> torch.Tensor:
        return self.frames[indices]


async def _processed(processor: Any, kind: str, images: list[str], videos: list[Any], budget: str | None) -> Any:
    names = ("audio_data", "mm_hashes", "mm_content_hashes")
    fields = None if budget is None else {"mmtok_budget": budget}
    request = SimpleNamespace(rid="0", video_data=videos, mm_processor_kwargs=fields, **dict.fromkeys(names))
    text = _TEXT.format(kind) * max(1, len(images))
    return await processor.process_mm_data_async(images, input_text=text, request_obj=request, max_req_input_len=8192)


async def _beside_a_broken_image(processor: Any) -> dict[str, Any]:
    """Returns how a request fares while another one has the same image, and a second one that is cut off."""
    good, whole = data_url(small("chelsea")), data_url(small("rocket"))
    start = whole.index(",") + 1
    broken = whole[: start + (len(whole) - start) // 8 * 4]
    decode, is_answered = processor.decode_media_snapshot, threading.Event()

    def decode_later(snapshot: Any, modality: Any) -> Any:
        if snapshot.content_digest == processor.snapshot_media_source(broken, modality).content_digest:
            is_answered.wait(10.0)
        return decode(snapshot, modality)

    processor.decode_media_snapshot = decode_later
    other = asyncio.create_task(_processed(processor, "image", [good, broken], [], "all"))
    await asyncio.sleep(0.5)
    try:
        answer = await asyncio.wait_for(_processed(processor, "image", [good, good], [], "all"), 8.0)
    finally:
        is_answered.set()
        del processor.decode_media_snapshot
    first, second = answer.mm_items
    error = (await asyncio.gather(other, return_exceptions=True))[0]
    return {"shares_pixels": first.feature is second.feature, "error_of_the_other": str(error)}


async def _threads_of(processor: Any) -> list[str]:
    """Returns the threads in which requests with one image and with many are put together."""
    threads = []
    compose = type(processor).compose_image_artifacts

    def noted(self: Any, *args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return compose(self, *args)

    with mock.patch.object(type(processor), "compose_image_artifacts", noted):
        for number in (1, 16):
            await _processed(processor, "image", [data_url(small("coffee"))] * number, [], "10%")
    return threads


async def _is_grey_alike(processor: Any) -> bool:
    """Returns whether a grey image that was decoded to one channel gives the pixels of one with three."""
    grey = small("astronaut").convert("L")
    decoded = torch.from_numpy(np.array(grey))[None]
    with mock.patch.object(base, "load_image", return_value=(decoded, None)):
        found = await _processed(processor, "image", [data_url(grey)], [], "all")
    expected = await _processed(processor, "image", [data_url(grey.convert("RGB"))], [], "all")
    return torch.equal(found.mm_items[0].feature, expected.mm_items[0].feature)


def _prepares_what_it_misses(cache: Any) -> bool:
    """Returns whether a request is given an image that another request looks up at the same time."""

    claim = MultimodalPreprocessCache.lookup_or_claim_many
    other = threading.Thread(target=cache.lookup_or_claim_many, args=(["image"],))

    def claim_later(*args: Any, **kwargs: Any) -> Any:
        # Until the request has what it misses, the other one waits.
        if threading.current_thread() is not other:
            other.start()
            other.join(0.3)
        return claim(*args, **kwargs)

    with mock.patch.object(MultimodalPreprocessCache, "lookup_or_claim_many", claim_later):
        (miss,) = cache.lookup_or_claim_many(["image"])
        other.join()
    return bool(miss.should_compute)


async def _run(ours: Any, sglangs: Any) -> dict[str, Any]:
    image = (await _processed(ours, "image", [data_url(small("coffee"))], [], None)).mm_items[0]
    beside = await _beside_a_broken_image(ours)
    refusal = ""
    try:
        await _processed(ours, "video", [], [Film()], None)
    except ValueError as error:
        refusal = str(error)
    film, expected = [await _processed(each, "video", [], [Film()], "all") for each in (ours, sglangs)]
    ((item,), (theirs,)) = film.mm_items, expected.mm_items
    return {
        "image": [str(image.feature.dtype), "mmtok_pixels" in image.model_specific_data],
        **beside,
        "threads": await _threads_of(ours),
        "prepares_what_it_misses": _prepares_what_it_misses(ours.mm_preprocess_cache),
        "is_grey_alike": await _is_grey_alike(ours),
        "refusal": refusal,
        "num_spans": len(item.offsets),
        "is_planned": "mmtok" in item.model_specific_data,
        "is_sglangs": film.input_ids == expected.input_ids
        and item.offsets == theirs.offsets
        and torch.equal(item.feature, theirs.feature)
        and torch.equal(film.mrope_positions, expected.mrope_positions),
    }


def _main(checkpoint: str) -> None:
    arguments = MMTokServerArgs(model_path=checkpoint, mmtok_budget="10%", device="cpu")
    arguments.resolve_once()
    runtime_context.publish(arguments, role="tokenizer")
    import_processors("sglang.srt.multimodal.processors")
    base_processor.load_video = lambda video, *_, **__: video
    config, processor = model_config_of(arguments), AutoProcessor.from_pretrained(checkpoint)
    ours = get_mm_processor(config.hf_config, arguments, processor, "default", config)
    plain = AutoProcessor.from_pretrained(checkpoint)
    sglangs = qwen_vl.QwenVLImageProcessor(config.hf_config, arguments, plain, "default")
    print("RESULT " + json.dumps(asyncio.run(_run(ours, sglangs))), flush=True)
    # The processors' threads would keep the process.
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1])
