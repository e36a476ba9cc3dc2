"""The identity of a pruned image: with its guidance in SGLang's caches, without it in the cache of features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from mmtok_deploy.runtime.sglang.placeholders import ImagePlan, plan_of, share_guidance
from mmtok_deploy.runtime.sglang.settings import Settings

__all__ = ["CacheKeys", "image_key"]

_IMAGE_KEY = "mmtok_image_key"
# What says how an image's pixels lie, where the model is given it: equal pixels may be of images of another shape.
_SHAPES = ("image_grid_thw", "image_sizes")


def image_key(item: Any) -> int | None:
    """Returns the identity of a pruned image without its guidance and budget, None for an image that is not pruned."""
    key: int | None = item.model_specific_data.get(_IMAGE_KEY)
    return key


class CacheKeys:
    """Makes guidance, budget, method and constants part of each pruned image's hash; one a scheduler process."""

    def __init__(self, settings: Settings) -> None:
        self._config = settings.config

    def from_processor_output(self, original: Callable[..., Any], output: Any, **kwargs: Any) -> Any:
        """Returns SGLang's multimodal inputs, each pruned image under a hash of its own.

        Without it, two questions about one image would share KV of different tokens.

        Hooks: sglang 0.5.23 srt/managers/schedule_batch.py MultimodalInputs.from_processor_output: after hashes that
        a caller may have given. Can go when items take a salt.
        """
        share_guidance(output.mm_items)
        inputs = original(output, **kwargs)
        for item in inputs.mm_items:
            plan = plan_of(item)
            if plan is not None and image_key(item) is None:
                shapes = [
                    item.model_specific_data[name].tolist() for name in _SHAPES if name in item.model_specific_data
                ]
                item.model_specific_data[_IMAGE_KEY] = _hash(item.hash, plan.num_tokens, shapes, plan.encoding)
                item.set_hash(self.key(item.hash, plan))
        return inputs

    def key(self, image_hash: int, plan: ImagePlan) -> int:
        """Returns the 64-bit hash of an image under a plan."""
        return _hash(image_hash, plan.num_tokens, plan.num_kept, self._config, plan.guidance, plan.method, plan.seed)


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
