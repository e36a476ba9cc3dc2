"""Parts of models without trained weights: tokenizers, real processors and chat templates, and configurations."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mmtok_bench.families import FamilyName
from mmtok_bench.internvl_parts import InternVLProcessor

__all__ = ["CLIP_VIT_L", "FAMILY_PARTS", "FamilyParts", "Vocabulary", "qwen_config"]

Sizes = Mapping[str, Any]

CLIP_VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
}
"""The vision encoder of the published LLaVAs."""

# Unlike Qwen2.5-VL's template, this adds no default system message.
_QWEN3_VL_TEMPLATE = (
    "{% for message in messages %}"
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
_QWEN_TEMPLATE = _QWEN3_VL_TEMPLATE.replace(
    "{% for message in messages %}",
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}",
)

# The models think before they answer; the template opens the thought.
_QWEN3_5_TEMPLATE = _QWEN3_VL_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")

_INTERNVL_TEMPLATE = _QWEN3_VL_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n").replace(
    "<|vision_start|><|video_pad|><|vision_end|>", "<video>\n"
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

_LLAVA_IMAGE_PX = 336
_LLAVA_PATCH_PX = 14
_LLAVA_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

_LLAVA_PROCESSOR: dict[str, Any] = {
    "patch_size": _LLAVA_PATCH_PX,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "chat_template": _LLAVA_TEMPLATE,
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens of a tokenizer beside the 256 bytes and its special tokens.

    Args:
        text: Each of its words (with the space before it; punctuation is separate) is one token.
        size: Number of all tokens, special ones included. Made-up words fill it, so that every token id decodes to
            text. None adds none.
        has_merges: Whether words are merged from bytes, with a token for each step. Qwen3.5 needs this: Transformers
            5.19 reads its tokenizer without `ignore_merges`.
    """

    text: str = ""
    size: int | None = None
    has_merges: bool = False


BYTES = Vocabulary()


def _byte_tokenizer(
    special_tokens: Sequence[str],
    *,
    bos_token: str | None,
    eos_token: str,
    pad_token: str,
    vocabulary: Vocabulary = BYTES,
) -> Any:
    """Returns a fast tokenizer; special tokens have the highest ids.

    Raises:
        ValueError: The vocabulary's size is too small for its tokens.
    """
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [piece for piece, _ in splitter.pre_tokenize_str(vocabulary.text) if len(piece) > 1]
    merges = _merges(words) if vocabulary.has_merges else []
    tokens += dict.fromkeys([first + last for first, last in merges] or words)
    if vocabulary.size is not None:
        num_missing = vocabulary.size - len(tokens) - len(special_tokens)
        if num_missing < 0:
            raise ValueError(f"a vocabulary of {vocabulary.size} tokens is {-num_missing} too small")
        tokens += (_made_up_word(number) for number in range(num_missing))
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    # ignore_merges: a word that is a token is taken whole, not merged from bytes.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=vocabulary != BYTES))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
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


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the merges that build each word letter by letter, from its first letter on."""
    # Words after a space come first: merges of the others could join letters inside them.
    ordered = sorted(words, key=lambda word: not word.startswith("Ġ"))
    return list(dict.fromkeys((word[:end], word[end]) for word in ordered for end in range(1, len(word))))


def _made_up_word(number: int) -> str:
    # Only letters, so that the splitter keeps the word whole; "Ġ" is the byte-level alphabet's space.
    letters = ""
    for _ in range(4):
        number, letter = divmod(number, 26)
        letters += string.ascii_lowercase[letter]
    return f"Ġzq{letters}"


def _qwen_processor(
    vocabulary: Vocabulary = BYTES,
    *,
    processor_class: Any = transformers.Qwen2_5_VLProcessor,
    max_image_tokens: int = 1280,
) -> Any:
    """Returns the processor of Qwen2-VL or Qwen2.5-VL; a larger image is shrunk to `max_image_tokens`."""
    sizes = {"shortest_edge": 4 * 28 * 28, "longest_edge": max_image_tokens * 28 * 28}
    return processor_class(
        image_processor=transformers.Qwen2VLImageProcessor(size=sizes),
        tokenizer=_qwen_tokenizer(vocabulary),
        video_processor=transformers.Qwen2VLVideoProcessor(size=sizes),
        chat_template=_QWEN_TEMPLATE,
    )


def _qwen3_processor(
    vocabulary: Vocabulary = BYTES,
    *,
    chat_template: str = _QWEN3_VL_TEMPLATE,
    min_image_tokens: int = 4,
    max_image_tokens: int = 1280,
) -> Any:
    """Returns the processor of Qwen3-VL or Qwen3.5.

    Images are enlarged or shrunk to that many tokens of 32 x 32 pixels.
    """
    sizes = {"shortest_edge": min_image_tokens * 32 * 32, "longest_edge": max_image_tokens * 32 * 32}
    half = [0.5, 0.5, 0.5]
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=sizes, patch_size=16, image_mean=half, image_std=half),
        tokenizer=_qwen_tokenizer(vocabulary),
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=chat_template,
    )


def _qwen_tokenizer(vocabulary: Vocabulary) -> Any:
    vision_tokens = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    return _byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision_tokens],
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        vocabulary=vocabulary,
    )


def _internvl_processor(vocabulary: Vocabulary = BYTES, *, tile_tokens: int = 256) -> InternVLProcessor:
    """Returns InternVL3's processor; its chat template has `<image>` in the place of an image."""
    tokenizer = _byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>"],
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        vocabulary=vocabulary,
    )
    tokenizer.chat_template = _INTERNVL_TEMPLATE
    return InternVLProcessor(tokenizer, tile_tokens=tile_tokens)


