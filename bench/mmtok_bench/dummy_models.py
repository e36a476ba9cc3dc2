"""Models of real size without weights: configuration, processor and tokenizer, written without any download.

SGLang draws the weights (`--load-format dummy`): small uniform numbers, the same at every start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmtok_bench.families import FamilyName
from mmtok_bench.internvl_parts import chat_model_config
from mmtok_bench.model_parts import FAMILY_PARTS, Vocabulary, qwen_vision_sizes, transformer_sizes
from mmtok_bench.serve.presets import QUESTIONS

__all__ = ["DUMMY_ARGUMENTS", "DUMMY_MODELS", "make_processor", "write_dummy_model"]

DUMMY_ARGUMENTS = ("--load-format=dummy",)
"""Server arguments for a folder without weights."""

# float16, in which the LLaVAs are published, has too small a range for features of weights below 1e-3.
_DTYPE = "bfloat16"


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """Returns fields of a language model's configuration; `more` are its vocabulary, positions and others."""
    return {**transformer_sizes(hidden, intermediate, layers, heads), "num_key_value_heads": kv_heads, **more}


_QWEN2 = {"vocab_size": 152064, "max_position_embeddings": 128000}
_QWEN_7B = _text(3584, 18944, 28, 28, 4, **_QWEN2)
_QWEN_3B = _text(2048, 11008, 36, 16, 2, vocab_size=151936, max_position_embeddings=128000, tie_word_embeddings=True)
_QWEN_32B = _text(5120, 27648, 64, 40, 8, **_QWEN2)
_QWEN_7B_VISION = {**qwen_vision_sizes(32, 1280, 3420, 16), "fullatt_block_indexes": [7, 15, 23, 31]}
# Qwen2-VL-7B has the same language model; its encoder is the default of `Qwen2VLVisionConfig` in Transformers 5.19.
_QWEN2_VL_7B = {**_QWEN_7B, "max_position_embeddings": 32768}
_QWEN2_VL_VISION = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
# Qwen3-VL-8B and -30B-A3B, as in pytorch/torchtitan torchtitan/experiments/qwen3_vl/__init__.py (commit 0375bb6).
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 262144}
_QWEN3_VL_8B = _text(4096, 12288, 36, 32, 8, **_QWEN3)
_QWEN3_VL_30B = {
    **_text(2048, 6144, 48, 32, 4, **_QWEN3),
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}
_QWEN3_5_VISION = {**qwen_vision_sizes(27, 1152, 4304, 16), "num_position_embeddings": 2304}
_QWEN3_VL_VISION = {**_QWEN3_5_VISION, "deepstack_visual_indexes": [8, 16, 24]}
# Qwen3.5-9B and -35B-A3B, as in transformers 5.19 models/qwen3_5 and qwen3_5_moe, whose configurations have these as
# defaults; the second also in THUDM/slime scripts/models/qwen3.5-35B-A3B.sh (commit 10cefc3).
_QWEN3_5 = {
    **{"vocab_size": 248320, "head_dim": 256, "max_position_embeddings": 262144, "full_attention_interval": 4},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
}
_QWEN3_5_9B = _text(4096, 12288, 32, 16, 4, **_QWEN3_5)
_QWEN3_5_35B = {
    **_text(2048, 12288, 40, 16, 2, **_QWEN3_5),
    **{"num_experts": 256, "num_experts_per_tok": 8},
    **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
}
# InternVL3-8B is InternViT-300M and Qwen2.5-7B (ErfeiCui/InternVL-doc docs/en/internvl3.0/introduction.md, commit
# 10c698e), InternVL3.5-8B the same encoder and Qwen3-8B (its docs/en/internvl3.5). The language models are as in
# citsjtu2020/LLM-Prof sglang/Model_Config.md (commit 8434c8d), the encoder is the default of `InternVLVisionConfig` in
# Transformers 5.19.
_INTERN_VIT_300M = {**transformer_sizes(1024, 4096, 24, 16), "patch_size": 14}
_QWEN2_5_7B = {**_QWEN_7B, "max_position_embeddings": 131072, "dtype": _DTYPE}
_QWEN3_8B = {**_QWEN3_VL_8B, "model_type": "qwen3", "max_position_embeddings": 40960, "dtype": _DTYPE}
# GLM-4.1V-9B, as in transformers 5.19 models/glm4v, whose configuration has these as defaults.
_GLM_9B = _text(4096, 13696, 40, 32, 2, vocab_size=151552, max_position_embeddings=32768)
_GLM_VISION = qwen_vision_sizes(24, 1536, 13696, 12)
_VICUNA = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_VICUNA_7B = _text(4096, 11008, 32, 32, 32, **_VICUNA)
_VICUNA_13B = _text(5120, 13824, 40, 40, 40, **_VICUNA)
_CLIP_VIT_L = {**transformer_sizes(1024, 4096, 24, 16), "projection_dim": 768}
# For a CPU: the language model of Qwen2.5-0.5B, and encoders so small that it dominates. (In the 7B models the encoder
# takes about a third of a prefill's arithmetic with Qwen2.5-VL and a twentieth with LLaVA-1.5.)
_TEXT_05B = _text(896, 4864, 24, 14, 2, vocab_size=151936, max_position_embeddings=32768)
_TIED_05B = {**_TEXT_05B, "tie_word_embeddings": True}
# One head and two blocks, one with windows and one with full attention: on a CPU, SGLang 0.5.23 computes the full
# attention matrix for windows too. With more blocks the encoder would take longer than the language model.
_QWEN_SMALL_VISION = {**qwen_vision_sizes(2, 128, 512, 1), "fullatt_block_indexes": [1]}
_QWEN3_VL_SMALL_VISION = {
    **{**qwen_vision_sizes(3, 128, 512, 2), "num_position_embeddings": 2304},
    "deepstack_visual_indexes": [0, 1, 2],
}
_CLIP_SMALL = {**transformer_sizes(384, 1536, 12, 6), "projection_dim": 384}


