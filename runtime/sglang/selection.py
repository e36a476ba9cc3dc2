"""Picking the tokens of an image in the scheduler process, right after the vision encoder."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmtok_deploy.runtime.sglang.placeholders import ImagePlan
from mmtok_deploy.runtime.sglang.settings import Settings
from mmtok_deploy.selection import select_tokens

__all__ = ["TokenSelector"]

logger = logging.getLogger(__name__)

# Remembered selections: 8 bytes a kept token, so about 20 MB at 160 tokens; SGLang's own cache of embeddings (100 MB
# by default) holds far fewer images.
_MAX_REMEMBERED = 16384


class TokenSelector:
    """Selects the kept tokens of images and remembers them by the image's cache key; one a scheduler process.

    A key's first selection stands while it is remembered: an image encoded again in the middle of its own prefill,
    in another batch and so with other rounding, must not change its mind about which tokens it keeps.
    """

    def __init__(self, settings: Settings) -> None:
        self._config = settings.config
        self._kept: OrderedDict[Any, Tensor] = OrderedDict()
        self.num_fallbacks = 0

    def select(
        self,
        key: object,
        plan: ImagePlan,
        vision: Tensor,
        keys: Tensor,
        embed: Callable[[Tensor], Tensor],
        num_kept: int | None = None,
    ) -> Tensor:
        """Returns the kept tokens of one image, or of one tile, in raster order.

        A selection that cannot be made (NaN features, every token excluded) never takes the scheduler down: evenly
        spaced tokens take its place, with a log line and a count.

        Args:
            key: What to remember the selection by.
            plan: The image's plan.
            vision: [N, D] tokens after the projector.
            keys: [N, d] features before it.
            embed: The language model's input embedding.
            num_kept: Tokens to keep, if these are not the whole image's.

        Returns:
            [K] int64 on the features' device.
        """
        num_kept = plan.num_kept if num_kept is None else num_kept
        remembered = self._kept.get(key)
        if remembered is None:
            remembered = self._select(plan, vision, keys, embed, num_kept)
            self._kept[key] = remembered
            if len(self._kept) > _MAX_REMEMBERED:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return remembered

    def remembered(self, key: object) -> Tensor | None:
        """Returns the selection under `key`, None if there is none (any more)."""
        return self._kept.get(key)

    def _select(
        self, plan: ImagePlan, vision: Tensor, keys: Tensor, embed: Callable[[Tensor], Tensor], num_kept: int
    ) -> Tensor:
        guidance = torch.tensor(plan.guidance, dtype=torch.int64, device=vision.device)
        # Embedded before anything can fail: with tensor parallelism every rank has to take part.
        text = embed(guidance) if plan.guidance else vision.new_empty(0, vision.shape[1])
        excluded = None if plan.excluded is None else plan.excluded.to(vision.device)
        try:
            selection = select_tokens(vision, keys, text, num_kept, config=self._config, excluded=excluded)
            if len(selection) != num_kept:
                raise ValueError(f"only {len(selection)} of {num_kept} tokens may be picked")
        except Exception as error:  # whatever it is, it is one image's; the server has others
            self.num_fallbacks += 1
            _fallback_metric().inc()
            logger.warning(
                "MMTok: no selection for an image of %d tokens (%s: %s); %d evenly spaced tokens instead, the "
                "%d. time since the start",
                len(vision),
                type(error).__name__,
                error,
                num_kept,
                self.num_fallbacks,
            )
            # In integers: float32 repeats a token where there are more than 10,000.
            return torch.arange(num_kept, device=vision.device) * (len(vision) - 1) // max(num_kept - 1, 1)
        return selection.kept


@cache
def _fallback_metric() -> Any:
    # Imported here: prometheus_client looks for SGLang's multi-process folder when it is first imported, and that
    # folder is set between the moment the hooks are installed and the start of the schedulers.
    from prometheus_client import Counter

    return Counter("mmtok:selection_fallbacks", "Images that kept evenly spaced tokens for want of a selection.")
