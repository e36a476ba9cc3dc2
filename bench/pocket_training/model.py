"""The interface of a pocket model, which is the same for all families."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmtok_bench.pocket.scenes import SCENE_PX
from pocket_training import TrainedFamily

__all__ = ["GRID", "NUM_IMAGE_TOKENS", "PATCH_PX", "PocketModel", "attend_to_the_like", "make_pocket_model"]

PATCH_PX = 8
"""Side in pixels of the square that an image token covers, in a scene of 112 px."""
GRID = SCENE_PX // PATCH_PX
"""Image tokens in a row and in a column."""
NUM_IMAGE_TOKENS = GRID**2


class PocketModel(ABC):
    """A small vision-language model of a published architecture, with its words and its processor.

    Args:
        seed: The seed that the weights are drawn from.
    """

    before: ClassVar[str]
    """The part of a prompt before the image."""
    after: ClassVar[str]
    """The part of a prompt between the image and the question."""
    asked: ClassVar[str]
    """The part of a prompt from the question to the answer; `{}` is the question."""

    processor: Any
    model: Any

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """The module that makes image tokens from the tower's features."""

    @property
    @abstractmethod
    def tower(self) -> list[nn.Parameter]:
        """The vision encoder's parameters, without the projector's."""

    def served(self) -> Any:
        """Returns a copy of the model in the form in which it is saved and served."""
        return copy.deepcopy(self.model)

    def load(self, checkpoint: Path) -> None:
        """Takes the weights of a checkpoint that `served` was saved as."""
        self.model.load_state_dict(self._trained_weights(checkpoint))

    def _trained_weights(self, checkpoint: Path) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = type(self.model).from_pretrained(checkpoint, dtype=torch.float32).state_dict()
        return weights

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
        """Returns the projector's input [B, patches, width] for images [B, 3, side, side], 0 to 255.

        The side is 112, or for a Qwen2.5-VL any multiple of 8; a LLaVA-NeXT gets tiles [B, 5, 3, 56, 56].
        """

    def normalised(self, pixels: Tensor) -> Tensor:
        """Returns images [B, 3, side, side], 0 to 255, as the family's image processor normalises them."""
        image_processor = self.processor.image_processor
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        return (pixels / 255 - mean) / std

    def image_tokens(self, features: Tensor) -> Tensor:
        """Returns [B, N, width], the image tokens that the language model reads: 196 for a side of 112."""
        tokens: Tensor = self.projector(features)
        return tokens.reshape(len(features), -1, tokens.shape[-1])

    def positions(self, index: Tensor, image_at: int, grid: int = GRID) -> Tensor:
        """Returns the positions of tokens [B, L] for RoPE.

        Args:
            index: Each token's place in its prompt, image tokens included.
            image_at: Number of tokens before the image.
            grid: Image tokens in a row and in a column.
        """
        return index


def make_pocket_model(family: TrainedFamily, seed: int = 0) -> PocketModel:
    """Returns an untrained pocket model in float32."""
    if family == "llava-next":
        from pocket_training.llava_next import PocketLlavaNext

        return PocketLlavaNext(seed)
    if family == "llava-1.5":
        from pocket_training.llava import PocketLlava

        return PocketLlava(seed)
    from pocket_training.qwen import PocketQwen

    return PocketQwen(seed)


def attend_to_the_like(attention: Any) -> None:
    """Changes an attention's weights so that a token attends to similar tokens and adds their values to itself.

    Queries and keys of a head are the same random projection. Without it, the answers of the first thousand steps do
    not depend on the image.

    Source: mimetic initialization (arXiv 2305.09828, section 4).
    """
    num_heads, width = attention.config.num_attention_heads, attention.config.hidden_size
    heads = torch.linalg.qr(torch.randn(num_heads, width, attention.head_dim))[0].mT.reshape(-1, width)
    with torch.no_grad():
        attention.q_proj.weight += 0.8 * heads
        attention.k_proj.weight += 0.8 * heads
        attention.v_proj.weight += 0.5 * heads
        attention.o_proj.weight += 0.5 * heads.T
