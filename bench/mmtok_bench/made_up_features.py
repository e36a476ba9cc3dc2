"""Features of images that never were, of real sizes: what the selector is timed on."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok_deploy.problem import SelectionProblem

__all__ = ["FEATURE_BYTES", "NUM_WORDS", "make_problem"]

NUM_WORDS = 24
# LLaVA-1.5 and LLaVA-NeXT 7B: the language model's width, and CLIP ViT-L's.
_VISION_WIDTH, _KEY_WIDTH = 4096, 1024
FEATURE_BYTES = 4 * (_VISION_WIDTH + _KEY_WIDTH)
"""Of one token."""

# Tokens of one image resemble one another: as many things are seen as this, each by many tokens.
_NUM_THINGS = 24


def make_problem(num_tokens: int, num_picks: int, seed: int, device: torch.device) -> SelectionProblem:
    """Returns gaussian features around 24 directions, the words around the same ones; float32."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator)

    things, seen_things = gaussian(_NUM_THINGS, _VISION_WIDTH), gaussian(_NUM_THINGS, _KEY_WIDTH)
    thing_of = torch.randint(0, _NUM_THINGS, (num_tokens,), generator=generator)
    named = torch.randint(0, _NUM_THINGS, (NUM_WORDS,), generator=generator)
    return SelectionProblem(
        vision=(things[thing_of] + gaussian(num_tokens, _VISION_WIDTH)).to(device),
        keys=(seen_things[thing_of] + gaussian(num_tokens, _KEY_WIDTH)).to(device),
        text=(things[named] + gaussian(NUM_WORDS, _VISION_WIDTH)).to(device),
        num_picks=num_picks,
    )
