"""Processors of made-up checkpoints: the real image processors and chat templates, and a made-up tokenizer."""

from __future__ import annotations

from typing import Any

import transformers

from mmtok_bench.byte_tokenizer import BYTES, Vocabulary, byte_tokenizer

__all__ = [
    "LLAVA_IMAGE_PX",
    "LLAVA_NEXT_PINPOINTS",
    "LLAVA_PATCH_PX",
    "llava_next_processor",
    "llava_processor",
    "qwen_processor",
]

_QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image_url' in content %}{{ '<image>\n' }}{% endif %}"
    "{% endfor %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

LLAVA_IMAGE_PX = 336
LLAVA_PATCH_PX = 14
LLAVA_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

_LLAVA_PROCESSOR: dict[str, Any] = {
    "patch_size": LLAVA_PATCH_PX,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "chat_template": _LLAVA_TEMPLATE,
}


def qwen_processor(vocabulary: Vocabulary = BYTES, *, max_image_tokens: int = 1280) -> Any:
    """Returns the processor of Qwen2.5-VL; a larger image is shrunk to `max_image_tokens`."""
    vision_tokens = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision_tokens],
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        vocabulary=vocabulary,
    )
    sizes = {"shortest_edge": 4 * 28 * 28, "longest_edge": max_image_tokens * 28 * 28}
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=sizes),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(size=sizes),
        chat_template=_QWEN_TEMPLATE,
    )


def _llava_image_sizes(image_px: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": image_px}, "crop_size": {"height": image_px, "width": image_px}}


def _llava_tokenizer(vocabulary: Vocabulary) -> Any:
    return byte_tokenizer(
        ["<s>", "</s>", "<pad>", "<image>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        vocabulary=vocabulary,
    )


def llava_processor(pad_to_square: bool, vocabulary: Vocabulary = BYTES, *, image_px: int = LLAVA_IMAGE_PX) -> Any:
    """Returns the processor of LLaVA-1.5, which pads an image to a square or crops its middle."""
    image_processor = transformers.LlavaImageProcessor(**_llava_image_sizes(image_px), do_pad=pad_to_square)
    return transformers.LlavaProcessor(
        image_processor=image_processor, tokenizer=_llava_tokenizer(vocabulary), **_LLAVA_PROCESSOR
    )


def llava_next_processor(vocabulary: Vocabulary = BYTES) -> Any:
    """Returns the processor of LLaVA-NeXT, which cuts an image into a base tile and up to 4 crops."""
    image_processor = transformers.LlavaNextImageProcessor(
        **_llava_image_sizes(LLAVA_IMAGE_PX), image_grid_pinpoints=LLAVA_NEXT_PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        image_processor=image_processor, tokenizer=_llava_tokenizer(vocabulary), **_LLAVA_PROCESSOR
    )
