"""Vision features kept by image, so that another question about it runs the selection and not the vision encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtok_sglang.cache_key import keys_of
from mmtok_sglang.memory import allocated_bytes
from mmtok_sglang.metrics import SelectionMetrics
from mmtok_sglang.plan import plan_of

__all__ = ["FeatureCache", "Features"]


# What an entry takes on the host: key, objects of three tensors. Measured 1,830 (resident memory, PyTorch 2.14.1).
_ENTRY_BYTES = 2000


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What a selection reads of one image, on the encoder's device.

    Args:
        vision: [tiles, n, D] tokens after the projector; an image in one piece is one tile.
        keys: [tiles, n, d] features before it.
        attention: [tiles, n] what the encoder pays to each token, where the plan's method goes by it.
    """

    vision: Tensor
    keys: Tensor
    attention: Tensor | None = None

    def in_one_piece(self) -> Features:
        """Returns the features of all tiles, one after another, as those of one."""
        each = (None if each is None else each.flatten(0, 1)[None] for each in (self.vision, self.keys, self.attention))
        return Features(*each)  # type: ignore[arg-type]

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensors take where each is alone in its memory, and their entry in a cache."""
        attention = 0 if self.attention is None else allocated_bytes(self.attention)
        return allocated_bytes(self.vision) + allocated_bytes(self.keys) + attention + _ENTRY_BYTES


class FeatureCache:
    """The features of the images used last, on the encoder's device; one a scheduler process.

    The key is of the image alone (`ImageKeys.image`): neither guidance nor budget is in it.

    With tensor parallelism every rank has a cache of its own, and since the ranks run the same batches, whose features
    have the same sizes, all hold the same images: the collectives inside the encoder are entered by all or by none. So
    nothing that may differ between ranks, such as free memory or time, may decide what is held.

    Args:
        max_bytes: What is held at most; 0 holds nothing.
        metrics: Counts hits, misses and encoded images.
    """

    def __init__(self, max_bytes: int, metrics: SelectionMetrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._features: OrderedDict[object, Features] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._features)

    def recall(self, items: Sequence[Any], encode: Callable[[list[Any]], list[Features]]) -> list[Features]:
        """Returns the features of each image: those that are held, the others encoded in one call.

        Args:
            items: SGLang's items. One without a plan (an image that is not pruned) is encoded and not held: SGLang's
                own cache of embeddings keeps it by image already.
            encode: Encodes items; called once or, if all are held, not at all. One image under two questions is one
                item there.
        """
        names = [_name(item) if self._max_bytes else None for item in items]
        keys: list[object] = [("item", place) if name is None else name for place, name in enumerate(names)]
        known = {key: self._features[key] for key in keys if key in self._features}
        missing: dict[object, Any] = {}
        for key, item in zip(keys, items, strict=True):
            if key not in known:
                missing.setdefault(key, item)
        if missing:
            known.update(zip(missing, encode(list(missing.values())), strict=True))
        named = [name for name in names if name is not None]
        for name in named:
            self._hold(name, known[name])
        num_misses = len(missing.keys() & set(named))
        self._metrics.count_encoding(
            num_encoded=sum(plan_of(item) is not None for item in missing.values()),
            num_hits=len(named) - num_misses,
            num_misses=num_misses,
            held_bytes=self.size_bytes,
        )
        return [known[key] for key in keys]

    def clear(self) -> None:
        """Forgets every image; the model's weights may have changed."""
        self._features.clear()
        self.size_bytes = 0
        self._metrics.count_encoding(num_encoded=0, num_hits=0, num_misses=0, held_bytes=0)

    def _hold(self, name: object, features: Features) -> None:
        if name not in self._features:
            if features.size_bytes > self._max_bytes:
                return
            while self.size_bytes + features.size_bytes > self._max_bytes:
                self.size_bytes -= self._features.popitem(last=False)[1].size_bytes
            self._features[name] = Features(
                _without_batch(features.vision),
                _without_batch(features.keys),
                None if features.attention is None else _without_batch(features.attention),
            )
            self.size_bytes += features.size_bytes
        self._features.move_to_end(name)


def _name(item: Any) -> bytes | None:
    """Returns the key of an image's features, None for an image that is not pruned."""
    keys = keys_of(item)
    return None if keys is None or plan_of(item) is None else keys.image


def _without_batch(rows: Tensor) -> Tensor:
    """Returns the rows in memory of their own: a view would keep the whole batch that they were encoded in."""
    if rows.untyped_storage().nbytes() == rows.nbytes:
        return rows
    try:
        return rows.clone()
    except torch.OutOfMemoryError:
        # On this rank perhaps alone: the image is held all the same, since the others hold it.
        return rows
