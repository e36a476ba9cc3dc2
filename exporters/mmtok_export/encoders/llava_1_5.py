"""Encoder of LLaVA-1.5: CLIP up to the layer that the projector reads, and the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mmtok_deploy.dim_range import DimRange
from mmtok_export.checkpoint_config import EncoderError, check_only_size
from mmtok_export.encoders.base import Encoder, ImageSize, as_matrix
from mmtok_export.pixels import CLIP_SCALE

__all__ = ["Llava15Encoder"]


class Llava15Encoder(Encoder):
    """Encodes squares of one size (336 px, 576 tokens); `pixels` is [B, 3, height, width].

    The keys are the projector's input: CLIP's hidden_states[-2] without the class token.

    Source: transformers 5.19 models/llava/modeling_llava.py, `LlavaModel.get_image_features`.
    """

    family = "llava-1.5"
    has_positions = False

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        vision = config.vision_config
        _check_config(config, self.family)
        check_only_size(image_size, vision.image_size)
        assert isinstance(image_size, tuple)
        side = vision.image_size // vision.patch_size
        self.batch, self.num_tokens, self.image_size = batch, DimRange.fixed(side**2), image_size
        num_images = batch.minimum if batch.is_fixed else "B"
        self.pixels_shape = (num_images, vision.num_channels, vision.image_size, vision.image_size)
        self.pixel_layout = {"layout": "images", **CLIP_SCALE}
        self.grid = (1, side, side)
        self.vision_width = config.text_config.hidden_size
        self.keys_width = vision.hidden_size

        self.vision_tower = CLIPVisionModel(vision)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        # hidden_states[0] is the input of the first layer. Layers after the one that the projector reads are removed.
        layers = self.vision_tower.encoder.layers
        self.vision_tower.encoder.layers = layers[: range(len(layers) + 1)[config.vision_feature_layer]]
        del self.vision_tower.post_layernorm

    @classmethod
    def native_image_size(cls, content: dict[str, Any]) -> tuple[int, int]:
        """Returns the size of the squares that CLIP was trained on."""
        side = content["vision_config"].get("image_size", CLIPVisionConfig().image_size)
        return side, side

    def prepare(self) -> None:
        """Converts the weights of the patch embedding to a matrix."""
        patch_embedding = self.vision_tower.embeddings.patch_embedding
        self.patch_weight = as_matrix(patch_embedding.weight)
        del self.vision_tower.embeddings.patch_embedding

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns vision [B, N, D] and keys [B, N, d]; see `Encoder.forward`."""
        hidden = self.vision_tower.pre_layrnorm(self._embed(pixels.to(self.patch_weight.dtype)))
        for layer in self.vision_tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        keys = hidden[:, 1:]
        return self.multi_modal_projector(keys), keys

    def _embed(self, pixels: Tensor) -> Tensor:
        """Returns the embeddings of class token and patches with their positions, [B, 1 + N, d]."""
        embeddings = self.vision_tower.embeddings
        num_images, channels, height, width = pixels.shape
        _, rows, columns = self.grid
        patches = pixels.view(num_images, channels, rows, height // rows, columns, width // columns)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(num_images, rows * columns, -1)
        class_token = embeddings.class_embedding.expand(num_images, 1, -1)
        hidden = torch.cat([class_token, F.linear(patches, self.patch_weight)], dim=1)
        return hidden + embeddings.position_embedding.weight


def _check_config(config: Any, family: str) -> None:
    tower = config.vision_config.model_type
    if tower != "clip_vision_model":
        raise EncoderError(f"the vision tower of {family} is clip_vision_model, got {tower}: no exporter knows it")
    if config.vision_feature_select_strategy != "default":
        raise EncoderError(
            f"{family} drops the class token (vision_feature_select_strategy 'default'), "
            f"got {config.vision_feature_select_strategy!r}: no exporter knows it"
        )
    layer, num_layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -num_layers - 1 <= layer <= num_layers:
        raise EncoderError(
            f"vision_feature_layer is one of the tower's {num_layers + 1} hidden states, got {layer!r}: "
            "no exporter knows a projector of several"
        )
