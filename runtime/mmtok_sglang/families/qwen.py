"""What the Qwens have in common: a merger that makes a token of 2 x 2 patches, M-RoPE positions."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from io import BytesIO
from typing import Any, ClassVar

import torch
from PIL import Image
from sglang.srt.multimodal.cache.preprocess_cache import MultimodalPreprocessCache
from sglang.srt.utils import is_cuda, load_image
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import MethodName
from mmtok_deploy.repeated_tokens import repeated_tokens
from mmtok_sglang.cache_key import name_by_source
from mmtok_sglang.encoder_graphs import MAX_PATCHES, EncoderGraphs
from mmtok_sglang.families.base import Family
from mmtok_sglang.feature_cache import Features
from mmtok_sglang.images import ImageLoader
from mmtok_sglang.limits import Limits
from mmtok_sglang.model import PrunedModel
from mmtok_sglang.processor import PrunedProcessor
from mmtok_sglang.processor_thread import ProcessorThread
from mmtok_sglang.refusals import refusal
from mmtok_sglang.repeated_patches import reading_partly
from mmtok_sglang.request import Requested
from mmtok_sglang.settings import Settings
from mmtok_sglang.smaller_images import ProcessorSizes
from mmtok_sglang.stages import image_stage
from mmtok_sglang.typed_placeholders import PlaceholderRule
from mmtok_sglang.videos import Video, VideoLoader

__all__ = ["ColourProcessor", "Qwen", "QwenModel", "QwenProcessor", "QwenWithTimestamps", "grid_of"]

logger = logging.getLogger(__name__)

# MiB of preprocessed images that the tokenizer processes keep together, on the host.
_PREPROCESS_CACHE_MB = 256
_MAX_PIXELS_ON_CPU = 2048 * 2048
_MAX_PATCHES = _MAX_PIXELS_ON_CPU // 14**2
# What SGLang keeps of 256 prompts of as much takes 100 MB.
_MAX_KEPT_PATCHES = 1 << 15
_MAX_KEPT_LETTERS = 1 << 15
# Images of a request from which on it is put together in a thread.
_MANY_IMAGES = 16


class QwenModel(PrunedModel):
    """A model of SGLang's own with the encoder `visual` and its `merger`."""

    replays_encoder: ClassVar[bool] = False
    """Whether its encoder may be replayed as a CUDA graph: answers were then compared with the hand-pruned model's."""

    @cached_property
    def _graphs(self) -> EncoderGraphs:
        read = getattr(self.visual, "deepstack_visual_indexes", None) or ()
        return EncoderGraphs(self.visual.blocks, read, is_on=self.replays_encoder)

    def encode(self, items: Sequence[Any]) -> Tensor:
        """Returns the tokens of images; on a CPU by as many images at a time as it has memory for."""
        parts = _parts(items) if next(self.parameters()).device.type == "cpu" else [items]
        features = [self._encode_part(part) for part in parts]
        return features[0] if len(features) == 1 else torch.cat(features)

    def _encode_part(self, items: Sequence[Any]) -> Tensor:
        whole = [grid_of(item) for item in items]
        with reading_partly(self.visual, items, whole) as grids, self._graphs.of(_layout(whole, grids)):
            return super().encode([_with_grid(item, grid) for item, grid in zip(items, grids, strict=True)])

    def features_of(self, items: Sequence[Any]) -> list[Features]:
        """Returns what `encode` does, and as keys the mean over what the merger makes a token of, in float32.

        Source: Ironieser/MMTok mmtok/qwen/modeling_qwen2_5_vl_mmtok.py.
        """
        of_parts: list[Tensor] = []
        hook = self.watch_patches(of_parts)
        try:
            vision = self.encode(items)
        finally:
            hook.remove()
        patches = torch.cat(of_parts)
        merged = self.visual.spatial_merge_size**2
        groups = patches.reshape(-1, merged, patches.shape[-1]).float().mean(dim=1)
        with reading_partly(self.visual, items, [grid_of(item) for item in items]) as grids:
            keys = self.in_raster_order(groups, torch.cat(grids))
        counts = [int(grid.prod(-1).sum()) // merged for grid in grids]
        return [
            Features(*each) for each in zip(vision[None].split(counts, 1), keys[None].split(counts, 1), strict=True)
        ]

    def watch_patches(self, seen: list[Tensor]) -> RemovableHandle:
        """Appends the patches that go into the projector, d values each, at each call of the encoder."""
        handle: RemovableHandle = self.visual.merger.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        return handle

    def in_raster_order(self, groups: Tensor, grids: Tensor) -> Tensor:
        """Returns [N, d] rows in the order of the tokens, from the order in which they go into the merger."""
        return groups

    @override
    def get_video_feature(self, items: list[Any]) -> Any:
        """Returns the tokens of each video, as `get_image_feature` does of images."""
        return self.get_image_feature(items)


class _OwnMisses(MultimodalPreprocessCache[Any, Any]):
    """SGLang's cache of preprocessed images, in which each request prepares what it misses itself.

    In SGLang, a request whose image another one is preparing waits until all images of that one are prepared, and fails
    if any of them cannot be decoded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Held below while SGLang's method takes it again: no other request can claim an image in between.
        self._lock = threading.RLock()

    @override
    def lookup_or_claim_many(self, keys: list[Any], **kwargs: Any) -> list[Any]:
        with self._lock:
            self._inflight.clear()
            found: list[Any] = super().lookup_or_claim_many(keys, **kwargs)
        return found


class ColourProcessor(PrunedProcessor):
    """Gives grey images three channels."""

    @classmethod
    @override
    def _load_single_item(cls, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns a decoded image, or an opened video."""
        return data if isinstance(data, Video) else _in_colour(super()._load_single_item(data, *args, **kwargs))


class QwenProcessor(ColourProcessor):
    """Keeps what was made of an image for the next question about it, and times the steps of that path for images."""

    # SGLang keeps none unless --mm-preprocess-cache-size-mb is given, which wins.
    auto_mm_preprocess_cache_size_mb = _PREPROCESS_CACHE_MB
    mm_preprocess_cache: MultimodalPreprocessCache[Any, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sglangs = self.mm_preprocess_cache
        self.mm_preprocess_cache = _OwnMisses(sglangs.max_size_bytes, sglangs.max_entries)
        # The scheduler process, which makes a processor as well, has initialised CUDA by then and decodes nothing.
        if is_cuda() and not torch.cuda.is_initialized():
            threading.Thread(target=_decode_first, args=(self.gpu_image_decode,), daemon=True).start()

    @override
    async def _compute_cache_misses(
        self,
        misses_to_compute: Sequence[Any],
        first_index_by_key: Mapping[str, int],
        snapshots: Sequence[Any],
        previous_metadata: Any,
        resolved_by_key: Any,
        modality: Any,
    ) -> None:
        """Prepares a request's images; decodes them side by side, which SGLang does one after another."""
        missed = [first_index_by_key[each.key] for each in misses_to_compute]
        futures = [self.io_executor.submit(self.decode_media_snapshot, snapshots[index], modality) for index in missed]
        decoded = list(snapshots)
        for index, future in zip(missed, futures, strict=True):
            decoded[index] = replace(snapshots[index], data=await asyncio.wrap_future(future))
        await super()._compute_cache_misses(
            misses_to_compute, first_index_by_key, decoded, previous_metadata, resolved_by_key, modality
        )

    @override
    def decode_media_snapshot(self, snapshot: Any, modality: Any) -> Any:
        """Returns a decoded image."""
        if isinstance(snapshot.data, Tensor | Image.Image):
            return super().decode_media_snapshot(snapshot, modality)
        with image_stage("decode"):
            return _in_colour(super().decode_media_snapshot(snapshot, modality))

    @override
    def prepare_artifact_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the Hugging Face processor makes of images."""
        with image_stage("preprocess"):
            return super().prepare_artifact_batch(*args, **kwargs)

    @override
    def compose_image_artifacts(self, input_text: Any, artifacts: Sequence[Any]) -> Any:
        """Returns the processed request, None where SGLang goes on by its slower path."""
        output = super().compose_image_artifacts(input_text, artifacts)
        if output is not None:
            for item, artifact in zip(output.mm_items, artifacts, strict=True):
                name_by_source(item, artifact.artifact_key)
        return output

    @override
    def _cached_image_prompt_template(self, input_text: str, grid_key: Any) -> Any:
        """Returns the expanded prompt of images with its positions; a long one is not kept.

        SGLang keeps the last 256, 32 bytes a token of the unpruned prompt and its text: gigabytes of prompts with many
        images, that only a prompt of the same text takes.
        """
        num_patches = sum(math.prod(grid) for grid in grid_key)
        if num_patches > _MAX_KEPT_PATCHES or len(input_text) > _MAX_KEPT_LETTERS:
            return self._build_image_prompt_template(input_text, grid_key)
        return super()._cached_image_prompt_template(input_text, grid_key)


def _decode_first(gpu_image_decode: Any) -> None:
    """Decodes a small JPEG as SGLang decodes those of requests.

    The first one on a GPU initialises CUDA and its decoder in this process: 0.6 to 2 s on an H200, once in each
    tokenizer process, while a request waits.
    """
    jpeg = BytesIO()
    Image.new("RGB", (32, 32)).save(jpeg, "JPEG")
    try:
        load_image(jpeg.getvalue(), gpu_image_decode)
    except Exception as error:
        logger.warning("MMTok: a first image could not be decoded (%s: %s)", type(error).__name__, error)


def _in_colour(image: Any) -> Any:
    """Returns a decoded image with three channels, equal ones for a grey one; what is no tensor as it is.

    On a GPU, SGLang decodes a grey JPEG to one channel, on which the processor fails (sgl-project/sglang pull request
    35101).
    """
    is_grey = isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] == 1
    return image.expand(3, -1, -1) if is_grey else image


class Qwen(Family):
    """Any number of tokens an image; kept tokens keep their original (t, h, w) positions."""

    placeholder = "<|image_pad|>"
    # The one of SGLang's processor, whose `<image>` is for prompts of /generate.
    placeholder_rule = PlaceholderRule(
        re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<image>"),
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        re.compile(r"<\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>"),
    )
    keys_dtype = torch.float32  # means over 2x2 merge groups
    obstacle_to_scale = None
    obstacle_to_skipping: ClassVar[str | None] = None
    # SGLang's attention on a CPU holds a matrix of all patches by all patches: 22 GB for 3584 x 3584 pixels.
    max_pixels_on_cpu = _MAX_PIXELS_ON_CPU

    def __init__(self) -> None:
        self._thread = ProcessorThread()

    async def process(
        self, original: Callable[..., Awaitable[Any]], processor: Any, images: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what SGLang's processor makes of a request, of one with videos or many images in a thread of its own.

        On the event loop, SGLang's processor decodes and resizes a video's frames; and for the positions of each image
        it reads the whole prompt: two seconds for 256 images of 2,500 tokens.
        """
        has_videos = any(isinstance(video, Video) for video in kwargs["request_obj"].video_data or ())
        if not has_videos and len(images or ()) < _MANY_IMAGES:
            return await original(processor, images, *args, **kwargs)
        return await self._thread.run(original, processor, images, *args, **kwargs)

    def video_loader(self, limits: Limits, images: ImageLoader) -> VideoLoader | None:
        """Returns what opens a request's videos, None where they are not pruned."""
        return None if self.video_placeholder is None else VideoLoader(limits, images)

    def num_kept(self, item: Any, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns what the budget keeps of the image.

        Raises:
            ValueError: The prompt's placeholders are not those of the image (HTTP 400).
        """
        expected = int(grid_of(item).prod(-1).sum()) // config.vision_config.spatial_merge_size**2
        if num_tokens != expected:
            raise refusal(
                "placeholders", f"the prompt has {num_tokens} placeholders for {expected} tokens of an image or video"
            )
        return budget.num_kept(num_tokens)

    def num_frames(self, item: Any) -> int:
        """Returns the pairs of frames of a video, 1 for an image."""
        return int(grid_of(item)[0, 0])

    def vision_width(self, config: Any) -> int:
        """Returns D: the merger's output."""
        return int(config.vision_config.out_hidden_size)

    def keys_width(self, config: Any) -> int:
        """Returns d: the last block's output."""
        return int(config.vision_config.hidden_size)

    def obstacle_to(self, method: MethodName, config: Any) -> str | None:
        """Returns why the model cannot run a method."""
        return None if method == "downsample" else super().obstacle_to(method, config)

    def encoded(self, item: Any, max_difference: int, config: Any) -> Tensor | None:
        """Returns the tokens that do not repeat a neighbour.

        Raises:
            ValueError: The processor has made other pixels than 8-bit ones (HTTP 400).
        """
        if getattr(item.feature, "dtype", None) != torch.uint8:
            raise refusal(
                "field",
                "mmtok_skip_repeats compares 8-bit pixels, which this server's image processor does not hand on (its "
                "log says why): serve without --mm-process-config and --image-processor-backend, or send "
                "mmtok_skip_repeats -1",
            )
        side = config.vision_config.spatial_merge_size
        _, rows, columns = grid_of(item)[0].tolist()
        grid = rows // side, columns // side
        pixels = item.feature.cpu().numpy().reshape(grid[0] * grid[1], -1)
        repeated = torch.from_numpy(repeated_tokens(pixels, grid, max_difference))
        return (~repeated).nonzero().flatten() if repeated.any() else None

    def num_sized_frames(self, processor: Any) -> int:
        """Returns the equal frames of an image by whose pixels together SGLang's processor sizes it."""
        return 1

    async def shrink_images(
        self, images: Sequence[Any], asked: Requested, settings: Settings, processor: Any, request: Any
    ) -> Sequence[Any]:
        """Returns the images scaled down before the processor: what a client would send instead.

        Raises:
            ValueError: For `downsample` fewer tokens than the processor enlarges an image to; images that cannot be
                read, or that the caller names by a hash of their own: SGLang would take a smaller one for the whole
                (HTTP 400).
        """
        is_scaled = asked.encoder_scale < 1
        for name in ("mm_hashes", "mm_content_hashes"):
            if any(getattr(request, name, None) or ()):
                # SGLang moves the `content_hash` of an image to the request.
                in_images = name == "mm_content_hashes" and any(getattr(each, "content_hash", None) for each in images)
                sent = "content_hash" if in_images else name
                by = f"mmtok_encoder_scale {asked.encoder_scale:g}" if is_scaled else "mmtok_method downsample"
                raise refusal(
                    "hashes" if is_scaled else "downsample",
                    f"{by} changes the images, which {sent} names: send no {sent}",
                )
        sizes = ProcessorSizes.of(processor, self.num_sized_frames(processor))
        shrink: Callable[..., Any]
        if is_scaled:
            shrink = partial(sizes.scale, scale=asked.encoder_scale)
        else:
            assert isinstance(asked.budget, Budget)  # `check_budget`
            shrink = partial(sizes.shrink, budget=asked.budget)
        return [await asyncio.to_thread(shrink, image, min_tokens_in=settings.min_tokens_in) for image in images or ()]


class QwenWithTimestamps(Qwen):
    """A video has a run of placeholders for each step in time, and the step's timestamp beside it.

    The timestamps stay, and the tokens that begin and end each run, also where none of a run's tokens does; all of them
    keep their positions.
    """

    video_placeholder = "<|video_pad|>"

    def num_runs(self, item: Any) -> int:
        """Returns the steps in time of a video, 1 for an image."""
        return self.num_frames(item)


def grid_of(item: Any) -> Tensor:
    """Returns the [1, 3] patches of an image or video: in time, of two frames each, and by rows and columns."""
    grid: Tensor = item.video_grid_thw if item.is_video() else item.image_grid_thw
    return grid


def _with_grid(item: Any, grid: Tensor) -> Any:
    """Returns the item with another grid."""
    if grid is grid_of(item):
        return item
    copied = copy.copy(item)
    copied.model_specific_data = {**item.model_specific_data, "image_grid_thw": grid}
    return copied


def _layout(whole: Sequence[Tensor], grids: Sequence[Tensor]) -> tuple[tuple[int, ...], ...] | None:
    """Returns the grid of one image that is read whole, None for more images, partly read ones and large ones."""
    if len(grids) > 1 or grids[0] is not whole[0] or int(grids[0].prod(-1).sum()) > MAX_PATCHES:
        return None
    return tuple(tuple(each) for each in grids[0].tolist())


def _parts(items: Sequence[Any]) -> Iterator[list[Any]]:
    """Gives the images that the encoder takes at a time on a CPU, where its attention is of all patches by all."""
    part: list[Any] = []
    num_patches = 0
    for item in items:
        more = int(grid_of(item).prod(-1).sum())
        if part and num_patches + more > _MAX_PATCHES:
            yield part
            part, num_patches = [], 0
        part.append(item)
        num_patches += more
    yield part
