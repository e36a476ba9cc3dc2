"""What training and measuring need of a pocket model, whatever its family."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmtok_bench.families import PocketFamily
from mmtok_bench.pocket.scenes import SCENE_PX

__all__ = [
    "GRID",
    "NUM_IMAGE_TOKENS",
    "PATCH_PX",
    "PocketModel",
    "attend_to_the_like",
    "make_pocket_model",
]

PATCH_PX = 8
"""Side of what an image token shows, in a scene of 112 px."""
GRID = SCENE_PX // PATCH_PX
"""Image tokens a side."""
NUM_IMAGE_TOKENS = GRID**2


class PocketModel(ABC):
    """A small vision-language model of a published architecture, with its words and its processor.

    Args:
        seed: The seed that the weights are drawn from.
    """

    before: ClassVar[str]
    """A prompt up to the image."""
    after: ClassVar[str]
    """What stands between the image and the question."""
    asked: ClassVar[str]
    """A question up to its answer."""

    processor: Any
    model: Any

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """What makes image tokens of the tower's features."""

    @property
    @abstractmethod
    def tower(self) -> list[nn.Parameter]:
        """The vision encoder's parameters, without the projector's."""

    def served(self) -> Any:
        """Returns a copy of the model in the form in which it is saved and served."""
        return copy.deepcopy(self.model)

    @property
    def language_model(self) -> Any:
        """The language model without its head."""
        return self.model.model.language_model

    @property
    def embedding(self) -> nn.Embedding:
        """The word embeddings, which are the head's too."""
        embedding: nn.Embedding = self.model.get_input_embeddings()
        return embedding

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Returns what the projector is given of images [B, 3, 112, 112], 0 to 255."""

    def normalised(self, pixels: Tensor) -> Tensor:
        """Returns images [B, 3, 112, 112], 0 to 255, as the family's image processor normalises them."""
        image_processor = self.processor.image_processor
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        return (pixels / 255 - mean) / std

    def image_tokens(self, features: Tensor) -> Tensor:
        """Returns [B, 196, width]: what the language model reads of the images."""
        tokens: Tensor = self.projector(features)
        return tokens.reshape(-1, NUM_IMAGE_TOKENS, tokens.shape[-1])

    def positions(self, index: Tensor, image_at: int) -> Tensor:
        """Returns the positions of tokens [B, L] that are numbered through, the image's included, for RoPE.

        Args:
            index: The numbers.
            image_at: How many stand before the image.
        """
        return index


def make_pocket_model(family: PocketFamily, seed: int = 0) -> PocketModel:
    """Returns an untrained pocket model in float32."""
    if family == "llava-1.5":
        from pocket_training.llava import PocketLlava

        return PocketLlava(seed)
    from pocket_training.qwen import PocketQwen

    return PocketQwen(seed)


def attend_to_the_like(attention: Any) -> None:
    """Adds to an attention's weights what makes a token look at tokens like itself and add what it sees to itself.

    Each head sees a random subspace, its queries as its keys. Without it the first thousand steps answer questions
    without looking.

    Source: mimetic initialization (arXiv 2305.09828, section 4).
    """
    num_heads, width = attention.config.num_attention_heads, attention.config.hidden_size
    heads = torch.linalg.qr(torch.randn(num_heads, width, attention.head_dim))[0].mT.reshape(-1, width)
    with torch.no_grad():
        attention.q_proj.weight += 0.8 * heads
        attention.k_proj.weight += 0.8 * heads
        attention.v_proj.weight += 0.5 * heads
        attention.o_proj.weight += 0.5 * heads.T
