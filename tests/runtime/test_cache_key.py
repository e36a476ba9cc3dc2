from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.managers.schedule_batch import MultimodalInputs, MultimodalProcessorOutput
from sglang.srt.mem_cache.multimodal_cache import EmbeddingResult, MultiModalStaticCache
from torch import Tensor

from mmtok_sglang import cache_key
from mmtok_sglang.cache_key import (
    CacheKeys,
    ImageKeys,
    check_embeddings,
    digest,
    keys_of,
    name_by_source,
    name_images,
    names_together,
    naming,
)
from mmtok_sglang.plan import ImagePlan
from tests.runtime.stand_ins import identified, image_item, make_settings

PLAN = ImagePlan(num_tokens=6, num_kept=2, guidance=[3, 1, 2])
CONTENT = bytes(32)


def inputs_of(*items: Any, keys: CacheKeys | None = None, request: Any = None, trusts_hashes: bool = False) -> Any:
    """Returns SGLang's inputs of items that went through both processes."""
    asyncio.run(name_images(items, request or SimpleNamespace(), trusts_hashes=trusts_hashes))
    return (keys or CacheKeys(make_settings(2))).from_processor_output(
        MultimodalInputs.from_processor_output, MultimodalProcessorOutput(mm_items=list(items))
    )


@functools.cache
def _server(num_updates: int, *constants: tuple[str, Any]) -> CacheKeys:
    keys = CacheKeys(make_settings(2, **dict(constants)))
    for _ in range(num_updates):
        keys.change_weights()
    return keys


@dataclass(frozen=True)
class Asked:
    """One image of one request, and the state of the server that it meets."""

    pixels: Tensor
    data: dict[str, Tensor]
    plan: ImagePlan | None
    constants: dict[str, Any]
    lora_id: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    num_updates: int = 0

    def keys(self) -> ImageKeys:
        keys = _server(self.num_updates, *sorted(self.constants.items()))
        item = image_item((0, 1), self.plan, model_specific_data=dict(self.data))
        item.feature = self.pixels
        item.model_specific_data["mmtok_source"] = [None, False, [self.lora_id, self.extra_key, self.cache_salt]]
        keys.identify(item)
        found = keys_of(item)
        assert found is not None
        assert item.identity == (found.image if self.plan is None else found.selection)
        return found


# Few values, so that pairs are often near: an empty text and none, a number and its text, one list and its parts.
_TEXTS = [None, "", "a", "b", "ab", "None", "('a', 'b')", "\x00", "é", "a|b"]


def _random_asked(rng: random.Random) -> Asked:
    rows, columns = rng.choice([(2, 8), (4, 4), (8, 2), (1, 16)])
    num_tokens = rng.randrange(4, 9)
    mask = torch.tensor([rng.random() < 0.3 for _ in range(num_tokens)])
    plan = ImagePlan(
        num_tokens=num_tokens,
        num_kept=rng.randrange(1, 4),
        guidance=[rng.randrange(12) for _ in range(rng.randrange(4))],
        excluded=rng.choice([None, mask]),
        positions=rng.choice([None, _positions(rng, num_tokens)]),
        method=rng.choice(["mmtok", "random", "divprune"]),
        seed=rng.randrange(3),
        keys=rng.choice(["input", "output"]),
        encoded=rng.choice([None, torch.arange(num_tokens - 1)]),
    )
    grid = torch.tensor([[1, rows, columns]])
    return Asked(
        # Blank pages: the same numbers in every shape.
        pixels=torch.full((16, 3), float(rng.randrange(2))),
        data=rng.choice([{"image_grid_thw": grid}, {"image_sizes": grid[:, 1:]}, {}]),
        plan=plan,
        constants={
            "tv_temp": rng.choice([0.1, 1.0]),
            "vv_temp": rng.choice([0.1, 1.0]),
            "alpha": rng.choice([0.1, 1.0]),
        },
        lora_id=rng.choice(_TEXTS),
        extra_key=rng.choice(_TEXTS),
        cache_salt=rng.choice(_TEXTS),
        num_updates=rng.randrange(2),
    )


