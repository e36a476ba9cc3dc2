"""Small stand-ins for what SGLang hands to the plugin; items and outputs are SGLang's own classes."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from torch import Tensor

from mmtok_bench.families import FamilyName
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_deploy import Budget
from mmtok_deploy.presets import PRESETS
from mmtok_sglang.cache_key import CacheKeys, ImageKeys, digest, name_images
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.selection import ImageTokens
from mmtok_sglang.settings import Settings

__all__ = [
    "IMAGE_ID",
    "Request",
    "features",
    "identified",
    "image_item",
    "image_names",
    "image_tokens",
    "make_settings",
    "mrope_positions",
    "prompt_output",
    "stand_in_processor",
    "tiny_checkpoint",
    "unchanged_environment",
]

IMAGE_ID = 9
"""The placeholder's token id."""

Request = SimpleNamespace


def make_settings(budget: str | int = "all", family: str = "qwen2.5-vl", **constants: Any) -> Settings:
    preset = PRESETS[family]
    return Settings(family, Budget.parse(budget), replace(preset.config, **constants), preset.guidance)


def image_item(span: tuple[int, int], plan: ImagePlan | None = None, **fields: Any) -> Any:
    item = MultimodalDataItem(modality=Modality.IMAGE, feature=torch.zeros(1, 3, 28, 28), offsets=[span], **fields)
    if plan is not None:
        plan.attach(item)
    return item


def prompt_output(input_ids: Sequence[int], *, mrope: bool = False, **fields: Any) -> Any:
    """Returns a processor's output whose runs of IMAGE_ID are its images, one item each."""
    ids = torch.tensor(input_ids)
    is_image = torch.cat([torch.tensor([False]), ids == IMAGE_ID, torch.tensor([False])]).int()
    edges = is_image.diff()
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), ((edges == -1).nonzero()[:, 0] - 1).tolist()
    if mrope:
        fields["mrope_positions"] = mrope_positions(len(ids))
        fields["mrope_position_delta"] = torch.tensor([[-3]])
    items = [image_item(span) for span in zip(starts, ends, strict=True)]
    return MultimodalProcessorOutput(mm_items=items, input_ids=list(input_ids), **fields)


def mrope_positions(length: int) -> Tensor:
    """Returns [3, length] positions that all differ."""
    return torch.arange(length) + torch.tensor([[0], [1000], [2000]])


def features(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, torch.nn.Embedding]:
    """Returns vision tokens, keys, and an input embedding of 16 ids."""
    generator = torch.Generator().manual_seed(seed)
    vision, keys, rows = (
        torch.randn(size, generator=generator) for size in ((num_tokens, 8), (num_tokens, 6), (16, 8))
    )
    return vision, keys, torch.nn.Embedding.from_pretrained(rows)


def identified(item: Any, content: bytes | None = None, keys: CacheKeys | None = None) -> Any:
    """Returns the item with the keys that a scheduler process gives it; `content` stands for its pixels' digest."""
    asyncio.run(name_images([item], SimpleNamespace(), trusts_hashes=False))
    if content is not None:
        item.model_specific_data["mmtok_source"][0] = content
    (keys or CacheKeys(make_settings(2))).identify(item)
    return item


def image_tokens(key: object, plan: ImagePlan, seed: int = 0) -> tuple[ImageTokens, torch.nn.Embedding]:
    """Returns an image's tokens as the selector gets them, and an input embedding of 16 ids."""
    vision, keys, embed = features(plan.num_tokens, seed)
    return ImageTokens(image_names(key), plan, vision, keys, plan.num_kept), embed


def image_names(key: object) -> ImageKeys:
    """Returns keys that differ where `key` does."""
    name = digest(repr(key))
    return ImageKeys(name, name, name, ((name, 0), (digest("selection", name), 0)))


def tiny_checkpoint(factory: pytest.TempPathFactory, family: FamilyName) -> str:
    """Returns a tiny checkpoint's folder, made once a test run."""
    return str(make_tiny_checkpoint(family, factory.getbasetemp() / "checkpoints" / family))


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Undoes what SGLang writes into the environment when arguments are resolved."""
    with mock.patch.dict(os.environ):
        yield


class StandInTokenizer:
    """One token a letter: its code point."""

    def __call__(
        self, words: list[str], *, is_split_into_words: bool, add_special_tokens: bool
    ) -> dict[str, list[int]]:
        assert is_split_into_words
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for word in words for letter in word]}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("<|image_pad|>" if token == IMAGE_ID else chr(token) for token in ids)


@functools.cache
def stand_in_processor() -> Any:
    return SimpleNamespace(
        _processor=SimpleNamespace(tokenizer=StandInTokenizer()), hf_config=SimpleNamespace(), pixel_scale=None
    )
