"""Leaving patches out of the vision encoder that repeat their neighbours: blank paper, plain screens.

A token of a Qwen is a square of 2 x 2 patches. One that looks like the token left of or above it is not encoded: the
encoder reads fewer patches, each at its own place in the image, and the language model gets none of the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmtok_sglang.plan import KEY, plan_of

__all__ = ["dropping_repeated_pixels", "reading_partly"]

# Methods of SGLang 0.5.23's encoders that return a row for each patch of the grids of images (models/qwen2_vl.py,
# qwen2_5_vl.py, qwen3_vl.py): rotations of all encoders, and embeddings of those that have any.
_ROTATIONS = "rot_pos_emb"
_EMBEDDINGS = ("fast_pos_embed_interpolate_from_list", "fast_pos_embed_interpolate_vectorized")
# One that returns the order of tokens by attention windows, and where these end.
_WINDOWS = "get_window_index"


def dropping_repeated_pixels(process: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a hook on a processor whose items have only the pixels that the encoder is to read.

    Args:
        process: The hook that plans images and names them by all of their pixels.
    """

    async def process_mm_data(*args: Any, **kwargs: Any) -> Any:
        output = await process(*args, **kwargs)
        if output is not None:
            skipping = [item for item in output.mm_items if _encoded(item) is not None]
            if skipping:
                await asyncio.to_thread(_drop_pixels, skipping)
        return output

    return process_mm_data


def _drop_pixels(items: Sequence[Any]) -> None:
    for item in items:
        encoded, pixels = _encoded(item), item.feature
        assert encoded is not None
        item.feature = pixels.unflatten(0, (item.model_specific_data[KEY]["num_tokens"], -1))[
            encoded.to(pixels.device)
        ].flatten(0, 1)


def _encoded(item: Any) -> Tensor | None:
    """Returns the tokens of an image that the encoder reads, None if it reads all."""
    plan = plan_of(item)
    return None if plan is None else plan.encoded


@contextmanager
def reading_partly(encoder: Any, items: Sequence[Any], grids: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Has SGLang's encoder read the patches that items have, each at its own place in the image.

    Within it, what the encoder computes of a grid is computed of the image's grid, without the rows of patches that are
    not there.

    Args:
        encoder: The model's `visual`.
        items: SGLang's items.
        grids: The [k, 3] grid of each.

    Yields:
        The grid to give the encoder for each item: of one row of tokens, as many as are read.
    """
    encoded = [_encoded(item) for item in items]
    if all(each is None for each in encoded):
        yield list(grids)
        return
    side = encoder.spatial_merge_size
    merged = side**2
    sizes = [int(grid.prod(-1).sum()) // merged for grid in grids]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    tokens = torch.cat(
        [
            (torch.arange(size) if each is None else each) + start
            for each, size, start in zip(encoded, sizes, starts, strict=False)
        ]
    )
    is_read = torch.zeros(sum(sizes), dtype=torch.bool)
    is_read[tokens] = True
    patches = (tokens[:, None] * merged + torch.arange(merged)).flatten()
    whole = torch.cat(list(grids))

    def like(given: Any) -> Any:
        return whole.tolist() if isinstance(given, list) else whole.to(given.device)

    def of_patches(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def of_read(grid_thw: Any) -> Any:
            values = original(like(grid_thw))
            if isinstance(values, tuple):
                return tuple(each[patches.to(each.device, non_blocking=True)] for each in values)
            return values[patches.to(values.device, non_blocking=True)]

        return of_read

    def of_windows(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def of_read(grid_thw: Any) -> tuple[Tensor, list[int]]:
            order, ends = original(like(grid_thw))
            is_read_in_order = is_read[order]
            num_before = torch.cat([torch.zeros(1, dtype=torch.int64), is_read_in_order.cumsum(0)])
            place = is_read.cumsum(0) - 1
            return place[order[is_read_in_order]], (num_before[torch.tensor(ends) // merged] * merged).tolist()

        return of_read

    by_patch = (_ROTATIONS, *(_EMBEDDINGS if hasattr(encoder, "pos_embed") else ()))
    replaced = {name: of_patches(getattr(encoder, name)) for name in by_patch}
    if hasattr(encoder, "window_size"):
        replaced[_WINDOWS] = of_windows(getattr(encoder, _WINDOWS))
    try:
        for name, method in replaced.items():
            setattr(encoder, name, method)
        yield [
            grid if each is None else grid.new_tensor([[1, side, side * len(each)]])
            for grid, each in zip(grids, encoded, strict=True)
        ]
    finally:
        for name in replaced:
            delattr(encoder, name)
