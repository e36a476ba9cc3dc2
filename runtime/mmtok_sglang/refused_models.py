"""Models that people serve and that cannot be served with a budget, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REFUSED_MODELS"]

_SCALED_CROPS = "the crops of a large image are scaled down together after the projector: no token belongs to a crop"
_SEVERAL_SPANS = "an image is a thumbnail and slices, each with placeholders of its own, and other tokens between them"
_BOTH_WAYS = (
    "an image's tokens attend to one another in both directions, which SGLang gives up where a prefill chunk splits it"
)
_SEPARATORS = "learned separators stand among the tokens of an image"
_BREAKS = "tokens of the prompt stand among those of an image, to end its rows or tiles"
_NOT_VERIFIED = "not verified against a model pruned by hand"

REFUSED_MODELS: Mapping[str, str] = {
    "LlavaOnevisionForConditionalGeneration": _SCALED_CROPS,
    "LlavaQwenForCausalLM": _SCALED_CROPS,
    "LLaVAOneVision1_5_ForConditionalGeneration": "SGLang 0.5.23 has no class of it",
    "KimiK25ForConditionalGeneration": _NOT_VERIFIED,
    "KimiVLForConditionalGeneration": _NOT_VERIFIED,
    "MiniCPMV": _SEVERAL_SPANS,
    "MiniCPMV4_6ForConditionalGeneration": _SEVERAL_SPANS,
    "Gemma3ForConditionalGeneration": _BOTH_WAYS,
    "Gemma4ForConditionalGeneration": _BOTH_WAYS,
    "Phi4MMForCausalLM": _SEPARATORS,
    "DeepseekOCRForCausalLM": _SEPARATORS,
    "DeepseekVL2ForCausalLM": _SEPARATORS,
    "PixtralForConditionalGeneration": _BREAKS,
    "Mistral3ForConditionalGeneration": _BREAKS,
    "Llama4ForConditionalGeneration": _BREAKS,
    "Step3VLForConditionalGeneration": _BREAKS,
    "MllamaForConditionalGeneration": "images are read by cross-attention: the prompt has no tokens of theirs",
    "InternVLForConditionalGeneration": (
        "SGLang 0.5.23 has no class of the checkpoints for Transformers (-hf): take one in the published format "
        "(InternVLChatModel)"
    ),
    "Qwen3OmniMoeForConditionalGeneration": _NOT_VERIFIED,
}
"""By the checkpoint's `architectures[0]`; read in the sources of sglang 0.5.23 and transformers 5.19.

Any other architecture that is no family's is refused without a reason.
"""
