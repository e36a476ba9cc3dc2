"""Parts of models without trained weights: tokenizers, real processors and chat templates, and configurations."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mmtok_bench.families import FamilyName
from mmtok_bench.internvl_parts import InternVLProcessor

__all__ = ["FAMILY_PARTS", "FamilyParts", "Vocabulary", "qwen_config", "qwen_vision_sizes", "transformer_sizes"]

Sizes = Mapping[str, Any]

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

# The models think before they answer, without being told to.
_GLM_TEMPLATE = (
    "[gMASK]<sop>"
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|begin_of_video|><|video|><|end_of_video|>"
    "{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
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


def transformer_sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    """Returns fields that the configurations of language models, CLIP and InternViT have in common."""
    return {
        **{"hidden_size": hidden, "intermediate_size": intermediate},
        **{"num_hidden_layers": layers, "num_attention_heads": heads},
    }


def qwen_vision_sizes(depth: int, hidden: int, intermediate: int, heads: int) -> dict[str, Any]:
    """Returns fields that the configurations of the vision encoders from Qwen2.5-VL on have in common."""
    return {"depth": depth, "hidden_size": hidden, "intermediate_size": intermediate, "num_heads": heads}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens of a tokenizer in addition to the 256 bytes and its special tokens.

    Args:
        text: Each of its words (with the space before it; punctuation is separate) is one token.
        size: Number of all tokens, including special ones. Made-up words are added up to this number, so that every
            token id decodes to text. None adds no words.
        has_merges: Whether words are merged from bytes, with a token for each step. Qwen3.5 needs this: Transformers
            5.19 reads its tokenizer without `ignore_merges`.
    """

    text: str = ""
    size: int | None = None
    has_merges: bool = False


BYTES = Vocabulary()


def _byte_tokenizer(special_tokens: Sequence[str], vocabulary: Vocabulary, **roles: str | None) -> Any:
    """Returns a fast tokenizer; special tokens have the highest ids.

    Args:
        special_tokens: All special tokens.
        vocabulary: The other tokens.
        **roles: `eos_token`, `pad_token`, and `bos_token`, with which each text begins unless it is None.

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
        # Only letters, so that the splitter keeps a word whole; "Ġ" is the byte-level alphabet's space.
        made_up = itertools.product(string.ascii_lowercase, repeat=4)
        tokens += ("Ġzq" + "".join(reversed(letters)) for letters in itertools.islice(made_up, num_missing))
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    # ignore_merges: a word that is a token is taken whole, not merged from bytes.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=vocabulary != BYTES))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    if bos := roles["bos_token"]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    others = [token for token in special_tokens if token not in roles.values()]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=others, **roles)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the merges that build each word letter by letter, from its first letter on."""
    # Words after a space come first: merges of the others could join letters inside them.
    ordered = sorted(words, key=lambda word: not word.startswith("Ġ"))
    return list(dict.fromkeys((word[:end], word[end]) for word in ordered for end in range(1, len(word))))


def _qwen_tokenizer(vocabulary: Vocabulary, *vision_tokens: str) -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision_tokens]
    return _byte_tokenizer(special, vocabulary, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>")


_QWEN_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


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
        tokenizer=_qwen_tokenizer(vocabulary, *_QWEN_VISION_TOKENS),
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
    """Returns the processor of Qwen3-VL or Qwen3.5; images outside these limits are enlarged or shrunk."""
    sizes = {"shortest_edge": min_image_tokens * 32 * 32, "longest_edge": max_image_tokens * 32 * 32}
    half = [0.5, 0.5, 0.5]
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=sizes, patch_size=16, image_mean=half, image_std=half),
        tokenizer=_qwen_tokenizer(vocabulary, *_QWEN_VISION_TOKENS),
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=chat_template,
    )


def _internvl_processor(vocabulary: Vocabulary = BYTES, *, tile_tokens: int = 256) -> InternVLProcessor:
    """Returns InternVL3's processor; its chat template has `<image>` in the place of an image."""
    tokenizer = _qwen_tokenizer(vocabulary, "<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>")
    tokenizer.chat_template = _INTERNVL_TEMPLATE
    return InternVLProcessor(tokenizer, tile_tokens=tile_tokens)


_GLM_VISION_TOKENS = tuple(
    name for kind in ("image", "video") for name in (f"<|begin_of_{kind}|>", f"<|{kind}|>", f"<|end_of_{kind}|>")
)