def _positions(rng: random.Random, num_tokens: int) -> Tensor:
    return torch.arange(num_tokens) * rng.choice([1, 2]) + torch.tensor([[0], [rng.randrange(3)], [0]])


def _other(rng: random.Random, values: list[Any], value: Any) -> Any:
    """Returns another of the values; an empty text is none."""
    return rng.choice([each for each in values if (each or None) != (value or None)])


def _longer(mask: Tensor) -> Tensor:
    flipped = mask.clone()
    flipped[0] = ~flipped[0]
    return flipped


def _plan_with(asked: Asked, **changes: Any) -> Asked:
    assert asked.plan is not None
    return replace(asked, plan=replace(asked.plan, **changes))


def _with_another_mask(asked: Asked) -> Asked:
    assert asked.plan is not None
    mask = asked.plan.excluded
    return _plan_with(
        asked, excluded=torch.ones(asked.plan.num_tokens, dtype=torch.bool) if mask is None else _longer(mask)
    )


def _with_other_positions(asked: Asked) -> Asked:
    assert asked.plan is not None
    positions = asked.plan.positions
    if positions is None:
        return _plan_with(asked, positions=torch.zeros(3, asked.plan.num_tokens, dtype=torch.int64))
    return _plan_with(asked, positions=positions + torch.arange(positions.shape[1]) // 2)


def _with_other_keys(asked: Asked) -> Asked:
    assert asked.plan is not None
    return _plan_with(asked, keys="input" if asked.plan.keys == "output" else "output")


def _with_other_patches(asked: Asked, rng: random.Random) -> Asked:
    assert asked.plan is not None
    num_tokens, encoded = asked.plan.num_tokens, asked.plan.encoded
    others = [None, torch.arange(num_tokens - 1), torch.arange(num_tokens), torch.arange(0, num_tokens, 2)]
    return _plan_with(asked, encoded=rng.choice([each for each in others if str(each) != str(encoded)]))


def _with_data(asked: Asked, rng: random.Random) -> Asked:
    if not asked.data:
        return replace(asked, data={"image_grid_thw": torch.tensor([[1, 4, 4]])})
    ((name, value),) = asked.data.items()
    return replace(
        asked,
        data=rng.choice(
            [
                {name: value.flip(-1) if not torch.equal(value.flip(-1), value) else value * 2},
                {name: value[:, :-1]},
                {name: value.float()},
                {"pixel_attention_mask": value},
                {},
            ]
        ),
    )


def _scaled(asked: Asked) -> Asked:
    """The image at half of each side, as the encoder is given it: fewer patches, another grid; N and K may be equal."""
    return replace(
        asked,
        pixels=asked.pixels[: len(asked.pixels) // 4],
        data={name: each // 2 for name, each in asked.data.items()},
    )


# What each field is changed to, and whether the features' key depends on it.
_CHANGES: dict[str, tuple[Callable[[Asked, random.Random], Asked], bool]] = {
    "pixels": (lambda asked, rng: replace(asked, pixels=asked.pixels + 1), True),
    "one pixel": (lambda asked, rng: replace(asked, pixels=asked.pixels.index_fill(0, torch.tensor([15]), -1.0)), True),
    "shape of the pixels": (lambda asked, rng: replace(asked, pixels=asked.pixels.reshape(8, 6)), True),
    "dtype of the pixels": (lambda asked, rng: replace(asked, pixels=asked.pixels.bfloat16()), True),
    "how the pixels lie": (_with_data, True),
    "encoder scale": (lambda asked, rng: _scaled(asked), True),
    "patches left out": (_with_other_patches, True),
    "weights": (lambda asked, rng: replace(asked, num_updates=asked.num_updates + 1), True),
    "adapter": (lambda asked, rng: replace(asked, lora_id=_other(rng, _TEXTS, asked.lora_id)), True),
    "extra_key": (lambda asked, rng: replace(asked, extra_key=_other(rng, _TEXTS, asked.extra_key)), True),
    "cache_salt": (lambda asked, rng: replace(asked, cache_salt=_other(rng, _TEXTS, asked.cache_salt)), True),
    "N": (lambda asked, rng: _plan_with(asked, num_tokens=asked.plan.num_tokens + 1), False),  # type: ignore[union-attr]
    "K": (lambda asked, rng: _plan_with(asked, num_kept=asked.plan.num_kept + 1), False),  # type: ignore[union-attr]
    "guidance": (lambda asked, rng: _plan_with(asked, guidance=[*asked.plan.guidance, 5]), False),  # type: ignore[union-attr]
    "its order": (lambda asked, rng: _plan_with(asked, guidance=[12, *asked.plan.guidance]), False),  # type: ignore[union-attr]
    "mask": (lambda asked, rng: _with_another_mask(asked), False),
    "positions": (lambda asked, rng: _with_other_positions(asked), False),
    "method": (lambda asked, rng: _plan_with(asked, method="vision-coverage"), False),
    "keys": (lambda asked, rng: _with_other_keys(asked), False),
    "attention": (lambda asked, rng: _plan_with(asked, method="visionzip"), True),
    "seed": (lambda asked, rng: _plan_with(asked, seed=asked.plan.seed + 1), False),  # type: ignore[union-attr]
    "tv_temp": (lambda asked, rng: replace(asked, constants={**asked.constants, "tv_temp": 0.5}), False),
    "vv_temp": (lambda asked, rng: replace(asked, constants={**asked.constants, "vv_temp": 0.5}), False),
    "alpha": (lambda asked, rng: replace(asked, constants={**asked.constants, "alpha": 0.5}), False),
    "coverage": (lambda asked, rng: replace(asked, constants={**asked.constants, "coverage": "vision"}), False),
    "budget": (lambda asked, rng: replace(asked, plan=None), True),
}


@pytest.mark.slow
def test_values_that_differ_in_one_field_never_share_a_key_and_equal_ones_always_do() -> None:
    """10,000 pairs: the members of each differ in one field, and the first is asked for twice."""
    rng = random.Random(13)
    names = list(_CHANGES)
    for number in range(10_000):
        name = names[number % len(names)]
        change, changes_features = _CHANGES[name]
        one = _random_asked(rng)
        other = change(one, rng)
        first, second = one.keys(), other.keys()
        assert first == one.keys(), name
        assert first.selection != second.selection, (name, one, other)
        assert (first.image != second.image) is changes_features, (name, one, other)


@pytest.mark.slow
def test_no_two_of_many_share_a_key() -> None:
    """Not in one field alone: the keys of all different values are different."""
    rng = random.Random(14)
    seen: dict[bytes | None, str] = {}
    for _ in range(3000):
        asked = _random_asked(rng)
        # An empty text is none.
        scope = [each or None for each in (asked.lora_id, asked.extra_key, asked.cache_salt)]
        written = repr((replace(asked, lora_id=None, extra_key=None, cache_salt=None), scope))
        assert seen.setdefault(asked.keys().selection, written) == written
    assert len(seen) > 2000


def test_the_key_is_the_same_in_every_process() -> None:
    # A constant from another process: ranks and restarts have to agree, which Python's own hash does not.
    (item,) = inputs_of(image_item((0, 1), PLAN)).mm_items
    assert item.identity.hex()[:16] == "a19a4a3e3306cf30"


@pytest.mark.parametrize(
    "values",
    [
        [None, "", "None", b"", 0, 0.0, False, [], {}],
        [1, 1.0, "1", b"1", True, [1], [[1]], {"1": 1}, "I1:1"],
        [["ab"], ["a", "b"], "ab", [["a"], "b"], ["a", ["b"]], ("a", "b", "")],
        [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(6, dtype=torch.float64), np.zeros(6)],
        [torch.zeros(()), torch.zeros(1), torch.zeros(0), torch.zeros(0, 3)],
        [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16), torch.zeros(4, dtype=torch.uint8)],
        [{"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1}, ["a", 1, "b", 2]],
    ],
)
def test_values_that_differ_are_written_differently(values: list[Any]) -> None:
    assert len({digest(value) for value in values}) == len(values)
    assert len({digest(value, "end") for value in values} | {digest(value) for value in values}) == 2 * len(values)


def test_the_order_of_a_mapping_is_no_difference() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": (2,), "a": 1})
    assert digest(torch.arange(6).reshape(2, 3).T) == digest(torch.tensor([[0, 3], [1, 4], [2, 5]]))


def test_what_has_no_plain_value_is_refused() -> None:
    with pytest.raises(TypeError, match="plain values and tensors, got object"):
        digest(object())


def test_a_later_place_in_the_prompt_is_no_difference() -> None:
    first, later = (
        identified(image_item((0, 1), replace(PLAN, positions=torch.arange(6) + torch.full((3, 1), start))))
        for start in (0, 100)
    )
    assert first.identity == later.identity


def test_why_a_number_was_chosen_is_no_difference() -> None:
    chosen = replace(PLAN, auto={"asks": "where", "share": "40%"})
    items = [identified(image_item((0, 1), plan)) for plan in (PLAN, chosen, replace(chosen, num_kept=3))]
    assert items[0].identity == items[1].identity != items[2].identity


def test_every_image_has_an_identity_of_its_own() -> None:
    plans = (None, PLAN, replace(PLAN, guidance=[]))
    (unpruned, pruned, other) = inputs_of(*(image_item((0, 5), plan) for plan in plans)).mm_items
    assert len({item.identity for item in (unpruned, pruned, other)}) == 3
    assert len({item.hash for item in (unpruned, pruned, other)}) == 3
    assert len({value for item in (unpruned, pruned, other) for value in item.padding_values()}) == 12


def test_blank_pages_that_are_not_pruned_are_told_apart_too() -> None:
    """SGLang goes by their pixels alone."""
    grids = ([[1, 24, 24]], [[1, 8, 72]])
    one, other = (image_item((0, 5), model_specific_data={"image_grid_thw": torch.tensor(grid)}) for grid in grids)
    inputs_of(one, other)
    assert not set(one.padding_values()) & set(other.padding_values())


def test_placeholders_filled_in_before_are_filled_in_again() -> None:
    item = image_item((0, 1))
    asyncio.run(name_images([item], SimpleNamespace(), trusts_hashes=False))
    output = MultimodalProcessorOutput(mm_items=[item], input_ids=[9, 9], padded_input_ids=[1, 2])
    keys = CacheKeys(make_settings(2))
    assert keys.from_processor_output(MultimodalInputs.from_processor_output, output).padded_input_ids is None


def test_an_item_that_did_not_come_through_our_processor_keeps_sglangs_hash() -> None:
    ours, theirs = image_item((0, 5)), image_item((0, 5))
    keys = CacheKeys(make_settings(2))
    keys.from_processor_output(MultimodalInputs.from_processor_output, MultimodalProcessorOutput(mm_items=[ours]))
    MultimodalInputs.from_processor_output(MultimodalProcessorOutput(mm_items=[theirs]))
    assert (ours.hash, ours.pad_value) == (theirs.hash, theirs.pad_value)


def test_an_image_of_parts_that_are_not_known_goes_by_sglangs_hash() -> None:
    one, other = (image_item((0, 5), model_specific_data={"part": object()}) for _ in range(2))
    other.feature = other.feature + 1
    inputs_of(one, other)
    assert one.identity != other.identity


def test_the_pixels_of_two_processes_are_one_image() -> None:
    """Those that the tokenizer process has not at hand are read in the scheduler process."""
    here, there = image_item((0, 1), PLAN), image_item((0, 1), PLAN)
    inputs_of(here)
    asyncio.run(name_images([there], SimpleNamespace(), trusts_hashes=False))
    there.model_specific_data["mmtok_source"][0] = None
    CacheKeys(make_settings(2)).identify(there)
    assert here.identity == there.identity


def test_the_digest_of_pixels_is_remembered_by_what_they_were_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def identity_of(pixels: int, made_from: str | None, **request: Any) -> bytes:
        item = image_item((0, 1), PLAN)
        item.feature = torch.full((4,), pixels)
        if made_from is not None:
            name_by_source(item, made_from)
        inputs_of(item, request=SimpleNamespace(**request), trusts_hashes=True)
        identity: bytes = item.identity
        return identity

    monkeypatch.setattr(cache_key, "_remembered", {})
    monkeypatch.setattr(cache_key, "_MAX_REMEMBERED", 2)
    # By whatever it was found, it is the pixels' own.
    assert identity_of(1, "a") == identity_of(1, "b") == identity_of(1, None) != identity_of(2, None)
    # These pixels are not looked at, but where the caller's name is trusted.
    assert identity_of(9, "a") == identity_of(1, None)
    assert identity_of(9, "a", mm_hashes=["0x7"]) not in (identity_of(1, None), identity_of(9, None))
    # Beyond the bound all are forgotten.
    assert identity_of(3, "c") == identity_of(3, None)
    assert identity_of(2, "a") == identity_of(2, None)


def test_a_second_call_changes_nothing() -> None:
    keys = CacheKeys(make_settings(2))
    item = image_item((0, 1), PLAN)
    inputs_of(item, keys=keys)
    first = (item.hash, item.identity, item.padding_values())
    keys.from_processor_output(MultimodalInputs.from_processor_output, MultimodalProcessorOutput(mm_items=[item]))
    assert (item.hash, item.identity, item.padding_values()) == first


def test_keys_that_a_caller_brings_are_made_anew() -> None:
    item, brought = image_item((0, 1), PLAN), image_item((0, 1), PLAN)
    brought.model_specific_data |= {
        "mmtok_keys": [b"", b"", b"", [[b"", 0], [b"", 0]]],
        "mmtok_source": [b"", True, []],
    }
    inputs_of(item, brought)
    assert brought.identity == item.identity


@pytest.mark.parametrize("plan", [None, PLAN])
def test_a_callers_hash_is_no_name_unless_it_is_trusted(plan: ImagePlan | None) -> None:
    def named(pixels: float, *, trusts_hashes: bool) -> Any:
        item = image_item((0, 1), plan)
        item.feature = item.feature + pixels
        asyncio.run(name_images([item], SimpleNamespace(mm_hashes=["0xABC"]), trusts_hashes=trusts_hashes))
        # What SGLang's tokenizer process does once its processor is done.
        item.set_hash(0xABC)
        CacheKeys(make_settings(2)).from_processor_output(
            MultimodalInputs.from_processor_output, MultimodalProcessorOutput(mm_items=[item])
        )
        return item

    assert named(0, trusts_hashes=False).identity != named(1, trusts_hashes=False).identity
    one, other = named(0, trusts_hashes=True), named(1, trusts_hashes=True)
    assert one.padding_values() == other.padding_values()
    if plan is None:
        assert one.hash == 0xABC


@pytest.mark.parametrize("hashes", [["no number"], ["1", "2"], [None], []])
def test_a_hash_that_sglang_ignores_is_no_name(hashes: list[Any]) -> None:
    item, other = image_item((0, 1), PLAN), image_item((0, 1), PLAN)
    inputs_of(item, request=SimpleNamespace(mm_hashes=hashes), trusts_hashes=True)
    inputs_of(other)
    assert item.identity == other.identity


IMAGE_WITH_A_HASH = SimpleNamespace(url="data:", content_hash="sha256:" + "0" * 64)


@pytest.mark.parametrize(
    ("fields", "images", "named"),
    [
        ({"mm_hashes": ["0xabc"]}, ["data:"], "mm_hashes"),
        ({"mm_content_hashes": ["sha256:" + "0" * 64]}, ["data:"], "mm_content_hashes"),
        ({}, [IMAGE_WITH_A_HASH], "content_hash"),
        ({"mm_hashes": ["1"]}, [IMAGE_WITH_A_HASH], "mm_hashes, content_hash"),
        ({}, [{"format": "precomputed_embedding", "hash": 7}], "hash"),
        ({}, ["data:"], None),
        ({"mm_hashes": [None], "mm_content_hashes": None}, ["data:"], None),
        ({"mm_hashes": ["0xabc"], "mm_processor_kwargs": {"mmtok_budget": "all"}}, ["data:"], None),
        (
            {"mm_hashes": ["0xabc"], "mm_processor_kwargs": {"mmtok_budget": "all", "mmtok_encoder_scale": 0.5}},
            ["data:"],
            "mm_hashes",
        ),
    ],
)
def test_images_that_the_caller_names_are_refused_with_a_budget(
    fields: dict[str, Any], images: list[Any], named: str | None
) -> None:
    reached: list[Any] = []

    async def process(original: Any, processor: Any, image_data: Any, **kwargs: Any) -> None:
        reached.append(image_data)

    def ask(**settings: Any) -> None:
        hook = naming(process, replace(make_settings("10%"), **settings))
        asyncio.run(hook(None, None, images, request_obj=SimpleNamespace(**fields)))

    ask(trust_image_hashes=True)
    if named is None:
        ask()
        assert reached == [images, images]
        return
    with pytest.raises(ValueError, match=rf"names its images itself \({named}\).*--mmtok-trust-image-hashes"):
        ask()
    assert reached == [images]


def test_a_selection_that_fell_back_has_another_key_the_next_time_and_its_image_keeps_its_own() -> None:
    keys = CacheKeys(make_settings(2))
    first = keys.keys(CONTENT, PLAN)
    assert keys.keys(CONTENT, PLAN) == first
    keys.move_on([first.bases[1]])
    second = keys.keys(CONTENT, PLAN)
    assert second.selection != first.selection
    assert (second.image, second.draw) == (first.image, first.draw)
    # Found out late, or by two requests: it has gone on already.
    keys.move_on([first.bases[1], first.bases[1]])
    assert keys.keys(CONTENT, PLAN) == second
    keys.move_on([second.bases[1]])
    again = keys.keys(CONTENT, PLAN)
    keys.move_on([first.bases[1]])
    assert keys.keys(CONTENT, PLAN) == again != second
    keys.move_on([second.bases[0]])
    third = keys.keys(CONTENT, PLAN)
    assert third.image != second.image
    assert len({first.selection, second.selection, third.selection}) == 3


def test_what_was_moved_on_is_bounded_and_no_key_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_key, "_MAX_MOVED", 3)
    keys, seen = CacheKeys(make_settings(2)), set()
    for number in range(20):
        for content in (CONTENT, bytes([1] * 32), bytes([number + 2] * 32)):
            asked = keys.keys(content, PLAN)
            assert asked.selection not in seen
            seen.add(asked.selection)
            keys.move_on([asked.bases[1]])
            assert len(keys._moved) <= 3


def test_an_adapter_moves_on_the_keys_of_its_own_requests() -> None:
    keys = CacheKeys(make_settings(2))
    plain, one, other = (keys.keys(CONTENT, PLAN, lora_id) for lora_id in (None, "one", "other"))
    keys.change_adapter("one")
    assert keys.keys(CONTENT, PLAN, "one").image != one.image
    assert (keys.keys(CONTENT, PLAN), keys.keys(CONTENT, PLAN, "other")) == (plain, other)
    assert keys.namespace(None, "x") == "x"
    assert keys.namespace("one", "x") != "x"


def test_text_is_of_the_weights_too_once_they_have_changed() -> None:
    keys = CacheKeys(make_settings(2))
    given = [None, "", "a", "mmtok_weights=1.0.0|", "mmtok_weights=1.0.0|a", "mmtok_weights=0.0.0|a", "|"]
    before = [keys.namespace(None, extra_key) for extra_key in given]
    assert before[:3] == [None, "", "a"]
    keys.change_weights()
    after = [keys.namespace(None, extra_key) for extra_key in given]
    # No text and none are one for SGLang's prefix cache as well.
    assert after[0] == after[1]
    assert len({extra_key or None for extra_key in before + after}) == 2 * len(given) - 2


class Embeddings:
    """SGLang's cache of embeddings, and a batch's images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = MultiModalStaticCache(1 << 20)
        monkeypatch.setattr(mm_schedule, "embedding_cache", self.cache)

    def check(self, *items: Any) -> None:
        check_embeddings(SimpleNamespace(mm_inputs=[None, SimpleNamespace(mm_items=list(items))]))

    def hold(self, item: Any) -> None:
        self.cache.set(item.hash, EmbeddingResult(embedding=torch.zeros(3, 8)))


def colliding(*last_bytes: int) -> list[Any]:
    """Returns items of which SGLang's cache of embeddings sees one name."""
    items = [image_item((0, 1)) for _ in last_bytes]
    for item, last in zip(items, last_bytes, strict=True):
        item.set_identity(bytes(31) + bytes([last]))
    return items


def test_an_embedding_is_given_to_no_other_image_of_its_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = Embeddings(monkeypatch)
    one, other, again = colliding(1, 2, 1)
    embeddings.check(one)
    embeddings.hold(one)
    embeddings.check(other, again)
    assert embeddings.cache.has(again.hash)
    assert not embeddings.cache.has(other.hash)
    embeddings.hold(other)
    (later,) = colliding(2)
    embeddings.check(later)
    assert later.hash == other.hash


def test_colliding_images_of_one_batch_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = Embeddings(monkeypatch)
    items = colliding(1, 2, 3)
    embeddings.check(*items)
    assert len({item.hash for item in items}) == 3


def test_an_embedding_of_nobody_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = Embeddings(monkeypatch)
    (item,) = colliding(1)
    embeddings.hold(item)
    embeddings.check(item)
    assert not embeddings.cache.has(item.hash)


def film_items(*numbers: int) -> list[Any]:
    """Returns items of two runs of placeholders, which SGLang encodes together."""
    items = [image_item((0, 1)) for _ in numbers]
    for item, number in zip(items, numbers, strict=True):
        item.offsets = [(0, 1), (3, 4)]
        item.set_identity(number.to_bytes(8, "big") + bytes(24))
    return items


def test_an_embedding_of_items_together_is_given_to_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python's hash of whole numbers is their remainder: the two have one name together, and one each of their own.
    numbers = (5, 5 + 2**61 - 1)
    embeddings = Embeddings(monkeypatch)
    ((one,), (other,)) = (film_items(number) for number in numbers)
    assert MultiModalStaticCache.combine_hashes([one.hash]) == MultiModalStaticCache.combine_hashes([other.hash])
    embeddings.check(one)
    ((name, _),) = names_together([one])
    embeddings.cache.set(name, EmbeddingResult(embedding=torch.zeros(4, 8)))
    embeddings.check(other)
    assert embeddings.cache.get([one.hash]) is not None
    assert embeddings.cache.get([other.hash]) is None
    # Both go on having names of their own.
    for number, earlier in zip(numbers, (one, other), strict=True):
        (again,) = film_items(number)
        embeddings.check(again)
        assert again.hash == earlier.hash


def test_an_embedding_of_items_together_of_nobody_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = Embeddings(monkeypatch)
    items = film_items(1, 2)
    ((name, together),) = names_together([*items])
    assert together == items
    embeddings.cache.set(name, EmbeddingResult(embedding=torch.zeros(8, 8)))
    embeddings.check(*items)
    assert embeddings.cache.get([item.hash for item in items]) is None


def test_a_trusted_hash_is_not_an_identity_of_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = Embeddings(monkeypatch)
    (item,) = colliding(1)
    named = image_item((0, 1))
    named.set_hash(item.hash)
    embeddings.check(named)
    embeddings.hold(named)
    embeddings.check(item)
    assert not embeddings.cache.has(item.hash)


def test_owners_of_embeddings_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_key, "_MAX_OWNERS", 2)
    embeddings = Embeddings(monkeypatch)
    items = [image_item((0, 1)) for _ in range(4)]
    for number, item in enumerate(items):
        item.set_identity(bytes([number]) * 32)
    embeddings.check(items[0])
    embeddings.hold(items[0])
    for item in items[1:]:
        embeddings.check(item)
    assert set(embeddings.cache.mmtok_owners) <= {items[0].hash, items[2].hash, items[3].hash}
    assert items[0].hash in embeddings.cache.mmtok_owners


def test_the_text_between_the_runs_of_a_video_is_in_its_key() -> None:
    plans = [ImagePlan(4, 2, [], num_frames=2, between=between) for between in ([[1, 2]], [[1, 3]], [])]
    selections = [CacheKeys(make_settings(2)).keys(b"film", plan).selection for plan in plans]
    assert len(set(selections)) == len(plans)
