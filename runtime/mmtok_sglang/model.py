"""What a model family's model class adds to SGLang's: an image's features are its kept tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.model_loader.utils import resolve_language_model
from torch import Tensor, nn
from typing_extensions import override

from mmtok_sglang.cache_key import ImageKeys, check_embeddings, has_images, keys_of
from mmtok_sglang.feature_cache import Features
from mmtok_sglang.pixels import for_encoder
from mmtok_sglang.plan import ImagePlan, joined_parts, places_in_prompt, plan_of
from mmtok_sglang.positions import receive_positions, send_positions
from mmtok_sglang.selection import ImageTokens, without_non_finite
from mmtok_sglang.server import current

__all__ = ["EncodedImage", "PrunedModel"]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """A pruned image after the encoder.

    Args:
        item: SGLang's.
        plan: How it is pruned.
        features: The features of each of its tiles; an image in one piece is one tile.
    """

    item: Any
    plan: ImagePlan
    features: Features

    @property
    def names(self) -> ImageKeys:
        """The image's keys."""
        keys = keys_of(self.item)
        assert keys is not None
        return keys

    def tiles(self, width: int) -> list[ImageTokens]:
        """Returns what is selected from: each tile by itself, and as many tokens of each.

        With the keys "output", tokens are compared by what the projector makes of them.

        Args:
            width: The language model's. A wider token has what its deeper layers get behind it (DeepStack).
        """
        vision, keys, attention = self.features.vision, self.features.keys, self.features.attention
        if self.plan.num_parts > 1:
            vision, keys = (rows[0].unflatten(0, (self.plan.num_parts, -1)) for rows in (vision, keys))
        num_kept = self.plan.num_kept // len(vision)
        paid = [None] * len(vision) if attention is None else attention
        vision = vision[..., :width]
        keys = vision if self.plan.keys == "output" else keys
        return [
            ImageTokens(self.names, self.plan, tokens, compared, num_kept, weights, tile)
            for tile, (tokens, compared, weights) in enumerate(zip(vision, keys, paid, strict=True))
        ]


# To a type checker a model of SGLang's, whose methods this class calls and replaces.
_Base: Any = nn.Module if TYPE_CHECKING else object


