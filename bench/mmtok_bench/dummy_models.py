"""Models of real size without weights: configuration, processor and tokenizer, written without any download.

SGLang draws the weights (`--load-format dummy`): small uniform numbers, the same at every start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtok_bench.families import FamilyName
from mmtok_bench.internvl_parts import chat_model_config
from mmtok_bench.model_parts import CLIP_VIT_L, FAMILY_PARTS, Vocabulary
from mmtok_bench.serve.presets import QUESTIONS

__all__ = ["DUMMY_ARGUMENTS", "DUMMY_MODELS", "make_processor", "write_dummy_model"]

DUMMY_ARGUMENTS = ("--load-format=dummy",)
"""Server arguments for a folder without weights."""

# float16, in which the LLaVAs are published, has too small a range for features of weights below 1e-3.
_DTYPE = "bfloat16"

_QWEN_VOCABULARY = 152064
_LLAVA_VOCABULARY = 32064

_QWEN_7B = {
    "vocab_size": _QWEN_VOCABULARY,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
}
_QWEN_7B_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# Qwen2-VL-7B has the same language model; its encoder is as `Qwen2VLVisionConfig` of Transformers 5.19 has it by
# default.
_QWEN2_VL_7B = {**_QWEN_7B, "max_position_embeddings": 32768}
_QWEN2_VL_VISION = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
_QWEN_32B = {
    **_QWEN_7B,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}
# Qwen3-VL-8B and -30B-A3B, as in pytorch/torchtitan torchtitan/experiments/qwen3_vl/__init__.py (commit 0375bb6).
_QWEN3_VL_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
}
_QWEN3_VL_30B = {
    **_QWEN3_VL_8B,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
_QWEN3_VL_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
# Qwen3.5-9B and -35B-A3B, as in transformers 5.19 models/qwen3_5 and qwen3_5_moe, whose configurations have these as
# defaults; the second also in THUDM/slime scripts/models/qwen3.5-35B-A3B.sh (commit 10cefc3).
_QWEN3_5_9B = {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 262144,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_QWEN3_5_35B = {
    **_QWEN3_5_9B,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_QWEN3_5_VISION = {name: value for name, value in _QWEN3_VL_VISION.items() if name != "deepstack_visual_indexes"}
# InternVL3-8B is InternViT-300M and Qwen2.5-7B (ErfeiCui/InternVL-doc docs/en/internvl3.0/introduction.md, commit
# 10c698e), InternVL3.5-8B the same encoder and Qwen3-8B (its docs/en/internvl3.5). The language models are as in
# citsjtu2020/LLM-Prof sglang/Model_Config.md (commit 8434c8d), the encoder as `InternVLVisionConfig` of Transformers
# 5.19 has it by default.
_INTERN_VIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_QWEN2_5_7B = {**_QWEN_7B, "max_position_embeddings": 131072}
_QWEN3_8B = {**_QWEN3_VL_8B, "model_type": "qwen3", "max_position_embeddings": 40960}
_VICUNA_7B = {
    "vocab_size": _LLAVA_VOCABULARY,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_VICUNA_13B = {
    **_VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
# For a CPU: the language model of Qwen2.5-0.5B, and encoders so small that it dominates. (In the 7B models the encoder
# takes about a third of a prefill's arithmetic with Qwen2.5-VL and a twentieth with LLaVA-1.5.)
_TEXT_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
# One head and two blocks, one with windows and one with full attention: on a CPU, SGLang 0.5.23 computes the full
# attention matrix for windows too. With more blocks the encoder would take longer than the language model.
_QWEN_SMALL_VISION = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_heads": 1,
    "fullatt_block_indexes": [1],
}
_QWEN3_VL_SMALL_VISION = {
    **_QWEN3_VL_VISION,
    "depth": 3,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_heads": 2,
    "deepstack_visual_indexes": [0, 1, 2],
}
_CLIP_SMALL = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "projection_dim": 384,
}


@dataclass(frozen=True, slots=True)
class _DummyModel:
    """One model.

    Args:
        family: Its family.
        text: Fields of the language model's configuration.
        vision: Fields of the vision encoder's.
        image_px: Side of the square that the encoder of a LLaVA-1.5 reads.
    """

    family: FamilyName
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image_px: int = 336

    def processor(self) -> Any:
        """Returns the processor; each word of a prompt is one token, as it is with a real one."""
        roles = ("system", "You are a helpful assistant.", "user", "assistant", "USER: ", " ASSISTANT:")
        words = "\n".join((*QUESTIONS, *roles))
        vocabulary = Vocabulary(words, self.text["vocab_size"], has_merges=self.family.startswith("qwen3.5"))
        return FAMILY_PARTS[self.family].processor(vocabulary, **self._image_tokens(), **self._image_side())

    def config(self, tokenizer: Any) -> Any:
        """Returns the configuration for the processor's tokenizer."""
        return FAMILY_PARTS[self.family].config(tokenizer, self.text, self.vision, **self._image_side())

    def _image_tokens(self) -> dict[str, int]:
        if not self.family.startswith("qwen"):
            return {}
        # The published processors from Qwen3-VL on enlarge an image of fewer than 64 tokens.
        least = {} if self.family.startswith("qwen2") else {"min_image_tokens": 64}
        return {"max_image_tokens": 16384, **least}

    def _image_side(self) -> dict[str, int]:
        return {"image_px": self.image_px} if self.family == "llava-1.5" else {}


