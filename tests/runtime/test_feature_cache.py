from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok_sglang import feature_cache
from mmtok_sglang.cache_key import CacheKeys, digest, keys_of
from mmtok_sglang.feature_cache import FeatureCache, Features
from mmtok_sglang.metrics import SelectionMetrics
from mmtok_sglang.plan import ImagePlan
from tests.runtime.stand_ins import identified, image_item, make_settings

PLAN = ImagePlan(num_tokens=4, num_kept=2, guidance=[3, 1, 2])
KEYS = CacheKeys(make_settings(2))
# An image of 4 tokens of 8 + 6 numbers takes two blocks of the device's memory, and an entry on the host.
IMAGE_BYTES = 2 * 512 + feature_cache._ENTRY_BYTES


def image(pixels: float, plan: ImagePlan | None = PLAN, **data: Tensor) -> Any:
    """Returns an item as the scheduler gets it."""
    item = image_item((0, 1), plan, model_specific_data=data)
    item.feature = item.feature + pixels
    return identified(item, keys=KEYS)


class Encoder:
    """Encodes a batch into one tensor, as encoders do."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []

    def __call__(self, items: list[Any]) -> list[Features]:
        self.batches.append([item.feature.flatten()[0].item() for item in items])
        vision, keys = (
            torch.cat([item.feature.new_full((4, width), float(item.feature.flatten()[0])) for item in items])
            for width in (8, 6)
        )
        return [Features(*each) for each in zip(vision.split(4), keys.split(4), strict=True)]


def recalled(cache: FeatureCache, encoder: Encoder, *items: Any) -> list[float]:
    """Returns the number that the features of each image are made of."""
    every = cache.recall(list(items), encoder)
    for features in every:
        assert (features.vision.shape, features.keys.shape) == ((4, 8), (4, 6))
        assert len(set(features.vision.flatten().tolist() + features.keys.flatten().tolist())) == 1
    return [float(features.vision[0, 0]) for features in every]


def make_cache(num_images: float = 100) -> FeatureCache:
    return FeatureCache(int(num_images * IMAGE_BYTES), SelectionMetrics())


def test_another_question_about_an_image_does_not_encode_it() -> None:
    cache, encoder = make_cache(), Encoder()
    assert recalled(cache, encoder, image(1)) == [1]
    other = image(1, replace(PLAN, guidance=[7], num_kept=3))
    assert recalled(cache, encoder, other) == [1]
    assert encoder.batches == [[1]]


def test_what_is_not_held_of_a_batch_is_encoded_in_one_call_and_in_order() -> None:
    cache, encoder = make_cache(), Encoder()
    recalled(cache, encoder, image(2))
    assert recalled(cache, encoder, image(3), image(2), image(1), image(4)) == [3, 2, 1, 4]
    assert encoder.batches == [[2], [3, 1, 4]]


def test_two_questions_about_an_image_in_one_batch_encode_it_once() -> None:
    cache, encoder = make_cache(), Encoder()
    assert recalled(cache, encoder, image(1), image(2), image(1, replace(PLAN, guidance=[]))) == [1, 2, 1]
    assert encoder.batches == [[1, 2]]


def test_images_that_are_not_pruned_are_encoded_and_not_held() -> None:
    cache, encoder = make_cache(), Encoder()
    for _ in range(2):
        assert recalled(cache, encoder, image(1, None), image(2), image(1, None)) == [1, 2, 1]
    assert encoder.batches == [[1, 2, 1], [1, 1]]
    assert len(cache) == 1


def test_nothing_is_held_without_room() -> None:
    cache, encoder = FeatureCache(0, SelectionMetrics()), Encoder()
    for _ in range(2):
        assert recalled(cache, encoder, image(1), image(1)) == [1, 1]
    assert encoder.batches == [[1, 1]] * 2
    assert (len(cache), cache.size_bytes) == (0, 0)


def test_pruned_images_are_counted() -> None:
    counted = SelectionMetrics()
    cache, encoder = FeatureCache(100 * IMAGE_BYTES, counted), Encoder()
    recalled(cache, encoder, image(1), image(2, None))
    recalled(cache, encoder, image(1), image(3), image(3, replace(PLAN, num_kept=1)), image(2, None))
    names = ("encoded_images", "feature_cache_hits", "feature_cache_misses")
    assert [counted._lately[name] for name in names] == [2, 2, 2]


def test_an_image_larger_than_the_bound_drives_nothing_out() -> None:
    cache, encoder = make_cache(1), Encoder()
    recalled(cache, encoder, image(1))
    large = Features(torch.zeros(80, 8), torch.zeros(80, 6))
    cache.recall([image(2)], lambda items: [large])
    recalled(cache, encoder, image(1))
    assert encoder.batches == [[1]]


@pytest.mark.parametrize("num_images", [2, 2.9])
def test_the_image_not_used_for_longest_goes(num_images: float) -> None:
    cache, encoder = make_cache(num_images), Encoder()
    for pixels in (1, 2, 1, 3):
        recalled(cache, encoder, image(pixels))
    assert (len(cache), cache.size_bytes) == (2, 2 * IMAGE_BYTES)
    assert recalled(cache, encoder, image(1)) == [1]
    assert encoder.batches == [[1], [2], [3]]
    assert recalled(cache, encoder, image(2)) == [2]
    assert encoder.batches[3:] == [[2]]


def test_a_batch_larger_than_the_cache_has_all_its_features() -> None:
    cache, encoder = make_cache(2), Encoder()
    recalled(cache, encoder, image(1))
    assert recalled(cache, encoder, *(image(pixels) for pixels in (1, 2, 3, 4))) == [1, 2, 3, 4]
    assert len(cache) == 2


def test_ranks_that_run_the_same_batches_hold_the_same_images() -> None:
    first, second = ((make_cache(3), Encoder()) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        batch = torch.randint(0, 6, (3,), generator=generator).tolist()
        for cache, encoder in (first, second):
            assert recalled(cache, encoder, *(image(pixels) for pixels in batch)) == batch
    assert first[1].batches == second[1].batches


def test_a_held_image_does_not_keep_its_batch() -> None:
    cache, encoder = make_cache(), Encoder()
    cache.recall([image(1), image(2)], encoder)
    (held,) = cache.recall([image(1)], encoder)
    assert held.vision.untyped_storage().nbytes() + held.keys.untyped_storage().nbytes() == 4 * (8 + 6) * 4


def test_attention_is_held_and_counted() -> None:
    cache, plan = make_cache(), replace(PLAN, method="visionzip")
    whole = Features(torch.zeros(4, 8), torch.zeros(4, 6), torch.arange(8.0).split(4)[1])
    for _ in range(2):
        (held,) = cache.recall([image(1, plan)], lambda items: [whole])
    assert held.attention is not None
    assert held.attention.tolist() == [4, 5, 6, 7]
    assert cache.size_bytes == IMAGE_BYTES + 512


def test_without_memory_for_a_copy_an_image_is_held_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one rank would encode it again, and the others would not."""

    def no_memory(tensor: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    cache, encoder = make_cache(), Encoder()
    monkeypatch.setattr(Tensor, "clone", no_memory)
    assert recalled(cache, encoder, image(1), image(2)) == [1, 2]
    assert recalled(cache, encoder, image(1), image(2)) == [1, 2]
    assert encoder.batches == [[1, 2]]
    assert cache.size_bytes == 2 * IMAGE_BYTES


def test_it_forgets_every_image() -> None:
    cache, encoder = make_cache(), Encoder()
    recalled(cache, encoder, image(1))
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


@pytest.mark.slow
def test_entries_of_tiny_images_are_counted_as_they_are() -> None:
    """What is counted beside their numbers covers what an entry takes of the host's memory."""
    cache, template, num_images = FeatureCache(1 << 30, SelectionMetrics()), image(1), 20_000

    def resident_bytes() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    for number in range(num_images):
        template.model_specific_data["mmtok_keys"][0] = digest(number)
        cache.recall([template], lambda items: [Features(*(torch.zeros(1, 1) for _ in range(3)))])
    assert len(cache) == num_images
    assert resident_bytes() - before < cache.size_bytes
    assert cache.size_bytes == num_images * (3 * 512 + feature_cache._ENTRY_BYTES)


def test_an_image_that_is_not_pruned_is_not_held() -> None:
    unpruned = image(1, None)
    assert keys_of(unpruned) is not None
    cache = make_cache()
    recalled(cache, Encoder(), unpruned)
    assert len(cache) == 0


@pytest.mark.parametrize("has_attention", [True, False])
def test_all_tiles_as_one(has_attention: bool) -> None:
    vision, keys, attention = torch.rand(3, 4, 8), torch.rand(3, 4, 6), torch.rand(3, 4) if has_attention else None
    joined = Features(vision, keys, attention).in_one_piece()
    assert torch.equal(joined.vision, torch.cat([*vision])[None])
    assert torch.equal(joined.keys, torch.cat([*keys])[None])
    assert (joined.attention is not None) == has_attention
    assert attention is None or torch.equal(joined.attention, torch.cat([*attention])[None])  # type: ignore[arg-type]
