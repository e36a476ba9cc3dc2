"""FastV and SparseVLM: methods that drop image tokens between layers of the language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["FASTV_LAYER", "last_hidden_after_fastv", "last_hidden_after_sparsevlm", "merge_similar", "raters"]

FASTV_LAYER = 2
"""K of the paper of FastV: layers that read all image tokens."""

# SparseVLM drops tokens after layers 3, 7 and 16 of 32.
_SPARSEVLM_DEPTHS = (3 / 32, 7 / 32, 16 / 32)
_RECYCLED_SHARE = 0.3
_TOKENS_OF_CLUSTER = 10


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens between two layers.

    Args:
        hidden: [L, H].
        positions: [1, L], or [3, 1, L] for M-RoPE.
        image: The rows of the image's tokens.
    """

    hidden: Tensor
    positions: Tensor
    image: slice

    def with_image(self, image_hidden: Tensor, places: Tensor) -> _Tokens:
        """Returns the tokens with others for the image.

        Args:
            image_hidden: [K, H].
            places: [K], the image tokens whose positions they have.
        """
        start, stop = self.image.start, self.image.stop
        rows = torch.cat([torch.arange(start), start + places, torch.arange(stop, len(self.hidden))])
        hidden = torch.cat([self.hidden[:start], image_hidden, self.hidden[stop:]])
        return _Tokens(hidden, self.positions[..., rows], slice(start, start + len(image_hidden)))


_Drop = Callable[[_Tokens, Tensor], _Tokens]


def last_hidden_after_fastv(
    language_model: Any, rows: Tensor, positions: Tensor, image: slice, num_kept: int, num_prompt: int
) -> Tensor:
    """Returns [H], the last token's hidden state, with `num_kept` image tokens after the layer `FASTV_LAYER`.

    These are the tokens that receive the most attention in that layer, averaged over heads and over all tokens of the
    prompt; among tokens with equal attention, the first ones.

    Args:
        language_model: Hugging Face's language model, with "eager" attention, which returns its weights.
        rows: [L, H], the input embeddings.
        positions: [1, L], or [3, 1, L] for M-RoPE. Tokens keep theirs.
        image: The rows of the image's N tokens.
        num_kept: Number of image tokens that the later layers read.
        num_prompt: Number of rows of the prompt; the rows after them are of the answer, whose attention does not count.

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764, section 4.1, with K = 2.
    """

    def drop(tokens: _Tokens, weights: Tensor) -> _Tokens:
        kept = _best(weights[:, :num_prompt, image].mean(dim=(0, 1)), num_kept)
        return tokens.with_image(tokens.hidden[image][kept], kept)

    return _last_hidden(language_model, _Tokens(rows, positions, image), {FASTV_LAYER: drop})


def last_hidden_after_sparsevlm(
    language_model: Any, rows: Tensor, positions: Tensor, image: slice, num_kept: int, num_prompt: int
) -> Tensor:
    """Returns [H], the last token's hidden state, with `num_kept` image tokens in the last layers.

    Tokens are dropped after several layers, and their number falls by the same factor after each. A token's rating is
    the attention that it receives in that layer from the `raters` of the prompt, averaged over these and over heads.
    The best tokens are kept; the best 30% of the others are merged into a tenth as many by `merge_similar`.

    Args:
        language_model: Hugging Face's language model, with "eager" attention, which returns its weights.
        rows: [L, H], the input embeddings.
        positions: [1, L], or [3, 1, L] for M-RoPE. Tokens keep theirs; a merged one has that of its cluster's centre.
        image: The rows of the image's N tokens.
        num_kept: Number of image tokens that the last layers read, merged ones included.
        num_prompt: Number of rows of the prompt; the rows after them are of the answer, whose attention does not count.

    Source: Zhang et al., "SparseVLM", arXiv 2410.04417, section 3. As in the authors' code, the number of tokens is
    given, not computed from the rank of the attention, merged tokens are means, and the layers are 3, 7 and 16 of 32;
    other models use the same shares of their depth. The authors list numbers of tokens only for 576 tokens.
    """
    rating = raters(rows[image], rows[image.stop : num_prompt])
    num_layers = len(language_model.layers)
    layers = sorted({max(1, round(share * num_layers)) for share in _SPARSEVLM_DEPTHS})
    num_tokens = image.stop - image.start
    drops: dict[int, _Drop] = {}
    for number, layer in enumerate(layers, 1):
        num_read = round(num_tokens * (num_kept / num_tokens) ** (number / len(layers)))

        def drop(tokens: _Tokens, weights: Tensor, num_read: int = num_read) -> _Tokens:
            ratings = weights[:, tokens.image.stop + rating, tokens.image].mean(dim=(0, 1))
            return _keep_and_merge(tokens, ratings, num_read)

        drops[layer] = drop
    return _last_hidden(language_model, _Tokens(rows, positions, image), drops)


