"""The pocket Qwen2.5-VL: 2.1 million parameters, M-RoPE, and as many image tokens as the pocket LLaVA-1.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Regex, decoders
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from mmtok_bench.model_parts import qwen_config
from mmtok_bench.pocket import PICTURE_PX
from mmtok_bench.pocket.scenes import SCENE_PX
from pocket_training.model import GRID, PATCH_PX, PocketModel, attend_to_the_like
from pocket_training.words import word_tokenizer

__all__ = ["SERVED_PATCH_PX", "PocketQwen", "undo_enlarging"]

_MERGE = 2
_PATCH_PX = PATCH_PX // _MERGE
_KERNEL = "model.visual.patch_embed.proj.weight"
# SGLang 0.5.23 takes only patches of 14 px (models/qwen2_5_vl.py, line 780) and reads others as computed features.
SERVED_PATCH_PX = PICTURE_PX["qwen2.5-vl"] // (GRID * _MERGE)
"""Side of a served model's patches, in pixels."""
# Qwen2.5-VL's own template, without a system turn.
_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class PocketQwen(PocketModel):
    """`Qwen2_5_VLForConditionalGeneration` with a vision encoder of three blocks and a Qwen2.5 of four layers.

    In training a patch is 4 pixels wide and an image token 8. The first two blocks attend within quarters of the scene,
    the third to the whole scene.
    """

    before = "<|im_start|>user <|vision_start|>"
    after = "<|vision_end|>"
    asked = "{} <|im_end|> <|im_start|>assistant"

    def __init__(self, seed: int) -> None:
        self.processor = _make_processor()
        torch.manual_seed(seed)
        self.model = transformers.Qwen2_5_VLForConditionalGeneration(_config(self.processor.tokenizer, _PATCH_PX))
        for layer in self.language_model.layers:
            attend_to_the_like(layer.self_attn)

    def served(self) -> Any:
        """Returns the model with patches of 14 px: it reads a scene at 392 px as this one does at 112 px."""
        model = transformers.Qwen2_5_VLForConditionalGeneration(_config(self.processor.tokenizer, SERVED_PATCH_PX))
        weights = {name: weight.detach().cpu() for name, weight in self.model.state_dict().items()}
        shrink = undo_enlarging()
        weights[_KERNEL] = torch.einsum("oithw,hy,wx->oityx", weights[_KERNEL], shrink, shrink)
        model.load_state_dict(weights)
        return model

    def _trained_weights(self, checkpoint: Path) -> dict[str, Tensor]:
        """Returns the weights of a checkpoint, with patches of 4 px again."""
        weights = super()._trained_weights(checkpoint)
        enlarge = torch.linalg.pinv(undo_enlarging())
        weights[_KERNEL] = torch.einsum("oityx,yh,xw->oithw", weights[_KERNEL], enlarge, enlarge)
        return weights

    @property
    def projector(self) -> nn.Module:
        """The merger of four patches into a token."""
        merger: nn.Module = self.model.model.visual.merger
        return merger

    @property
    def tower(self) -> list[nn.Parameter]:
        """The vision encoder's parameters without the merger's."""
        visual = self.model.model.visual
        return [parameter for part in (visual.patch_embed, visual.blocks) for parameter in part.parameters()]

    def features(self, pixels: Tensor) -> Tensor:
        """Returns [B, 4 * N, 96]: the four patches of each token one after the other, tokens in raster order."""
        side = pixels.shape[-1] // _PATCH_PX
        grid_thw = torch.tensor([[1, side, side]], device=pixels.device).expand(len(pixels), -1)
        encoded = self.model.model.visual(_patches(self.normalised(pixels)), grid_thw=grid_thw)
        in_window_order = encoded.last_hidden_state.unflatten(0, (-1, _MERGE**2))
        config = self.model.config.vision_config
        window_index, _ = get_vision_window_index(grid_thw, _MERGE, config.window_size, config.patch_size)
        features: Tensor = in_window_order[torch.argsort(window_index)].flatten(0, 1).unflatten(0, (len(pixels), -1))
        return features

    def positions(self, index: Tensor, image_at: int, grid: int = GRID) -> Tensor:
        """Returns [3, B, L]: time, row and column; the image takes as many positions as it has rows."""
        patch = torch.arange(grid**2, device=index.device)
        end = image_at + grid**2
        positions = torch.where(index >= end, index - grid**2 + grid, index).repeat(3, 1, 1)
        positions[:, :, image_at:end] = image_at
        positions[1, :, image_at:end] += patch // grid
        positions[2, :, image_at:end] += patch % grid
        return positions


def _patches(pixels: Tensor) -> Tensor:
    """Returns [B * 4 * N, 96]: images [B, 3, side, side] as Qwen2.5-VL's processor cuts them, each frame twice."""
    cut = pixels.unflatten(3, (-1, _MERGE, _PATCH_PX)).unflatten(2, (-1, _MERGE, _PATCH_PX))
    # [B, 3, row, row in token, y, column, column in token, x] to tokens, their patches, and the pixels of each.
    patches: Tensor = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)
    return patches[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)


def undo_enlarging() -> Tensor:
    """Returns [4, 14], the inverse of Pillow's bicubic enlarging: the 4 pixels of a row from the 14 of a patch.

    The 14 pixels depend on 8, those 4 and their neighbours, so the 4 are found exactly, up to rounding to integers.
    """
    every_pixel = Image.fromarray(np.eye(SCENE_PX, dtype=np.float32))
    enlarging = np.asarray(every_pixel.resize((SCENE_PX, PICTURE_PX["qwen2.5-vl"]), Image.Resampling.BICUBIC))
    patch = GRID
    made = enlarging[patch * SERVED_PATCH_PX :][:SERVED_PATCH_PX]
    return torch.from_numpy(np.linalg.pinv(made, rcond=1e-3)[patch * _PATCH_PX :][:_PATCH_PX])


def _make_processor() -> Any:
    vision_tokens = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision_tokens]
    tokenizer = word_tokenizer(
        ("<unk>", *special), eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special
    )
    # SGLang decodes prompts and searches the text for the vision tokens without spaces between them.
    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Replace(Regex(r"^ <\|"), "<|")])
    # A larger image is shrunk to about 196 tokens, as many as a training scene has; a smaller one has fewer, down to 4.
    sizes = {"shortest_edge": 4 * (_MERGE * SERVED_PATCH_PX) ** 2, "longest_edge": PICTURE_PX["qwen2.5-vl"] ** 2}
    cut = {"patch_size": SERVED_PATCH_PX, "merge_size": _MERGE}
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=sizes, **cut),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(size=sizes, **cut),
        chat_template=_TEMPLATE,
    )


def _config(tokenizer: Any, patch_px: int) -> Any:
    return qwen_config(
        tokenizer,
        text={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": 2048,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
        },
        vision={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 3,
            "patch_size": patch_px,
            "spatial_merge_size": _MERGE,
            "window_size": GRID // 2 * _MERGE * patch_px,
            "fullatt_block_indexes": [2],
            "initializer_range": 0.05,
        },
    )
