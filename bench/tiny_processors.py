"""Processors of the tiny checkpoints: the real image processors and chat templates, and a tokenizer of bytes."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

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

_LLAVA_IMAGE_SIZES: dict[str, Any] = {
    "size": {"shortest_edge": LLAVA_IMAGE_PX},
    "crop_size": {"height": LLAVA_IMAGE_PX, "width": LLAVA_IMAGE_PX},
}

_LLAVA_PROCESSOR: dict[str, Any] = {
    "patch_size": LLAVA_PATCH_PX,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "chat_template": _LLAVA_TEMPLATE,
}


def _byte_tokenizer(special_tokens: list[str], *, bos_token: str | None, eos_token: str, pad_token: str) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: token_id for token_id, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special_tokens)
    if bos_token is not None:
        bos = (bos_token, tokenizer.token_to_id(bos_token))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", pair=f"{bos_token} $A {bos_token} $B", special_tokens=[bos]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos_token,
        eos_token=eos_token,
        pad_token=pad_token,
        extra_special_tokens=[token for token in special_tokens if token not in (bos_token, eos_token, pad_token)],
    )


def qwen_processor() -> Any:
    """Returns the processor of Qwen2.5-VL, for images up to 1280 tokens."""
    vision_tokens = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision_tokens],
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    sizes = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28}
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=sizes),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(size=sizes),
        chat_template=_QWEN_TEMPLATE,
    )


def _llava_tokenizer() -> Any:
    return _byte_tokenizer(["<s>", "</s>", "<pad>", "<image>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llava_processor(pad_to_square: bool) -> Any:
    """Returns the processor of LLaVA-1.5, which pads an image to a square or crops its middle."""
    image_processor = transformers.LlavaImageProcessor(**_LLAVA_IMAGE_SIZES, do_pad=pad_to_square)
    return transformers.LlavaProcessor(
        image_processor=image_processor, tokenizer=_llava_tokenizer(), **_LLAVA_PROCESSOR
    )


def llava_next_processor() -> Any:
    """Returns the processor of LLaVA-NeXT, which cuts an image into a base tile and up to 4 crops."""
    image_processor = transformers.LlavaNextImageProcessor(
        **_LLAVA_IMAGE_SIZES, image_grid_pinpoints=LLAVA_NEXT_PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        image_processor=image_processor, tokenizer=_llava_tokenizer(), **_LLAVA_PROCESSOR
    )
