"""Parts of an InternVL without trained weights: processor, configuration, names of weights.

The published checkpoints have a format of their own (`InternVLChatModel`). SGLang serves it; Transformers 5.19 does not
load it, and has the class `InternVLForConditionalGeneration` for the same model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

__all__ = ["InternVLProcessor", "chat_model_config", "chat_model_weights", "num_tiles"]

_TILE_PX = 448
_MAX_TILES = 12

_RENAMED = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(?:model\.)?multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^(?:model\.)?vision_tower\.", "vision_model."),
    (r"\.embeddings\.cls_token$", ".embeddings.class_embedding"),
    (r"\.embeddings\.position_embeddings$", ".embeddings.position_embedding"),
    (r"\.embeddings\.patch_embeddings\.projection\.", ".embeddings.patch_embedding."),
    (r"\.encoder\.layer\.", ".encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_(\d)$", r".ls\1"),
)


def num_tiles(width: int, height: int) -> int:
    """Returns the number of tiles that SGLang cuts an image into: 1, or up to 12 and a thumbnail.

    Source: sglang 0.5.23 srt/multimodal/processors/internvl.py, `dynamic_preprocess`.
    """
    grids = [(x, y) for x in range(1, _MAX_TILES + 1) for y in range(1, _MAX_TILES // x + 1)]
    columns, rows = min(grids, key=lambda grid: (abs(width / height - grid[0] / grid[1]), -grid[0] * grid[1]))
    return columns * rows + (columns * rows > 1)


class InternVLProcessor:
    """The tokenizer, with each `<image>` expanded to its tiles' tokens; SGLang itself makes the pixels.

    Args:
        tokenizer: The model's tokenizer.
        tile_tokens: Tokens of a tile.
    """

    image_token = "<image>"

    def __init__(self, tokenizer: Any, *, tile_tokens: int = 256) -> None:
        self.tokenizer = tokenizer
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        self._tile_tokens = tile_tokens

    def __call__(self, text: Sequence[str], images: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """Returns the tokenizer's output for one prompt; `kwargs` are passed to the tokenizer."""
        (prompt,) = text
        for image in images or ():
            tokens = "<IMG_CONTEXT>" * (self._tile_tokens * num_tiles(image.width, image.height))
            prompt = prompt.replace(self.image_token, f"<img>{tokens}</img>", 1)
        return self.tokenizer([prompt], **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the tokenizer's `apply_chat_template`."""
        return self.tokenizer.apply_chat_template(*args, **kwargs)

    def save_pretrained(self, folder: Path) -> None:
        """Writes the tokenizer; the published checkpoints have no processor."""
        self.tokenizer.save_pretrained(folder)


class _ChatModelConfig(transformers.PreTrainedConfig):
    model_type = "internvl_chat"


def chat_model_config(config: transformers.InternVLConfig) -> Any:
    """Returns the configuration in the published checkpoints' format.

    Args:
        config: Configuration of Transformers' class; its language model is a Qwen2 or a Qwen3.
    """
    vision, text = config.vision_config, config.text_config
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[text.model_type]
    return _ChatModelConfig(
        architectures=["InternVLChatModel"],
        vision_config={
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size[0],
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "norm_type": vision.norm_type,
            "initializer_factor": 1.0,
            **{
                name: getattr(vision, name)
                for name in (
                    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                    *("hidden_act", "layer_norm_eps"),
                )
            },
        },
        llm_config={**text.to_dict(), "architectures": [architecture]},
        downsample_ratio=config.downsample_ratio,
        force_image_size=_TILE_PX,
        dynamic_image_size=True,
        max_dynamic_patch=_MAX_TILES,
        min_dynamic_patch=1,
        use_thumbnail=True,
        ps_version="v2",
        select_layer=-1,
        template="internvl2_5",
    )


def chat_model_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with the published checkpoints' names; query, key and value weights are one tensor.

    Args:
        weights: The state dict of Transformers' class, with or without the prefix `model.` of the saved file.
    """
    renamed = {}
    for name, weight in weights.items():
        if re.search(r"vision_tower.*\.[kv]_proj\.", name):
            continue
        if re.search(r"vision_tower.*\.q_proj\.", name):
            parts = [weights[name.replace(".q_proj.", f".{each}_proj.")] for each in "qkv"]
            weight, name = torch.cat(parts), name.replace(".attention.q_proj.", ".attn.qkv.")
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    return renamed