def _glm_processor(
    vocabulary: Vocabulary = BYTES,
    *,
    is_4_6: bool = False,
    min_image_tokens: int = 4,
    max_image_tokens: int = 1280,
    min_video_tokens: int = 8,
) -> Any:
    """Returns the processor of GLM-4.1V or of GLM-4.6V; images and videos outside these limits are scaled."""
    special = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", *_GLM_VISION_TOKENS]
    roles = {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    # Pixels of two equal frames are counted.
    sizes = {"shortest_edge": min_image_tokens * 2 * 28 * 28, "longest_edge": max_image_tokens * 2 * 28 * 28}
    name = "Glm46V" if is_4_6 else "Glm4v"
    return getattr(transformers, f"{name}Processor")(
        image_processor=getattr(transformers, f"{name}ImageProcessor")(size=sizes),
        tokenizer=_byte_tokenizer(special, vocabulary, **roles),
        video_processor=getattr(transformers, f"{name}VideoProcessor")(
            size={"shortest_edge": min_video_tokens * 2 * 28 * 28, "longest_edge": 30000 * 2 * 28 * 28}
        ),
        chat_template=_GLM_TEMPLATE,
    )


def _llava_processor(
    vocabulary: Vocabulary = BYTES,
    *,
    is_next: bool = False,
    pad_to_square: bool = False,
    image_px: int = _LLAVA_IMAGE_PX,
) -> Any:
    """Returns the processor of LLaVA-1.5, or of LLaVA-NeXT, which cuts an image into a base tile and up to 4 crops.

    LLaVA-1.5's crops the middle of an image, as the published one does, or pads an image to a square.
    """
    sizes = {"size": {"shortest_edge": image_px}, "crop_size": {"height": image_px, "width": image_px}}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    options: dict[str, Any] = {
        "tokenizer": _byte_tokenizer(["<s>", "</s>", "<pad>", "<image>"], vocabulary, **roles),
        "patch_size": _LLAVA_PATCH_PX,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": _LLAVA_TEMPLATE,
    }
    if is_next:
        tiles = transformers.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=_LLAVA_NEXT_PINPOINTS)
        return transformers.LlavaNextProcessor(image_processor=tiles, **options)
    image_processor = transformers.LlavaImageProcessor(**sizes, do_pad=pad_to_square)
    return transformers.LlavaProcessor(image_processor=image_processor, **options)


