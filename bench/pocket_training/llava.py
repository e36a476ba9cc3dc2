"""The pocket LLaVA-1.5: 2.8 million parameters, with a CLIP vision tower of its own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mmtok_bench.pocket.scenes import SCENE_PX
from pocket_training.model import PATCH_PX, PocketModel, attend_to_the_like
from pocket_training.words import word_tokenizer

__all__ = ["PocketLlava", "config_parts", "processor_parts", "sides_of"]

# For chats and for training: the user's turn, which begins with the image, then the assistant's.
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ' : ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image_url' in content %}{{ '<image> ' }}{% endif %}"
    "{% endfor %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)


class PocketLlava(PocketModel):
    """`LlavaForConditionalGeneration` with a CLIP of five layers and a Llama of four.

    The tower's position embeddings are initialised with two-dimensional sines and cosines, which are similar for
    neighbours.
    """

    before = "<s> user :"
    after = ""
    asked = "{} assistant :"

    def __init__(self, seed: int) -> None:
        self.processor = self._make_processor()
        torch.manual_seed(seed)
        self.model = self._make_model(self.processor.tokenizer)
        positions = self._vision_tower.embeddings.position_embedding.weight
        with torch.no_grad():
            positions[1:] = 0.5 * _sines(math.isqrt(len(positions) - 1), positions.shape[1])
        for layer in self.language_model.layers:
            attend_to_the_like(layer.self_attn)

    def _make_processor(self) -> Any:
        """Returns the LlavaProcessor: images of any size to 112 x 112 px, text to lower-case words."""
        # As CLIP: the shortest edge is resized to 112 px, and the middle is cropped.
        return transformers.LlavaProcessor(
            image_processor=transformers.CLIPImageProcessor(**sides_of(SCENE_PX)), **processor_parts()
        )

    def _make_model(self, tokenizer: Any) -> Any:
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(**config_parts(tokenizer, image_px=SCENE_PX))
        )

    @property
    def projector(self) -> nn.Module:
        """LLaVA's two-layer projector."""
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    @property
    def tower(self) -> list[nn.Parameter]:
        """CLIP's parameters."""
        return list(self._vision_tower.parameters())

    def features(self, pixels: Tensor) -> Tensor:
        """Returns [B, 196, 128], the features that LLaVA reads, before the tower's last layer, which is not run."""
        hidden: Tensor = self._vision_tower.embeddings(self.normalised(pixels))
        hidden = self._vision_tower.pre_layrnorm(hidden)
        for layer in self._vision_tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]

    @property
    def _vision_tower(self) -> Any:
        return self.model.model.vision_tower


def sides_of(image_px: int) -> dict[str, Any]:
    """Returns the sizes in a CLIP image processor of square images."""
    return {"size": {"shortest_edge": image_px}, "crop_size": {"height": image_px, "width": image_px}}


def processor_parts() -> dict[str, Any]:
    """Returns what a LLaVA's processor has beside its image processor."""
    tokenizer = word_tokenizer(
        ("<pad>", "<s>", "</s>", "<unk>", "<image>"),
        first="<s>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>"],
    )
    return {
        "tokenizer": tokenizer,
        "patch_size": PATCH_PX,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": _TEMPLATE,
    }


def config_parts(tokenizer: Any, *, image_px: int) -> dict[str, Any]:
    """Returns the configuration of a LLaVA whose vision encoder reads squares of `image_px`."""
    return {
        "text_config": transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=2048,
            # Slow rotations, so that tokens can be compared by content over the length of an image.
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.05,
            tie_word_embeddings=True,
        ),
        "vision_config": transformers.CLIPVisionConfig(
            image_size=image_px,
            patch_size=PATCH_PX,
            hidden_size=128,
            intermediate_size=512,
            # LLaVA reads the output of the last layer but one: the fifth never runs.
            num_hidden_layers=5,
            num_attention_heads=4,
            projection_dim=128,
        ),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
    }


def _sines(side: int, width: int) -> Tensor:
    """Returns [side * side, width]: a quarter of the columns each for sin and cos of the row and of the column."""
    rates = torch.logspace(0, -1.5, width // 4) * torch.pi / 2
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = zip(*itertools.product(range(side), range(side)), strict=True)
    return torch.cat([waves[list(rows)], waves[list(columns)]], dim=1)
