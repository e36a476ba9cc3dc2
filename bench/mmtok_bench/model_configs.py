"""Configurations of made-up checkpoints: the real architectures, in the sizes that are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from mmtok_bench.tiny_processors import LLAVA_IMAGE_PX, LLAVA_NEXT_PINPOINTS, LLAVA_PATCH_PX

__all__ = ["llava_config", "llava_next_config", "qwen_config"]

Sizes = Mapping[str, Any]


def qwen_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns a Qwen2.5-VL configuration.

    Args:
        tokenizer: Of `qwen_processor`.
        text: Fields of the language model; a head's width is a multiple of 16.
        vision: Fields of the vision encoder, which attends within windows of 112 pixels where
            `fullatt_block_indexes` names no block.
    """
    token_id = tokenizer.convert_tokens_to_ids
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "rope_parameters": {
                "rope_type": "default",
                "type": "mrope",
                # A quarter of the rotations for time, three eighths each for height and width, as in every size.
                "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
                "rope_theta": 1000000.0,
            },
            "tie_word_embeddings": False,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            **text,
        },
        vision_config={
            "out_hidden_size": text["hidden_size"],
            "window_size": 112,
            "tokens_per_second": 2,
            **vision,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def llava_config(tokenizer: Any, text: Sizes, clip: Sizes, *, image_px: int = LLAVA_IMAGE_PX) -> Any:
    """Returns a LLaVA-1.5 configuration.

    Args:
        tokenizer: Of `llava_processor`.
        text: Fields of the Llama.
        clip: Fields of the vision encoder.
        image_px: Side of the square that the encoder reads.
    """
    return transformers.LlavaConfig(
        **_llava_fields(tokenizer, text, clip, image_px), image_seq_length=(image_px // LLAVA_PATCH_PX) ** 2
    )


def llava_next_config(tokenizer: Any, text: Sizes, clip: Sizes) -> Any:
    """Returns a LLaVA-NeXT configuration; arguments as of `llava_config`."""
    return transformers.LlavaNextConfig(
        **_llava_fields(tokenizer, text, clip, LLAVA_IMAGE_PX), image_grid_pinpoints=LLAVA_NEXT_PINPOINTS
    )


def _llava_fields(tokenizer: Any, text: Sizes, clip: Sizes, image_px: int) -> dict[str, Any]:
    return {
        "text_config": transformers.LlamaConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **text,
        ),
        "vision_config": transformers.CLIPVisionConfig(image_size=image_px, patch_size=LLAVA_PATCH_PX, **clip),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