class PrunedModel(_Base):
    """Goes before SGLang's class of a model among the bases of a family's own.

    A family's class has SGLang's name of it, and gives what an image is selected by: `features_of`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The one place between the embedding of a batch's images, which selects, and the language model, whichever
        # way SGLang runs the two. A CUDA graph of the language model alone is replayed behind it.
        resolve_language_model(self).register_forward_pre_hook(lambda *_: self._start_language_model())
        self._forward_batch: Any = None
        self._spans: list[Any] = []
        # Linear attention changes its states in place: run twice, a batch would read its tokens twice.
        self._is_recurrent = any(isinstance(module, RadixLinearAttention) for module in self.modules())
        self._has_begun = False

    def features_of(self, items: Sequence[Any]) -> list[Features]:
        """Returns the features of pruned images, from one call of `encode` or from several.

        Args:
            items: SGLang's items, each with a plan.
        """
        raise NotImplementedError

    def encode(self, items: Sequence[Any]) -> Tensor:
        """Returns SGLang's features of images, or of videos, unpruned, one after another: [tokens, D].

        Times the vision encoder.
        """
        device = next(self.parameters()).device
        kind = "get_video_feature" if items[0].is_video() else "get_image_feature"
        of_sglang = getattr(super(), kind)
        features: Tensor = current().stages.encode(
            lambda _, items: of_sglang(for_encoder(items, device)), self, list(items)
        )
        return features

    def join(self, image: EncodedImage, kept: Sequence[Tensor]) -> Tensor:
        """Returns the kept tokens [K, D] of an image as the language model reads them, text between them included.

        Args:
            image: The image.
            kept: [k] int64 kept tokens of each of its tiles or parts.
        """
        chosen = joined_parts(kept, image.plan)
        rows = image.features.vision[0][chosen]
        if not image.plan.between:
            return rows
        text = self._text_between(image.plan, rows)
        return torch.cat([rows, text])[places_in_prompt(chosen, image.plan).argsort()]

    @override
    def get_image_feature(self, items: list[Any]) -> Any:
        """Returns the tokens of each image, kept ones where it is pruned: SGLang puts them in the placeholders' place.

        An image for which that fails has zeros, and its requests end.
        """
        return current().failures.guard_features(self._image_tokens, items, self._zeros)

    @override
    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: Any,
        input_embeds: Any = None,
        get_embedding: bool = False,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """Runs the model as SGLang's class does; a prefill with images that fails is run once more without them.

        Each pipeline stage hands the positions of kept tokens, and which images failed, to the next: only the first
        encodes and selects.
        """
        rest = {"input_embeds": input_embeds, "get_embedding": get_embedding, "pp_proxy_tensors": pp_proxy_tensors}
        # Not all of SGLang's classes take all of them.
        rest = {name: value for name, value in rest.items() if value is not None and value is not False}
        run = partial(super().forward, positions=positions, forward_batch=forward_batch, **rest)
        if not forward_batch.forward_mode.is_extend_without_speculative():
            return run(input_ids)
        server, device = current(), next(self.parameters()).device
        server.failures.receive(pp_proxy_tensors)
        receive_positions(forward_batch, pp_proxy_tensors)
        output = server.failures.guard_forward(
            lambda ids: server.stages.forward(partial(self._prefill, run, ids, forward_batch), forward_batch, device),
            input_ids,
            forward_batch,
            self.config.get_text_config().vocab_size,
            lambda: not (self._is_recurrent and self._has_begun),
        )
        if not self.pp_group.is_last_rank:
            server.failures.send(output)
            if forward_batch.mrope_positions is not None:
                send_positions(forward_batch, output)
        return output

    def _prefill(self, run: Any, input_ids: Tensor, forward_batch: Any) -> Any:
        self._forward_batch, self._spans, self._has_begun = forward_batch, [], False
        if self.pp_group.is_first_rank and has_images(forward_batch):
            check_embeddings(forward_batch)
            if forward_batch.mrope_positions is not None:
                self._spans = current().positions.spans(forward_batch)
        try:
            output = run(input_ids)
            if not self._has_begun:
                # Kept tokens would have had the positions of others, and no time of the prefill would be right.
                raise RuntimeError("MMTok: the language model ran without its forward pre-hook")
            return output
        finally:
            self._forward_batch, self._spans = None, []

    def _start_language_model(self) -> None:
        if self._forward_batch is None:
            return
        server, positions = current(), self._forward_batch.mrope_positions
        if self._spans:
            server.positions.write(self._spans, positions)
        self._has_begun = True
        server.stages.start_language_model(next(self.parameters()).device)

    def _image_tokens(self, items: Sequence[Any]) -> Any:
        """Returns the tokens of each image; of images without a plan alone, all of them as one tensor."""
        plans = {place: plan for place, item in enumerate(items) if (plan := plan_of(item)) is not None}
        if not plans:
            return self.encode(items)
        server = current()
        features = server.cache.recall([items[place] for place in plans], self.features_of)
        images = [
            EncodedImage(items[place], plan, each) for (place, plan), each in zip(plans.items(), features, strict=True)
        ]
        embed = self.get_input_embeddings()
        tiles = [image.tiles(embed.embedding_dim) for image in images]
        kept = iter(server.selector.select([tile for each in tiles for tile in each], embed))
        tokens = {
            place: without_non_finite(self.join(image, [next(kept) for _ in each]))
            for place, image, each in zip(plans, images, tiles, strict=True)
        }
        whole = [item for place, item in enumerate(items) if place not in plans]
        if whole:
            rows = iter(self.encode(whole).split([_num_placeholders(item) for item in whole]))
        return [tokens[place] if place in tokens else next(rows) for place in range(len(items))]

    def _text_between(self, plan: ImagePlan, rows: Tensor) -> Tensor:
        """Returns the text between a video's runs of placeholders, [T, D] as wide as its tokens: without DeepStack."""
        ids = torch.tensor([token for ids in plan.between for token in ids], dtype=torch.int64)
        text = self.get_input_embeddings()(ids.to(rows.device, non_blocking=True)).to(rows.dtype)
        return nn.functional.pad(text, (0, rows.shape[1] - text.shape[1]))

    def _zeros(self, item: Any, num_rows: int) -> Tensor:
        weight: Tensor = self.get_input_embeddings().weight
        num_levels = 1 + getattr(self, "num_deepstack_embeddings", 0)
        return torch.zeros(num_rows, num_levels * weight.shape[1], dtype=weight.dtype, device=weight.device)


def _num_placeholders(item: Any) -> int:
    return sum(end - start + 1 for start, end in item.offsets)
