"""Synthetic features, on which a selection is tried and timed without an image."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["synthetic_features"]

# Tokens of one image resemble one another: it shows this many things, each in many tokens.
_NUM_THINGS = 24


def synthetic_features(
    num_tokens: int, num_words: int, vision_width: int, keys_width: int, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gaussian features around 24 directions, and words around some of the same, so that gains differ.

    Args:
        num_tokens: N.
        num_words: M.
        vision_width: D, the width of the language model.
        keys_width: C, the width before the projector.
        seed: The same seed and sizes give the same values on every machine.

    Returns:
        Vision features [N, D], keys [N, C] and text embeddings [M, D], float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator)

    things, seen_things = gaussian(_NUM_THINGS, vision_width), gaussian(_NUM_THINGS, keys_width)
    thing_of = torch.randint(0, _NUM_THINGS, (num_tokens,), generator=generator)
    named = torch.randint(0, _NUM_THINGS, (num_words,), generator=generator)
    vision = things[thing_of] + gaussian(num_tokens, vision_width)
    keys = seen_things[thing_of] + gaussian(num_tokens, keys_width)
    return vision, keys, things[named] + gaussian(num_words, vision_width)