def raters(vision: Tensor, text: Tensor) -> Tensor:
    """Returns the indices of the text tokens that rate image tokens: those that are at least as similar as the mean.

    The similarity of a text token is the softmax over text tokens of its product with an image token, averaged over
    image tokens.

    Args:
        vision: [N, H], the embeddings of image tokens.
        text: [T, H], those of the text tokens.

    Source: arXiv 2410.04417, section 3.2.
    """
    similarity = (vision @ text.T).softmax(dim=1).mean(dim=0)
    # Rounding must not leave none where all are equal.
    return (similarity >= similarity.mean() * (1 - 1e-6)).nonzero().flatten()


def merge_similar(hidden: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Returns the means [C, H] of C clusters, and the indices [C] of their centres, by density peaks.

    A token's density is exp of minus the mean squared distance to its C nearest tokens, itself included; its
    separation is the distance to the nearest denser token, or the largest distance of all. Centres have the largest
    products of both. Every other token joins the nearest centre. Among equal tokens, the first one is the denser.

    Args:
        hidden: [M, H].
        num_clusters: C, at most M.

    Source: arXiv 2410.04417, section 3.3, after Rodriguez and Laio, "Clustering by fast search and find of density
    peaks"; distances are divided by the square root of H, as in the authors' code.
    """
    distance = torch.cdist(hidden, hidden, compute_mode="donot_use_mm_for_euclid_dist") / hidden.shape[1] ** 0.5
    density = distance.topk(num_clusters, largest=False).values.square().mean(dim=1).neg().exp()
    rank = density.argsort(descending=True, stable=True).argsort()
    is_denser = rank[None, :] < rank[:, None]
    separation = distance.masked_fill(~is_denser, float(distance.max())).amin(dim=1)
    centres = _best(density * separation, num_clusters)
    nearest = distance[:, centres].argmin(dim=1)
    nearest[centres] = torch.arange(num_clusters)
    members = torch.nn.functional.one_hot(nearest, num_clusters).to(hidden.dtype)
    return members.T @ hidden / members.sum(dim=0)[:, None], centres


def _keep_and_merge(tokens: _Tokens, ratings: Tensor, num_read: int) -> _Tokens:
    """Returns the tokens with `num_read` of the image: the best ones, and those that others are merged into."""
    num_clusters = _num_clusters(len(ratings), num_read)
    order = ratings.argsort(descending=True, stable=True)
    best, others = order[: num_read - num_clusters].sort().values, order[num_read - num_clusters :]
    states = tokens.hidden[tokens.image]
    if not num_clusters:
        return tokens.with_image(states[best], best)
    recycled = others[: _num_recycled(len(others))].sort().values
    merged, centres = merge_similar(states[recycled], num_clusters)
    return tokens.with_image(torch.cat([states[best], merged]), torch.cat([best, recycled[centres]]))


def _num_clusters(num_tokens: int, num_read: int) -> int:
    """Returns how many of the tokens that are read are merged ones, at most half of them."""
    if num_read == num_tokens:
        return 0
    num_clusters = 1
    while num_clusters < (more := 1 + _num_recycled(num_tokens - num_read + num_clusters) // _TOKENS_OF_CLUSTER):
        num_clusters = more
    return min(num_clusters, num_read // 2)


def _num_recycled(num_dropped: int) -> int:
    return min(num_dropped, 1 + int(_RECYCLED_SHARE * num_dropped))


def _last_hidden(language_model: Any, tokens: _Tokens, drops: Mapping[int, _Drop]) -> Tensor:
    """Returns [H], the last token's hidden state, when tokens are dropped after the layers of these numbers.

    Args:
        language_model: Hugging Face's language model, with "eager" attention.
        tokens: Those that the first layer reads.
        drops: Number of a layer, from 1, -> what is done after it, given its weights of attention [heads, L, L].
    """
    weights = torch.empty(0)

    def take_weights(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        nonlocal weights
        weights = output[1][0]

    for number, layer in enumerate(language_model.layers, 1):
        reading = layer.self_attn.register_forward_hook(take_weights)
        try:
            (hidden,) = layer(
                tokens.hidden[None],
                attention_mask=_causal(len(tokens.hidden)),
                position_embeddings=language_model.rotary_emb(tokens.hidden[None], tokens.positions),
            )
        finally:
            reading.remove()
        tokens = replace(tokens, hidden=hidden)
        if number in drops:
            tokens = drops[number](tokens, weights)
    last: Tensor = language_model.norm(tokens.hidden[None])[0, -1]
    return last


def _best(scores: Tensor, num_best: int) -> Tensor:
    """Returns the indices of the largest scores in ascending order; among equal ones, the first."""
    return scores.argsort(descending=True, stable=True)[:num_best].sort().values


def _causal(length: int) -> Tensor:
    """Returns [1, 1, L, L], the mask to add to attention logits."""
    return torch.full((length, length), -torch.inf).triu(1)[None, None]