def _qwen_config(
    config_class: Any, tokenizer: Any, text: Sizes, vision: Sizes, sections: Sequence[int], **rope: Any
) -> Any:
    """Returns the configuration of a Qwen.

    Args:
        config_class: Transformers' class of the configuration.
        tokenizer: The tokenizer of the family's processor.
        text: Fields of the language model.
        vision: Fields of the vision encoder.
        sections: How many rotations are for time, height and width.
        **rope: Further fields of `rope_parameters`.
    """
    token_id = tokenizer.convert_tokens_to_ids
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return config_class(
        text_config={
            "rope_parameters": {"rope_type": "default", "mrope_section": list(sections), **rope},
            "tie_word_embeddings": False,
            **_qwen_text_ids(tokenizer),
            **text,
        },
        vision_config=vision,
        **{f"{name}_token_id": token_id(f"<|{token}|>") for name, token in names.items()},
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def _qwen_text_ids(tokenizer: Any) -> dict[str, int]:
    token_id = tokenizer.convert_tokens_to_ids
    return {"bos_token_id": token_id("<|endoftext|>"), "eos_token_id": token_id("<|im_end|>")}


def _qwen2_config(config_class: Any, tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    # A quarter of the rotations for time, three eighths each for height and width, as in every published size.
    sections = half // 4, half * 3 // 8, half * 3 // 8
    return _qwen_config(config_class, tokenizer, text, vision, sections, type="mrope", rope_theta=1e6)


def qwen_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns a Qwen2.5-VL configuration.

    Args:
        tokenizer: The tokenizer of the family's processor.
        text: Fields of the language model; a head's width is a multiple of 16.
        vision: Fields of the vision encoder, which attends within windows of 112 pixels where
            `fullatt_block_indexes` names no block.
    """
    usual = {"out_hidden_size": text["hidden_size"], "window_size": 112, "tokens_per_second": 2}
    return _qwen2_config(transformers.Qwen2_5_VLConfig, tokenizer, text, {**usual, **vision})


def _qwen2_vl_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns a Qwen2-VL configuration; the width of the vision encoder is `embed_dim`."""
    # SGLang uses the language model's rms_norm_eps for the encoder's layer norms, too, whose own value is 1e-6.
    # It reads `in_chans`, as the published checkpoints have it, where Transformers reads `in_channels`.
    vision = {"hidden_size": text["hidden_size"], "in_chans": 3, **vision}
    return _qwen2_config(transformers.Qwen2VLConfig, tokenizer, {"rms_norm_eps": 1e-6, **text}, vision)


def _qwen3_vl_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns a Qwen3-VL configuration; a mixture of experts if `text` has `num_experts`.

    `text` has a `head_dim`, a multiple of 32. DeepStack takes the output of the encoder's blocks
    `deepstack_visual_indexes`.
    """
    half = text["head_dim"] // 2
    config_class = transformers.Qwen3VLMoeConfig if "num_experts" in text else transformers.Qwen3VLConfig
    # As in every published size: three eighths of the rotations for time, the rest for height and width.
    sections = half * 3 // 8, half * 5 // 16, half * 5 // 16
    vision = {"out_hidden_size": text["hidden_size"], **vision}
    return _qwen_config(config_class, tokenizer, text, vision, sections, mrope_interleaved=True, rope_theta=5e6)


def _qwen3_5_config(tokenizer: Any, text: Sizes, vision: Sizes, *, rope_theta: float = 1e7) -> Any:
    """Returns a Qwen3.5 configuration; a mixture of experts if `text` has `num_experts`.

    Every `full_attention_interval`-th layer has full attention, the others linear attention. A quarter of the
    `head_dim` is rotated, a multiple of 2. By default, `rope_theta` is that of every published size.
    """
    half, interval = text["head_dim"] // 8, text["full_attention_interval"]
    config_class = transformers.Qwen3_5MoeConfig if "num_experts" in text else transformers.Qwen3_5Config
    # Transformers reads these. Without them it would not save the interval, which SGLang reads.
    layer_types = [
        "linear_attention" if (idx + 1) % interval else "full_attention" for idx in range(text["num_hidden_layers"])
    ]
    # Without this field, SGLang uses the DeepStack indexes of Qwen3-VL.
    vision = {"out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": [], **vision}
    # Equal parts for time, height and width: 11, 11 and 10 in every published size.
    sections = (half + 2) // 3, (half + 1) // 3, half // 3
    rope = {"mrope_interleaved": True, "partial_rotary_factor": 0.25, "rope_theta": rope_theta}
    return _qwen_config(config_class, tokenizer, {"layer_types": layer_types, **text}, vision, sections, **rope)


def _internvl_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns an InternVL3 configuration of Transformers' class; its language model is by default a Qwen2."""
    return transformers.InternVLConfig(
        text_config={"tie_word_embeddings": False, **_qwen_text_ids(tokenizer), **text},
        vision_config={"attention_bias": True, "image_size": 448, **vision},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )


def _glm_config(tokenizer: Any, text: Sizes, vision: Sizes) -> Any:
    """Returns a GLM-4.1V configuration, or of GLM-4.5V, a mixture of experts, if `text` has `n_routed_experts`.

    Half of a head is rotated; its width is a multiple of 64.

    The encoder's `hidden_size` is that of a patch, `out_hidden_size` that of its blocks' inner layer and of a token.
    """
    token_id = tokenizer.convert_tokens_to_ids
    quarter = text["hidden_size"] // text["num_attention_heads"] // 4
    # A quarter of the rotations for time, three eighths each for height and width, as in every published size.
    sections = [quarter // 4, quarter * 3 // 8, quarter * 3 // 8]
    rope = {"rope_type": "default", "mrope_section": sections, "partial_rotary_factor": 0.5, "rope_theta": 1e4}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    of_kinds = {
        name: token_id(token)
        for kind in ("image", "video")
        for name, token in (
            (f"{kind}_token_id", f"<|{kind}|>"),
            (f"{kind}_start_token_id", f"<|begin_of_{kind}|>"),
            (f"{kind}_end_token_id", f"<|end_of_{kind}|>"),
        )
    }
    config_class = transformers.Glm4vMoeConfig if "n_routed_experts" in text else transformers.Glm4vConfig
    return config_class(
        text_config={"rope_parameters": rope, "tie_word_embeddings": False, **ids, **text},
        vision_config={"out_hidden_size": text["hidden_size"], **vision},
        **of_kinds,
        tie_word_embeddings=False,
    )


def _llava_config(
    tokenizer: Any,
    text: Sizes,
    clip: Sizes,
    *,
    config_class: Any = transformers.LlavaConfig,
    image_px: int = _LLAVA_IMAGE_PX,
    **more: Any,
) -> Any:
    """Returns the configuration of a LLaVA whose vision encoder reads squares of `image_px`."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return config_class(
        text_config=transformers.LlamaConfig(**ids, **text),
        vision_config=transformers.CLIPVisionConfig(image_size=image_px, patch_size=_LLAVA_PATCH_PX, **clip),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_px // _LLAVA_PATCH_PX) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **more,
    )


@dataclass(frozen=True, slots=True)
class FamilyParts:
    """Functions that make a family's model.

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
    "llava-next": FamilyParts(
        partial(_llava_processor, is_next=True),
        partial(_llava_config, config_class=transformers.LlavaNextConfig, image_grid_pinpoints=_LLAVA_NEXT_PINPOINTS),
        "LlavaNextForConditionalGeneration",
    ),
    "internvl3": FamilyParts(_internvl_processor, _internvl_config, "InternVLForConditionalGeneration"),
    "glm-4.1v": FamilyParts(_glm_processor, _glm_config, "Glm4vForConditionalGeneration"),
    # GLM-4.6V's, which has the same architecture.
    "glm-4.5v": FamilyParts(partial(_glm_processor, is_4_6=True), _glm_config, "Glm4vMoeForConditionalGeneration"),
}