DUMMY_MODELS: dict[str, _DummyModel] = {
    "qwen2-vl-7b": _DummyModel("qwen2-vl", _QWEN2_VL_7B, _QWEN2_VL_VISION),
    "qwen2.5-vl-7b": _DummyModel("qwen2.5-vl", _QWEN_7B, _QWEN_7B_VISION),
    "qwen2.5-vl-32b": _DummyModel("qwen2.5-vl", _QWEN_32B, {**_QWEN_7B_VISION, "intermediate_size": 3456}),
    "qwen3-vl-8b": _DummyModel("qwen3-vl", _QWEN3_VL_8B, _QWEN3_VL_VISION),
    "qwen3-vl-30b-a3b": _DummyModel("qwen3-vl-moe", _QWEN3_VL_30B, _QWEN3_VL_VISION),
    "qwen3.5-9b": _DummyModel("qwen3.5", _QWEN3_5_9B, _QWEN3_5_VISION),
    "qwen3.5-35b-a3b": _DummyModel("qwen3.5-moe", _QWEN3_5_35B, _QWEN3_5_VISION),
    "llava-1.5-7b": _DummyModel("llava-1.5", _VICUNA_7B, CLIP_VIT_L),
    "llava-1.5-13b": _DummyModel("llava-1.5", _VICUNA_13B, CLIP_VIT_L),
    "llava-next-7b": _DummyModel("llava-next", _VICUNA_7B, CLIP_VIT_L),
    "llava-next-13b": _DummyModel("llava-next", _VICUNA_13B, CLIP_VIT_L),
    "internvl3-8b": _DummyModel("internvl3", {"dtype": _DTYPE, **_QWEN2_5_7B}, _INTERN_VIT_300M),
    "internvl3.5-8b": _DummyModel("internvl3", {"dtype": _DTYPE, **_QWEN3_8B}, _INTERN_VIT_300M),
    "qwen2.5-vl-0.5b": _DummyModel("qwen2.5-vl", {**_TEXT_05B, "tie_word_embeddings": True}, _QWEN_SMALL_VISION),
    "qwen3-vl-0.5b": _DummyModel(
        "qwen3-vl", {**_TEXT_05B, "head_dim": 64, "tie_word_embeddings": True}, _QWEN3_VL_SMALL_VISION
    ),
    # 448 pixels, where the published model has 336: 1024 tokens, where it has 576.
    "llava-1.5-0.5b": _DummyModel("llava-1.5", _TEXT_05B, _CLIP_SMALL, image_px=448),
}
"""Models by name; those of 7B and above have the sizes of the published checkpoints."""


def make_processor(name: str) -> Any:
    """Returns the processor of one of `DUMMY_MODELS`."""
    return DUMMY_MODELS[name].processor()


def write_dummy_model(name: str, folder: Path) -> Path:
    """Writes a model without weights, to be served with `DUMMY_ARGUMENTS`; returns `folder`.

    Args:
        name: One of `DUMMY_MODELS`.
        folder: Where to write; files of an earlier call are overwritten.

    Raises:
        ValueError: An unknown name.
        FileExistsError: The folder holds weights: it is a checkpoint.
    """
    if name not in DUMMY_MODELS:
        raise ValueError(f"a model without weights is one of {', '.join(DUMMY_MODELS)}, got {name!r}")
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        raise FileExistsError(f"{folder} holds weights, a model without weights is not written over them")
    model = DUMMY_MODELS[name]
    processor = model.processor()
    config = model.config(processor.tokenizer)
    if model.family == "internvl3":
        config = chat_model_config(config)
    else:
        config.architectures = [FAMILY_PARTS[model.family].architecture]
    config.dtype = _DTYPE
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
