"""Encoder of InternVL3 and InternVL3.5: InternViT for all tiles of an image, pixel shuffle, and the projector."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)
from transformers import AutoConfig, InternVLConfig, InternVLVisionModel
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from mmtok_deploy.dim_range import DimRange
from mmtok_export.checkpoint_config import EncoderError, read_json
from mmtok_export.encoders.base import Encoder, ImageSize, as_matrix

__all__ = ["InternVL3Encoder"]

_IMAGENET_SCALE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Up to 12 tiles and a thumbnail.
_TILES = DimRange(1, 7, 13)

# Names of the published checkpoints (`InternVLChatModel`) in Transformers' class.
_RENAMED = (
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    (r"^vision_model\.", "vision_tower."),
    (r"\.class_embedding$", ".cls_token"),
    (r"\.position_embedding$", ".position_embeddings"),
    (r"\.patch_embedding\.", ".patch_embeddings.projection."),
    (r"\.encoder\.layers\.", ".encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls(\d)$", r".lambda_\1"),
)


class InternVL3Encoder(Encoder):
    """Encodes the tiles of one image; `pixels` is [tiles, 3, height, width].

    An image is one tile, or several tiles and a thumbnail. One selection is made from the tokens of all of them, as on
    a server. The keys are the projector's input: the concatenated features of 2 x 2 patches.

    Source: transformers 5.19 models/internvl/modeling_internvl.py, `InternVLModel.get_image_features`; sglang 0.5.23
        models/internvl.py, `InternVLChatModel.extract_feature`.
    """

    family = "internvl3"
    has_positions = False

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        vision = config.vision_config
        _check_config(config)
        if batch != DimRange.fixed(1):
            raise EncoderError(
                f"a graph of {self.family} takes the tiles of one image, got {batch} images: leave --batch-size out, "
                "--tokens sets the number of tiles"
            )
        height, width = vision.image_size
        self.merge = round(1 / config.downsample_ratio)
        rows, columns = (
            length // (patch * self.merge) for length, patch in zip((height, width), vision.patch_size, strict=True)
        )
        self.tile_tokens = rows * columns
        self.batch, self.image_size, self.grid = batch, (width, height), (1, rows, columns)
        if not isinstance(image_size, DimRange):
            if image_size != self.image_size:
                raise EncoderError(
                    f"a tile has {width}x{height} px, got {image_size[0]}x{image_size[1]}: leave --image-size out"
                )
            image_size = DimRange(
                *(self.tile_tokens * each for each in (_TILES.minimum, _TILES.optimum, _TILES.maximum))
            )
        self.num_tokens = image_size
        tiles = self._tiles_of(image_size)
        self.open_sizes = {} if tiles.is_fixed else {"tiles": tiles}
        self.pixels_shape = (tiles.minimum if tiles.is_fixed else "tiles", vision.num_channels, height, width)
        self.pixel_layout = {"layout": "images", **_IMAGENET_SCALE}
        self.vision_width = config.text_config.hidden_size
        self.keys_width = vision.hidden_size * self.merge**2

        self.vision_tower = InternVLVisionModel(vision)
        self.multi_modal_projector = InternVLMultiModalProjector(config)

    @classmethod
    def native_image_size(cls, content: dict[str, Any]) -> tuple[int, int]:
        """Returns the size of a tile."""
        size = content.get("force_image_size") or content["vision_config"].get("image_size", 448)
        height, width = size if isinstance(size, list) else (size, size)
        return width, height

    @classmethod
    def read_config(cls, checkpoint: Path) -> Any:
        """Returns the configuration as an object of Transformers' class, from its own or the published format."""
        content = read_json(checkpoint, "config.json")
        return AutoConfig.from_pretrained(checkpoint) if content["model_type"] == "internvl" else _converted(content)

    def parameters_in(self, stored: str) -> Sequence[str]:
        """Returns the names of the parameters that a stored tensor contains; see `Encoder.parameters_in`."""
        for pattern, replacement in _RENAMED:
            stored = re.sub(pattern, replacement, stored)
        (name,) = super().parameters_in(stored)
        return [name.replace(".qkv.", f".{each}_proj.") for each in "qkv"] if ".qkv." in name else [name]

    def prepare(self) -> None:
        """Converts the weights of the patch embedding to a matrix."""
        projection = self.vision_tower.embeddings.patch_embeddings.projection
        self.patch_weight, self.patch_bias = as_matrix(projection.weight), projection.bias
        del self.vision_tower.embeddings.patch_embeddings

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns vision [1, N, D] and keys [1, N, d]; see `Encoder.forward`."""
        hidden = self._embed(pixels.to(self.patch_weight.dtype))
        for layer in self.vision_tower.encoder.layer:
            hidden = layer(hidden)
        hidden = self.vision_tower.layernorm(hidden)[:, 1:]
        _, rows, columns = self.grid
        squares = hidden.view(-1, rows, self.merge, columns, self.merge, hidden.shape[-1])
        keys = squares.transpose(2, 3).reshape(1, -1, self.keys_width)
        return self.multi_modal_projector(keys), keys

    def _embed(self, pixels: Tensor) -> Tensor:
        """Returns the embeddings of class token and patches with their positions, [tiles, 1 + patches, C]."""
        embeddings = self.vision_tower.embeddings
        (width, height), (across, down) = self.image_size, reversed(self.vision_tower.config.patch_size)
        patches = pixels.view(-1, pixels.shape[1], height // down, down, width // across, across)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches = F.linear(patches, self.patch_weight, self.patch_bias)
        hidden = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return hidden + embeddings.position_embeddings

    def _tiles_of(self, num_tokens: DimRange) -> DimRange:
        """Returns the range of tiles for a range of tokens.

        Raises:
            EncoderError: A number of tokens is not a whole number of tiles.
        """
        sizes = (num_tokens.minimum, num_tokens.optimum, num_tokens.maximum)
        odd = [size for size in sizes if size % self.tile_tokens]
        if odd:
            raise EncoderError(
                f"a tile has {self.tile_tokens} tokens, and --tokens takes multiples of it, got {odd[0]}: leave it out "
                f"for images of 1 to {_TILES.maximum} tiles"
            )
        return DimRange(*(size // self.tile_tokens for size in sizes))


def _check_config(config: Any) -> None:
    """Raises EncoderError if the configuration is not one of InternVL3."""
    vision = config.vision_config
    expected = {
        "vision_feature_layer": (config.vision_feature_layer, -1),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, "default"),
        "downsample_ratio": (config.downsample_ratio, 0.5),
        "use_absolute_position_embeddings": (vision.use_absolute_position_embeddings, True),
        "use_mask_token": (vision.use_mask_token, False),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise EncoderError(f"{name} of InternVL3 is {wanted!r}, got {found!r}: no exporter knows it")


def _converted(content: dict[str, Any]) -> InternVLConfig:
    """Returns the configuration of a published checkpoint as an object of Transformers' class.

    Args:
        content: config.json of an `InternVLChatModel`.

    Raises:
        EncoderError: The version of the pixel shuffle or the size of tiles is not that of InternVL3.
    """
    vision, text = content["vision_config"], content["llm_config"]
    size = vision["image_size"]
    for name, found, wanted in (
        ("ps_version", content.get("ps_version"), "v2"),
        ("force_image_size", content.get("force_image_size") or size, size),
    ):
        if found != wanted:
            raise EncoderError(f"{name} of InternVL3 is {wanted!r}, got {found!r}: no exporter knows it")
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    return InternVLConfig(
        vision_config={
            **{name: vision[name] for name in same},
            "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
            "norm_type": vision.get("norm_type", "layer_norm"),
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
            "image_size": size,
            "patch_size": vision["patch_size"],
        },
        text_config={"hidden_size": text["hidden_size"], "num_attention_heads": text["num_attention_heads"]},
        downsample_ratio=content["downsample_ratio"],
        vision_feature_layer=content.get("select_layer", -1),
    )
