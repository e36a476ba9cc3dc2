"""The keys of every cache that an image meets: SGLang's prefix cache and cache of embeddings, and our own two.

A key is a SHA-256 digest of everything that the cached value depends on:

- of features: the image's pixels and how they lie (every value that the processor gives the model), what the encoder
  is asked for, and the scope. Where SGLang knows which bytes and settings the pixels were made from, their digest is
  remembered by these: hashing 200 KB of a file takes less than hashing its pixels.
- of a selection, and of the prefix cache: the features' key, N, K, the parts, the text between runs of placeholders,
  the guidance, the mask of tokens that may not be picked, the tokens' positions relative to the first, the method, its
  seed, by which side of the projector tokens are compared, and the constants. The features' key depends on none of
  these but for a method that has the encoder read other pixels, or keep its attention.

The scope keeps requests apart that must not share: the version of the weights and of the request's adapter, the
adapter, and the caller's `extra_key` and `cache_salt`. Moving a key on (`CacheKeys.move_on`) makes new requests miss
what is held under it, and leaves requests that are under way what they have.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.mem_cache.multimodal_cache import MultiModalStaticCache
from torch import Tensor

from mmtok_sglang.plan import ImagePlan, plan_of, share_guidance
from mmtok_sglang.refusals import refusal
from mmtok_sglang.request import requested
from mmtok_sglang.settings import Settings
from mmtok_sglang.stages import image_stage

__all__ = [
    "CacheKeys",
    "ImageKeys",
    "check_embeddings",
    "digest",
    "has_images",
    "keys_of",
    "name_by_source",
    "name_images",
    "names_of",
    "names_together",
    "naming",
]

_SOURCE = "mmtok_source"
_KEYS = "mmtok_keys"
_MADE_FROM = "mmtok_made_from"
# Digests of pixels by what they were made from, 200 bytes each.
_remembered: dict[str, bytes] = {}
_MAX_REMEMBERED = 1 << 14
# What travels on an item and is not the image's: ours, and where SGLang's transport keeps a tensor.
_NOT_OF_THE_IMAGE = ("mmtok", "_sglang_")
_NAMES_IN_AN_IMAGE = ("content_hash", "hash", "mm_hash", "identity", "pad_value", "pad_values")
_NAMESPACE = "mmtok_weights="
# Keys that were moved on, of which a server sees few: selections that fell back, adapters that were loaded. When there
# are more, all keys move on at once.
_MAX_MOVED = 4096
# Names of embeddings, 200 bytes each; those whose embeddings are gone are forgotten beyond it.
_MAX_OWNERS = 1 << 16


@dataclass(frozen=True, slots=True)
class ImageKeys:
    """The keys of one image of a request, 32 bytes each.

    Args:
        image: The key of the image's features.
        selection: The key of its selection and of its place in the prefix cache; None for an image that is not pruned.
        draw: What a method that draws is seeded with: the same for the same image, question and budget on every
            server, whatever the scope.
        bases: `image` and `selection` before they were moved on, and how often each was.
    """

    image: bytes
    selection: bytes | None
    draw: bytes
    bases: tuple[tuple[bytes, int], tuple[bytes, int]]


def keys_of(item: Any) -> ImageKeys | None:
    """Returns the keys of SGLang's item, None before the scheduler has made them."""
    values = item.model_specific_data.get(_KEYS)
    if values is None:
        return None
    image, selection, draw, bases = values
    return ImageKeys(image, selection, draw, tuple(tuple(base) for base in bases))  # type: ignore[arg-type]


def digest(*parts: Any) -> bytes:
    """Returns the SHA-256 digest of values, of which no two that differ are written alike.

    Args:
        parts: None, numbers, text, bytes, tensors, arrays, enumerations, dataclasses, and sequences and mappings of
            such. A list and a tuple of the same values are the same: transport makes lists of tuples.

    Raises:
        TypeError: Another type.
    """
    hasher = hashlib.sha256()
    _write(hasher.update, parts)
    return hasher.digest()


