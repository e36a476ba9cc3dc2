"""Tiny checkpoints: the real architectures, configurations and processors, with random weights."""

from __future__ import annotations

import json
import math
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from safetensors.torch import save_file

from mmtok_bench.families import FamilyName
from mmtok_bench.internvl_parts import chat_model_config, chat_model_weights
from mmtok_bench.model_parts import FAMILY_PARTS, qwen_vision_sizes, transformer_sizes

__all__ = ["make_tiny_checkpoint"]

# Raised with every change of the files, so that older folders are made again.
_MAKER_VERSION = 4
_MARKER = "mmtok_tiny.json"

_TEXT_SIZES: dict[str, Any] = {
    **transformer_sizes(256, 512, 2, 4),
    "vocab_size": 320,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    # 1 / sqrt(hidden_size), above the usual 0.02: it gives attention that is not uniform and logits of unit spread, so
    # that a token at a wrong position changes the logprobs by far more than rounding does.
    "initializer_range": 0.0625,
}

_TINY_QWEN2_VL_VISION = {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "initializer_range": 0.125}
_TINY_QWEN_VISION = {
    **qwen_vision_sizes(2, 64, 128, 4),
    # Block 0 has windows of 4 x 4 merged patches, block 1 full attention.
    "fullatt_block_indexes": [1],
    "initializer_range": 0.125,
}
# One layer more than DeepStack has levels.
_QWEN3_VL_TEXT = {"num_hidden_layers": 4, "head_dim": 64}
_TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
_TINY_QWEN3_5_VISION = {**qwen_vision_sizes(4, 64, 128, 4), "num_position_embeddings": 256, "initializer_range": 0.125}
_TINY_QWEN3_VL_VISION = {**_TINY_QWEN3_5_VISION, "deepstack_visual_indexes": [0, 1, 2]}
# Every other layer is linear attention.
_QWEN3_5_TEXT = {
    **{**_QWEN3_VL_TEXT, "full_attention_interval": 2},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
}
# 64 tokens a tile of 448 pixels.
_TINY_INTERN_VIT = {
    **transformer_sizes(64, 128, 2, 4),
    **{"patch_size": 28, "layer_scale_init_value": 1.0, "initializer_range": 0.125},
}
# The first layer has none.
_GLM_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
# Embeddings of 12 x 12 places, which are interpolated for other grids.
_TINY_GLM_VISION = {**qwen_vision_sizes(2, 64, 128, 4), "image_size": 168, "initializer_range": 0.125}
_TINY_CLIP = {**transformer_sizes(64, 128, 3, 4), "projection_dim": 64}
_TINY_SIZES: dict[FamilyName, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2-vl": ({}, _TINY_QWEN2_VL_VISION),
    "qwen2.5-vl": ({}, _TINY_QWEN_VISION),
    "qwen3-vl": (_QWEN3_VL_TEXT, _TINY_QWEN3_VL_VISION),
    "qwen3-vl-moe": ({**_QWEN3_VL_TEXT, **_TINY_EXPERTS}, _TINY_QWEN3_VL_VISION),
    "qwen3.5": (_QWEN3_5_TEXT, _TINY_QWEN3_5_VISION),
    "qwen3.5-moe": ({**_QWEN3_5_TEXT, **_TINY_EXPERTS, "shared_expert_intermediate_size": 96}, _TINY_QWEN3_5_VISION),
    "internvl3": ({}, _TINY_INTERN_VIT),
    "glm-4.1v": ({}, _TINY_GLM_VISION),
    "glm-4.5v": (_GLM_EXPERTS, _TINY_GLM_VISION),
    "llava-1.5": ({"num_key_value_heads": 4}, _TINY_CLIP),
    "llava-next": ({"num_key_value_heads": 4}, _TINY_CLIP),
}
"""Fields of the language model in addition to `_TEXT_SIZES`, and fields of the vision encoder."""