def _llava_image_sizes(image_px: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": image_px}, "crop_size": {"height": image_px, "width": image_px}}


def _llava_tokenizer(vocabulary: Vocabulary) -> Any:
    return _byte_tokenizer(
        ["<s>", "</s>", "<pad>", "<image>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        vocabulary=vocabulary,
    )


def _llava_processor(
    vocabulary: Vocabulary = BYTES, *, pad_to_square: bool = False, image_px: int = _LLAVA_IMAGE_PX
) -> Any:
    """Returns the processor of LLaVA-1.5; it pads an image to a square, or crops its middle as the published one."""
    image_processor = transformers.LlavaImageProcessor(**_llava_image_sizes(image_px), do_pad=pad_to_square)
    return transformers.LlavaProcessor(
        image_processor=image_processor, tokenizer=_llava_tokenizer(vocabulary), **_LLAVA_PROCESSOR
    )


def _llava_next_processor(vocabulary: Vocabulary = BYTES) -> Any:
    """Returns the processor of LLaVA-NeXT, which cuts an image into a base tile and up to 4 crops."""
    image_processor = transformers.LlavaNextImageProcessor(
        **_llava_image_sizes(_LLAVA_IMAGE_PX), image_grid_pinpoints=_LLAVA_NEXT_PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        image_processor=image_processor, tokenizer=_llava_tokenizer(vocabulary), **_LLAVA_PROCESSOR
    )


def qwen_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns a Qwen2.5-VL configuration.

    Args:
        tokenizer: The tokenizer of the family's processor.
        text: Fields of the language model; a head's width is a multiple of 16.
        vision: Fields of the vision encoder, which attends within windows of 112 pixels where
            `fullatt_block_indexes` names no block.
    """
    return transformers.Qwen2_5_VLConfig(
        text_config=_qwen2_text(tokenizer, text),
        vision_config={
            "out_hidden_size": text["hidden_size"],
            "window_size": 112,
            "tokens_per_second": 2,
            **vision,
        },
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def _qwen2_vl_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns a Qwen2-VL configuration.

    Args:
        tokenizer: The tokenizer of the family's processor.
        text: Fields of the language model; a head's width is a multiple of 16.
        vision: Fields of the vision encoder; its width is `embed_dim`.
    """
    return transformers.Qwen2VLConfig(
        # SGLang takes it for the encoder's layer norms, too, whose own is this one.
        text_config={"rms_norm_eps": 1e-6, **_qwen2_text(tokenizer, text)},
        # SGLang reads `in_chans`, as the published checkpoints have it, and Transformers `in_channels`.
        vision_config={"hidden_size": text["hidden_size"], "in_chans": 3, **vision},
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def _qwen2_text(tokenizer: Any, text: Sizes) -> dict[str, Any]:
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    return {
        "rope_parameters": {
            "rope_type": "default",
            "type": "mrope",
            # A quarter of the rotations for time, three eighths each for height and width, as in every size.
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
            "rope_theta": 1000000.0,
        },
        "tie_word_embeddings": False,
        **_qwen_text_ids(tokenizer),
        **text,
    }


def _qwen3_vl_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns a Qwen3-VL configuration; a mixture of experts if `text` has `num_experts`.

    Args:
        tokenizer: The tokenizer of the family's processor.
        text: Fields of the language model, including `head_dim`, a multiple of 32.
        vision: Fields of the vision encoder; DeepStack takes the output of its blocks `deepstack_visual_indexes`.
    """
    half = text["head_dim"] // 2
    config_class = transformers.Qwen3VLMoeConfig if "num_experts" in text else transformers.Qwen3VLConfig
    return config_class(
        text_config={
            "rope_parameters": {
                "rope_type": "default",
                # As in every published size: three eighths of the rotations for time, the rest for height and width.
                "mrope_section": [half * 3 // 8, half * 5 // 16, half * 5 // 16],
                "mrope_interleaved": True,
                "rope_theta": 5000000.0,
            },
            "tie_word_embeddings": False,
            **_qwen_text_ids(tokenizer),
            **text,
        },
        vision_config={"out_hidden_size": text["hidden_size"], **vision},
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def _qwen3_5_config(tokenizer: Any, text: Sizes, vision: Sizes, *, rope_theta: float = 1e7) -> Any:
    """Returns a Qwen3.5 configuration; a mixture of experts if `text` has `num_experts`.

    Args:
        tokenizer: The tokenizer of the family's processor.
        text: Fields of the language model. Every `full_attention_interval`-th layer has full attention, the others
            linear attention. A quarter of its `head_dim` is rotated, a multiple of 2.
        vision: Fields of the vision encoder.
        rope_theta: The base of the rotations; by default that of every published size.
    """
    half, interval = text["head_dim"] // 8, text["full_attention_interval"]
    config_class = transformers.Qwen3_5MoeConfig if "num_experts" in text else transformers.Qwen3_5Config
    return config_class(
        text_config={
            "rope_parameters": {
                "rope_type": "default",
                # Equal parts for time, height and width: 11, 11 and 10 in every published size.
                "mrope_section": [(half + 2) // 3, (half + 1) // 3, half // 3],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
                "rope_theta": rope_theta,
            },
            # Transformers reads these. Without them it would not save the interval, which SGLang reads.
            "layer_types": [
                "linear_attention" if (idx + 1) % interval else "full_attention"
                for idx in range(text["num_hidden_layers"])
            ],
            "tie_word_embeddings": False,
            **_qwen_text_ids(tokenizer),
            **text,
        },
        # Without this field, SGLang uses the DeepStack indexes of Qwen3-VL.
        vision_config={"out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": [], **vision},
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def _qwen_text_ids(tokenizer: Any) -> dict[str, int]:
    token_id = tokenizer.convert_tokens_to_ids
    return {"bos_token_id": token_id("<|endoftext|>"), "eos_token_id": token_id("<|im_end|>")}


def _qwen_token_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def _internvl_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns an InternVL3 configuration of Transformers' class.

    Args:
        tokenizer: The tokenizer of the family's processor.
        text: Fields of the language model, a Qwen3 if `model_type` says so, else a Qwen2.
        vision: Fields of the vision encoder.
    """
    return transformers.InternVLConfig(
        text_config={"tie_word_embeddings": False, **_qwen_text_ids(tokenizer), **text},
        vision_config={"attention_bias": True, "image_size": 448, **vision},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )


def _llava_config(tokenizer: Any, text: Sizes, clip: Sizes, *, image_px: int = _LLAVA_IMAGE_PX) -> Any:
    """Returns a LLaVA-1.5 configuration.

    Args:
        tokenizer: The tokenizer of the family's processor.
        text: Fields of the Llama.
        clip: Fields of the vision encoder.
        image_px: Side of the square that the encoder reads.
    """
    return transformers.LlavaConfig(
        **_llava_fields(tokenizer, text, clip, image_px), image_seq_length=(image_px // _LLAVA_PATCH_PX) ** 2
    )


def _llava_next_config(tokenizer: Any, text: Sizes, clip: Sizes) -> Any:
    """Returns a LLaVA-NeXT configuration; arguments as in `_llava_config`."""
    return transformers.LlavaNextConfig(
        **_llava_fields(tokenizer, text, clip, _LLAVA_IMAGE_PX), image_grid_pinpoints=_LLAVA_NEXT_PINPOINTS
    )


def _llava_fields(tokenizer: Any, text: Sizes, clip: Sizes, image_px: int) -> dict[str, Any]:
    return {
        "text_config": transformers.LlamaConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **text,
        ),
        "vision_config": transformers.CLIPVisionConfig(image_size=image_px, patch_size=_LLAVA_PATCH_PX, **clip),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


@dataclass(frozen=True, slots=True)
class FamilyParts:
    """How a family's model is made.

    Args:
        processor: Returns the processor, with the tokens of a `Vocabulary` (default: the bytes alone).
        config: Returns the configuration from the processor's tokenizer, and fields of the language model and of the
            vision encoder.
        architecture: Transformers' class of the model.
    """

    processor: Callable[..., Any]
    config: Callable[..., Any]
    architecture: str


_qwen3_5_processor = partial(_qwen3_processor, chat_template=_QWEN3_5_TEMPLATE)

FAMILY_PARTS: Mapping[FamilyName, FamilyParts] = {
    "qwen2-vl": FamilyParts(
        partial(_qwen_processor, processor_class=transformers.Qwen2VLProcessor),
        _qwen2_vl_config,
        "Qwen2VLForConditionalGeneration",
    ),
    "qwen2.5-vl": FamilyParts(_qwen_processor, qwen_config, "Qwen2_5_VLForConditionalGeneration"),
    "qwen3-vl": FamilyParts(_qwen3_processor, _qwen3_vl_config, "Qwen3VLForConditionalGeneration"),
    "qwen3-vl-moe": FamilyParts(_qwen3_processor, _qwen3_vl_config, "Qwen3VLMoeForConditionalGeneration"),
    "qwen3.5": FamilyParts(_qwen3_5_processor, _qwen3_5_config, "Qwen3_5ForConditionalGeneration"),
    "qwen3.5-moe": FamilyParts(_qwen3_5_processor, _qwen3_5_config, "Qwen3_5MoeForConditionalGeneration"),
    "llava-1.5": FamilyParts(_llava_processor, _llava_config, "LlavaForConditionalGeneration"),
    "llava-next": FamilyParts(_llava_next_processor, _llava_next_config, "LlavaNextForConditionalGeneration"),
    "internvl3": FamilyParts(_internvl_processor, _internvl_config, "InternVLForConditionalGeneration"),
}