def _write(put: Callable[[Any], None], value: Any) -> None:
    """Writes a value as its kind, its size and its bytes."""
    if value is None:
        put(b"N")
    elif isinstance(value, bool | np.bool_):
        put(b"T" if value else b"F")
    elif isinstance(value, Enum):
        _write_bytes(put, b"E", f"{type(value).__name__}.{value.name}".encode())
    elif isinstance(value, int | np.integer):
        _write_bytes(put, b"I", str(int(value)).encode())
    elif isinstance(value, float | np.floating):
        put(b"D" + struct.pack(">d", float(value)))
    elif isinstance(value, str):
        _write_bytes(put, b"S", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes | bytearray):
        _write_bytes(put, b"B", value)
    elif isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1)
        _write_bytes(put, b"A", f"torch {value.dtype!s} {tuple(value.shape)}".encode())
        _write_bytes(put, b"B", data.view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        _write_bytes(put, b"A", f"numpy {value.dtype.str} {value.shape}".encode())
        _write_bytes(put, b"B", np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        put(b"C")
        _write(put, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        put(b"M%d:" % len(value))
        for name in sorted(value, key=str):
            _write(put, name)
            _write(put, value[name])
    elif isinstance(value, list | tuple):
        put(b"L%d:" % len(value))
        for each in value:
            _write(put, each)
    else:
        raise TypeError(f"a cache key is made of plain values and tensors, got {type(value).__name__}")


def _write_bytes(put: Callable[[Any], None], kind: bytes, data: Any) -> None:
    put(kind + b"%d:" % len(data))
    put(data)


def naming(process: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """Returns a hook on a processor that also names the images, and refuses names that the caller brings.

    Args:
        process: The hook that plans and cuts: what it leaves on an item is part of the image's names.
        settings: The server's.
    """

    async def process_mm_data(
        original: Callable[..., Any], processor: Any, image_data: Any, *args: Any, **kwargs: Any
    ) -> Any:
        request = kwargs["request_obj"]
        if not settings.trust_image_hashes:
            given = _given_names(request, image_data)
            asked = requested(getattr(request, "mm_processor_kwargs", None), settings)
            if given and not asked.changes_nothing:
                raise refusal(
                    "hashes",
                    f"this request names its images itself ({', '.join(given)}): two images under one name would share "
                    "their tokens. Send none, or ask the operator for --mmtok-trust-image-hashes",
                )
        output = await process(original, processor, image_data, *args, **kwargs)
        if output is not None and output.mm_items:
            await name_images(output.mm_items, request, trusts_hashes=settings.trust_image_hashes)
        return output

    return process_mm_data


def _given_names(request: Any, image_data: Any) -> list[str]:
    """Returns the names of the fields by which a caller says which image an image is."""
    fields = [name for name in ("mm_hashes", "mm_content_hashes") if any(getattr(request, name, None) or ())]
    for image in image_data if isinstance(image_data, list) else [image_data]:
        entries = image if isinstance(image, Mapping) else {"content_hash": getattr(image, "content_hash", None)}
        fields += [name for name in _NAMES_IN_AN_IMAGE if entries.get(name) is not None]
    return list(dict.fromkeys(fields))


async def name_images(items: Sequence[Any], request: Any, *, trusts_hashes: bool) -> None:
    """Leaves on each item what the scheduler makes its keys of; runs in the tokenizer process, after the processor.

    Hashing takes a thread, so that other requests go on meanwhile. Pixels that are on a device, or in its shared
    memory, are left to the scheduler.

    Args:
        items: SGLang's items, with the plans of those that are pruned.
        request: SGLang's request.
        trusts_hashes: The caller's `mm_hashes` name the images, in place of their pixels.
    """
    # As SGLang reads them: a list of another length, and what is not a number, name nothing.
    hashes = getattr(request, "mm_hashes", None) if trusts_hashes else None
    named = [_number(each) for each in hashes] if hashes and len(hashes) == len(items) else [None] * len(items)
    contents = await asyncio.to_thread(_contents, items, named)
    scope = [getattr(request, name, None) for name in ("lora_id", "extra_key", "cache_salt")]
    for item, name, content in zip(items, named, contents, strict=True):
        item.model_specific_data.pop(_KEYS, None)
        item.model_specific_data[_SOURCE] = [content, name is not None, scope]


def _number(name: Any) -> int | None:
    try:
        return int(name, 16) & (2**64 - 1)
    except (TypeError, ValueError):
        return None


def _contents(items: Sequence[Any], names: Sequence[int | None]) -> list[bytes | None]:
    with image_stage("hash"):
        return [_content(*each) for each in zip(items, names, strict=True)]


def name_by_source(item: Any, name: str) -> None:
    """Leaves on SGLang's item by what `name_images` remembers the digest of its pixels.

    Args:
        item: SGLang's item of an image.
        name: A SHA-256 digest of all that the pixels were made from: the file's bytes and the processor's settings.
    """
    # Not among the data that travels, and that a caller may bring.
    vars(item)[_MADE_FROM] = name


def _content(item: Any, name: int | None = None) -> bytes | None:
    """Returns the digest of what the encoder is given, None where it is not at hand in this process."""
    data = _image_data(item)
    made_from = vars(item).get(_MADE_FROM)
    # In one step: another thread may clear them in between.
    remembered = _remembered.get(made_from) if name is None and made_from is not None else None
    if remembered is not None:
        return remembered
    pixels = (item.feature, item.precomputed_embeddings)
    if not all(_is_at_hand(value) for value in (*pixels, *data.values())):
        return None
    if name is not None:
        shapes = [tuple(getattr(each, "shape", ())) for each in pixels]
        return digest("image named by the caller", item.modality, item.format, name, shapes, data)
    content = digest("image", item.modality, item.format, *pixels, data)
    if made_from is not None:
        if len(_remembered) >= _MAX_REMEMBERED:
            _remembered.clear()
        _remembered[made_from] = content
    return content


def _image_data(item: Any) -> dict[str, Any]:
    """Returns what the model is given of an image beside its pixels: how they lie, and what the encoder is asked."""
    return {name: value for name, value in item.model_specific_data.items() if not name.startswith(_NOT_OF_THE_IMAGE)}


def _is_at_hand(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.device.type == "cpu"
    if isinstance(value, list | tuple):
        return all(map(_is_at_hand, value))
    if isinstance(value, Mapping):
        return all(map(_is_at_hand, value.values()))
    return value is None or isinstance(value, str | bytes | int | float | Enum | np.ndarray | np.generic)


class CacheKeys:
    """Makes the keys of every image in a scheduler process, the same on all ranks; one a process.

    What moves keys on must reach all ranks between the same two requests: `invalidation` sees to that.
    """

    def __init__(self, settings: Settings) -> None:
        executor = (settings.backend, str(settings.engine), settings.onnxruntime_provider)
        self._constants = digest(settings.config, *executor, settings.share_tiles)
        self._version = 0
        self._moved: dict[bytes, int] = {}
        self._num_emptied = 0

    def from_processor_output(self, original: Callable[..., Any], output: Any, **kwargs: Any) -> Any:
        """Returns SGLang's multimodal inputs, each image under an identity of its own.

        Without it, two questions about one image would share KV of different tokens, and two blank pages of different
        shapes KV of different images.
        """
        share_guidance(output.mm_items)
        named = [item for item in output.mm_items if _SOURCE in item.model_specific_data]
        for item in named:
            if item.pad_value is None and item.model_specific_data[_SOURCE][0] is not None:
                # SGLang hashes the pixels of an item that has none, and keeps 64 bits of it.
                item.pad_value = 0
        inputs = original(output, **kwargs)
        for item in inputs.mm_items:
            if _SOURCE in item.model_specific_data and keys_of(item) is None:
                self.identify(item)
                # Filled in with an earlier identity.
                inputs.padded_input_ids = None
        return inputs

    def identify(self, item: Any) -> None:
        """Gives an item its keys, as of now, and its identity in SGLang's caches."""
        content, is_trusted, scope = item.model_specific_data[_SOURCE]
        plan = plan_of(item)
        if content is None:
            content = item.model_specific_data[_SOURCE][0] = _content_here(item)
        keys = self.keys(content, plan, *scope)
        item.model_specific_data[_KEYS] = [keys.image, keys.selection, keys.draw, [list(base) for base in keys.bases]]
        if plan is not None:
            assert keys.selection is not None
            item.set_identity(keys.selection)
        elif is_trusted and item.hash is not None:
            # The operator trusts the caller's name, whose router may count on it.
            item.set_hash(item.hash)
        else:
            item.set_identity(keys.image)

    def keys(
        self,
        content: bytes,
        plan: ImagePlan | None,
        lora_id: str | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> ImageKeys:
        """Returns the keys of an image.

        Args:
            content: Digest of the image as the encoder is given it.
            plan: How it is pruned; None if it is not.
            lora_id: The request's adapter.
            extra_key: The caller's.
            cache_salt: The caller's.
        """
        # SGLang takes an empty text for none.
        scope = (*self._versions(lora_id), lora_id or None, extra_key or None, cache_salt or None)
        image_base = digest("features", content, None if plan is None else plan.encoding, scope)
        image, image_moves = self._moved_on(image_base)
        if plan is None:
            return ImageKeys(image, None, digest(content), ((image_base, image_moves), (b"", 0)))
        asked = digest(*self._asked(plan))
        selection_base = digest("selection", image, asked)
        selection, selection_moves = self._moved_on(selection_base)
        return ImageKeys(
            image,
            selection,
            digest("draw", content, asked),
            ((image_base, image_moves), (selection_base, selection_moves)),
        )

    def change_weights(self) -> None:
        """Moves every key on: the model's weights are others now."""
        self._version += 1

    def change_adapter(self, lora_id: str | None) -> None:
        """Moves every key of an adapter's requests on."""
        base = digest("adapter", lora_id)
        self.move_on([(base, self._moved.get(base, 0))])

    def move_on(self, bases: Iterable[tuple[bytes, int]]) -> None:
        """Moves keys on, each from where it was when it was made; one that has gone on since stays where it is."""
        for base, moves in bases:
            if self._moved.get(base, 0) != moves:
                continue
            if len(self._moved) >= _MAX_MOVED and base not in self._moved:
                self._moved.clear()
                self._num_emptied += 1
            self._moved[base] = moves + 1

    def namespace(self, lora_id: str | None, extra_key: str | None) -> str | None:
        """Returns what a request's `extra_key` in the prefix cache becomes, so that text, too, is of these weights.

        It stays as it is until the weights change.
        """
        versions = self._versions(lora_id)
        if not any(versions) and not (extra_key or "").startswith(_NAMESPACE):
            return extra_key
        # In front: SGLang finds an adapter's name by the end.
        return f"{_NAMESPACE}{'.'.join(map(str, versions))}|{extra_key or ''}"

    def _versions(self, lora_id: str | None) -> tuple[int, int, int]:
        adapter = self._moved.get(digest("adapter", lora_id), 0) if lora_id else 0
        return self._version, self._num_emptied, adapter

    def _moved_on(self, base: bytes) -> tuple[bytes, int]:
        moves = self._moved.get(base, 0)
        return (digest("moved", base, moves) if moves else base), moves

    def _asked(self, plan: ImagePlan) -> Sequence[Any]:
        positions = plan.positions
        return (
            self._constants,
            *(plan.num_tokens, plan.num_kept, plan.method, plan.seed, plan.num_parts),
            torch.tensor(plan.guidance, dtype=torch.int64),
            plan.excluded,
            None if positions is None else positions - positions[:, :1],
            # What few plans have is left out of the others, whose keys and draws stay what they were without it.
            *((plan.between,) if plan.between else ()),
            *((plan.keys,) if plan.keys != "input" else ()),
        )


def has_images(forward_batch: Any) -> bool:
    """True for a prefill batch whose requests have images, before they are embedded."""
    mode = forward_batch.forward_mode
    return not (mode.is_decode() or mode.is_target_verify()) and bool(forward_batch.contains_mm_inputs())


def names_together(items: Sequence[Any]) -> list[tuple[int, list[Any]]]:
    """Returns the names in SGLang's cache of embeddings that are of several items at once, and these items.

    A request's items of one kind are encoded together, and held under one name, where one of them has several runs of
    placeholders: a video of a Qwen3-VL that is not pruned (sglang 0.5.23 srt/managers/mm_schedule.py,
    `_get_chunked_embedding_full`).

    Args:
        items: SGLang's items of a request.
    """
    kinds: dict[Any, list[Any]] = {}
    for item in items:
        kinds.setdefault(item.modality, []).append(item)
    return [
        (MultiModalStaticCache.combine_hashes([item.hash for item in kind]), kind)
        for kind in kinds.values()
        if any(len(item.offsets or ()) > 1 for item in kind)
    ]


def names_of(item: Any, items: Sequence[Any]) -> list[int]:
    """Returns the names in SGLang's cache of embeddings under which an item's tokens may stand.

    Args:
        item: SGLang's item.
        items: All items of its request.
    """
    together = names_together(items)
    return [item.hash, *(name for name, kind in together if any(each is item for each in kind))]


def check_embeddings(forward_batch: Any) -> None:
    """Makes sure that what SGLang's cache of embeddings holds for a batch's images is theirs.

    That cache goes by 64 bits of an image's identity, and for items that are encoded together by a hash of these that
    Python makes. Beside it stands whose each name is; an image whose name is another's gets a name of its own, and what
    stands under a name of nobody, or of other items together, is dropped.

    Args:
        forward_batch: A prefill batch, before its images are embedded.
    """
    cache = mm_schedule.embedding_cache
    if cache is None:
        return
    owners: dict[int, bytes] = cache.__dict__.setdefault("mmtok_owners", {})
    for inputs in forward_batch.mm_inputs or []:
        for item in inputs.mm_items if inputs is not None else []:
            if item.hash is None:
                continue
            owner = item.identity or item.hash.to_bytes(8, "big")
            name = item.hash
            while owners.get(name, owner) != owner:
                name = _next_name(owner, name)
            item.hash = name
            _own(name, owner, owners, cache)
        for name, items in names_together(inputs.mm_items if inputs is not None else []):
            owner = digest([item.identity or item.hash for item in items])
            while owners.get(name, owner) != owner:
                items[0].hash = _next_name(owner, items[0].hash)
                name = MultiModalStaticCache.combine_hashes([item.hash for item in items])
            _own(name, owner, owners, cache)
    if len(owners) > max(_MAX_OWNERS, 2 * len(cache)):
        in_batch = {item.hash for inputs in forward_batch.mm_inputs if inputs is not None for item in inputs.mm_items}
        cache.mmtok_owners = {name: owner for name, owner in owners.items() if name in in_batch or cache.has(name)}


def _next_name(owner: bytes, name: int) -> int:
    return int.from_bytes(digest(owner, name)[:8], "big")


def _own(name: int, owner: bytes, owners: dict[int, bytes], cache: Any) -> None:
    if name not in owners and cache.has(name):
        cache.free(name, None)
    owners[name] = owner


def _content_here(item: Any) -> bytes:
    """Returns what `_content` does, in the scheduler process, where pixels on a device are at hand."""
    data = _image_data(item)
    try:
        return digest(
            *("image", item.modality, item.format),
            *(_on_host(item.feature), _on_host(item.precomputed_embeddings), _on_host(data)),
        )
    except TypeError:
        # Something of SGLang's that is not known here; its own hash is all that there is.
        return digest("image by SGLang's hash", item.hash)


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, list | tuple):
        return [_on_host(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _on_host(each) for name, each in value.items()}
    return value