def make_tiny_checkpoint(family: FamilyName, folder: Path, *, seed: int = 0, pad_to_square: bool = True) -> Path:
    """Writes a tiny checkpoint that Transformers and SGLang load like the real one; returns `folder`.

    Weights are random, drawn from `seed`, and stored in bfloat16; the tokenizer is byte-level (one token per byte). A
    folder made before with the same arguments is kept. A new one gets its name when it is complete, so that a reader
    never sees half of it.

    Args:
        family: Which architecture. An image of 600 x 400 px is 294 tokens for "qwen2-vl" and "qwen2.5-vl" and 228 for
            later Qwens (any size up to 1280), 576 for "llava-1.5", and up to 5 tiles of 576 for "llava-next", and
            up to 13 of 64 for "internvl3".
        folder: Where to write; a tiny checkpoint of another kind there is replaced.
        seed: Seed of the weights.
        pad_to_square: "llava-1.5" only: pad an image to a square, as the authors of LLaVA do, or crop its middle, as
            Hugging Face's processor does by default.

    Raises:
        ValueError: An unknown family.
        FileExistsError: `folder` holds something other than a tiny checkpoint.
    """
    if family not in get_args(FamilyName):
        raise ValueError(f"family is one of {', '.join(get_args(FamilyName))}, got {family!r}")
    folder = Path(folder)
    marker = {
        "maker_version": _MAKER_VERSION,
        "transformers": transformers.__version__,
        "family": family,
        "seed": seed,
        "pad_to_square": pad_to_square,
    }
    if _read_marker(folder) == marker:
        return folder
    if folder.exists() and _read_marker(folder) is None:
        raise FileExistsError(f"{folder} exists and is no tiny checkpoint: remove it, or name another folder")

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "checkpoint"
        model, processor = _build(family, seed, pad_to_square)
        _save(model.to(torch.bfloat16), made)
        processor.save_pretrained(made)
        (made / _MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        try:
            made.rename(folder)
        except OSError:
            # Another process was faster; its checkpoint is the same one.
            if _read_marker(folder) != marker:
                raise
    return folder


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / _MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _build(family: FamilyName, seed: int, pad_to_square: bool) -> tuple[Any, Any]:
    parts, (text, vision) = FAMILY_PARTS[family], _TINY_SIZES[family]
    processor = parts.processor(
        **({"tile_tokens": 64} if family == "internvl3" else {}),
        **({"pad_to_square": pad_to_square} if family == "llava-1.5" else {}),
        # About as many as the other families make of a small video.
        **({"min_video_tokens": 512} if family.startswith("glm") else {}),
    )
    # Qwen3.5 rotates a quarter of a head: with the usual base, a wrong position would change too little.
    base = {"rope_theta": 1e4} if family.startswith("qwen3.5") else {}
    config = parts.config(processor.tokenizer, {**_TEXT_SIZES, **text}, vision, **base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, parts.architecture)(config)
        if family == "internvl3":
            # Transformers begins with zeros.
            embeddings = model.model.vision_tower.embeddings
            for weight in (embeddings.cls_token, embeddings.position_embeddings):
                torch.nn.init.normal_(weight, std=_TINY_INTERN_VIT["initializer_range"])
    answers = set(processor.tokenizer(string.printable[:95], add_special_tokens=False)["input_ids"])
    silent = [token_id for token_id in range(_TEXT_SIZES["vocab_size"]) if token_id not in answers]
    with torch.no_grad():
        # Linear attention forgets 64 times more slowly: otherwise only a token's neighbours would count.
        for name, parameter in model.named_parameters():
            if name.endswith("linear_attn.A_log"):
                parameter -= math.log(64)
        # Every token except printable ASCII has the logit 0, which greedy decoding never picks. An answer can then be
        # printed, has the requested length (there is no end token), and streams token by token (the first bytes of a
        # longer character would be held back until it is complete).
        model.get_output_embeddings().weight[silent] = 0
    return model.eval(), processor


def _save(model: Any, folder: Path) -> None:
    """Writes a model as its published checkpoints are.

    Published experts of Qwen3-VL are [experts, in, out]: Transformers 5.19 transposes them when it loads, but not when
    it saves. Experts of Qwen3.5 are [experts, out, in], also in one tensor; each one of GLM-4.5V has its own tensors.
    InternVL has a format that Transformers does not know: the same model for Transformers is in the folder
    `transformers/`.
    """
    weights = model.state_dict()
    if isinstance(model, transformers.InternVLForConditionalGeneration):
        model.save_pretrained(folder / "transformers")
        chat_model_config(model.config).save_pretrained(folder)
        save_file(chat_model_weights(weights), folder / "model.safetensors", {"format": "pt"})
        return
    experts = {name: weight for name, weight in weights.items() if ".experts." in name}
    if not experts or model.config.model_type == "glm4v_moe":
        model.save_pretrained(folder)
        return
    if model.config.model_type == "qwen3_vl_moe":
        experts = {name: weight.transpose(1, 2).contiguous() for name, weight in experts.items()}
    model.save_pretrained(folder, state_dict=weights | experts, save_original_format=False)