@dataclass(frozen=True, slots=True)
class _DummyModel:
    """A model without weights.

    Args:
        family: The model's family.
        text: Fields of the language model's configuration.
        vision: Fields of the vision encoder's configuration.
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
        sizes = self._image_side()
        if self.family.startswith("qwen"):
            sizes["max_image_tokens"] = 16384
        if self.family.startswith("glm"):
            sizes |= {"min_image_tokens": 8, "max_image_tokens": 7500}
        if self.family.startswith("qwen3"):
            # The published processors enlarge an image of fewer than 64 tokens.
            sizes["min_image_tokens"] = 64
        return FAMILY_PARTS[self.family].processor(vocabulary, **sizes)

    def config(self, tokenizer: Any) -> Any:
        """Returns the configuration for the processor's tokenizer."""
        return FAMILY_PARTS[self.family].config(tokenizer, self.text, self.vision, **self._image_side())

    def _image_side(self) -> dict[str, int]:
        return {"image_px": self.image_px} if self.family == "llava-1.5" else {}


DUMMY_MODELS: dict[str, _DummyModel] = {
    "qwen2-vl-7b": _DummyModel("qwen2-vl", _QWEN2_VL_7B, _QWEN2_VL_VISION),
    "qwen2.5-vl-3b": _DummyModel("qwen2.5-vl", _QWEN_3B, _QWEN_7B_VISION),
    "qwen2.5-vl-7b": _DummyModel("qwen2.5-vl", _QWEN_7B, _QWEN_7B_VISION),
    "qwen2.5-vl-32b": _DummyModel("qwen2.5-vl", _QWEN_32B, {**_QWEN_7B_VISION, "intermediate_size": 3456}),
    "qwen3-vl-8b": _DummyModel("qwen3-vl", _QWEN3_VL_8B, _QWEN3_VL_VISION),
    "qwen3-vl-30b-a3b": _DummyModel("qwen3-vl-moe", _QWEN3_VL_30B, _QWEN3_VL_VISION),
    "qwen3.5-9b": _DummyModel("qwen3.5", _QWEN3_5_9B, _QWEN3_5_VISION),
    "qwen3.5-35b-a3b": _DummyModel("qwen3.5-moe", _QWEN3_5_35B, _QWEN3_5_VISION),
    "llava-1.5-7b": _DummyModel("llava-1.5", _VICUNA_7B, _CLIP_VIT_L),
    "llava-1.5-13b": _DummyModel("llava-1.5", _VICUNA_13B, _CLIP_VIT_L),
    "llava-next-7b": _DummyModel("llava-next", _VICUNA_7B, _CLIP_VIT_L),
    "llava-next-13b": _DummyModel("llava-next", _VICUNA_13B, _CLIP_VIT_L),
    "internvl3-8b": _DummyModel("internvl3", _QWEN2_5_7B, _INTERN_VIT_300M),
    "internvl3.5-8b": _DummyModel("internvl3", _QWEN3_8B, _INTERN_VIT_300M),
    "glm-4.1v-9b": _DummyModel("glm-4.1v", _GLM_9B, _GLM_VISION),
    "qwen2.5-vl-0.5b": _DummyModel("qwen2.5-vl", _TIED_05B, _QWEN_SMALL_VISION),
    "qwen3-vl-0.5b": _DummyModel("qwen3-vl", {**_TIED_05B, "head_dim": 64}, _QWEN3_VL_SMALL_VISION),
    # 448 pixels, where the published model has 336: 1024 tokens, where it has 576.
    "llava-1.5-0.5b": _DummyModel("llava-1.5", _TEXT_05B, _CLIP_SMALL, image_px=448),
}
"""Models by name; those of 3B and above have the sizes of the published checkpoints."""


@cache
def make_processor(name: str) -> Any:
    """Returns the processor of one of `DUMMY_MODELS`, the same each time: its vocabulary takes most of a second."""
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
    processor = make_processor(name)
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
