"""FastV: drops the image tokens that receive the least attention, between two layers of the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FASTV_LAYER", "last_hidden_after_fastv"]

FASTV_LAYER = 2
"""K of the paper: layers that read all image tokens."""


def last_hidden_after_fastv(
    language_model: Any, rows: Tensor, positions: Tensor, image: slice, num_kept: int, num_prompt: int
) -> Tensor:
    """Returns [H], the last token's hidden state, with `num_kept` image tokens after the layer `FASTV_LAYER`.

    These are the tokens that receive the most attention in that layer, averaged over heads and over all tokens of the
    prompt; among tokens with equal attention, the first ones.

    Args:
        language_model: Hugging Face's language model, with "eager" attention, which returns its weights.
        rows: [L, H], the input embeddings.
        positions: [1, L], or [3, 1, L] for M-RoPE.
        image: The rows of the image's N tokens.
        num_kept: Number of image tokens that the later layers read.
        num_prompt: Number of rows of the prompt; the rows after them are of the answer, whose attention does not count.

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764, section 4.1, with K = 2.
    """
    hidden, weights = rows[None], torch.empty(0)

    def take_weights(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        nonlocal weights
        _, weights = output

    for number, layer in enumerate(language_model.layers, 1):
        reading = layer.self_attn.register_forward_hook(take_weights)
        try:
            hidden = layer(
                hidden,
                attention_mask=_causal(hidden.shape[1]),
                position_embeddings=language_model.rotary_emb(hidden, positions),
            )
        finally:
            reading.remove()
        if number == FASTV_LAYER:
            received = weights[0, :, :num_prompt, image].mean(dim=(0, 1))
            kept = received.argsort(descending=True, stable=True)[:num_kept].sort().values
            places = torch.cat(
                [torch.arange(image.start), image.start + kept, torch.arange(image.stop, hidden.shape[1])]
            )
            hidden, positions = hidden[:, places], positions[..., places]
    last: Tensor = language_model.norm(hidden)[0, -1]
    return last


def _causal(length: int) -> Tensor:
    """Returns [1, 1, L, L], the mask to add to attention logits."""
    return torch.full((length, length), -torch.inf).triu(1)[None, None]
