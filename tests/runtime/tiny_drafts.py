"""Makes tiny draft models for the tiny checkpoints: EAGLE3's, and the head of a Qwen3.5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["DRAFTS", "draft_arguments"]

# Trees of 6 drafts of earlier text; trees of 24 of a draft model, in 3 steps with 8 branches; chains of 4.
DRAFTS: dict[str, tuple[str, ...]] = {
    "ngram": ("--speculative-algorithm=NGRAM", "--speculative-num-draft-tokens=6"),
    "eagle3": (
        *("--speculative-algorithm=EAGLE3", "--speculative-num-steps=3", "--speculative-eagle-topk=8"),
        "--speculative-num-draft-tokens=24",
    ),
    "eagle3-chain": (
        *("--speculative-algorithm=EAGLE3", "--speculative-num-steps=3", "--speculative-eagle-topk=1"),
        "--speculative-num-draft-tokens=4",
    ),
    "head": (
        *("--speculative-algorithm=NEXTN", "--speculative-num-steps=3", "--speculative-eagle-topk=1"),
        "--speculative-num-draft-tokens=4",
    ),
}

_NUM_PROMPTS, _PROMPT_LENGTH, _ANSWER_LENGTH = 64, 8, 64
_COPIED = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"),
    *("rms_norm_eps", "max_position_embeddings"),
)


def draft_arguments(drafts: str, model: Any, folder: Path) -> tuple[str, ...]:
    """Returns the arguments of a server that drafts tokens; writes its draft model or head, if it has one.

    Args:
        drafts: One of DRAFTS.
        model: Hugging Face's tiny model in float32.
        folder: Folder of the draft model.
    """
    if drafts == "ngram":
        return DRAFTS[drafts]
    make = _make_mtp_head if drafts == "head" else _make_eagle3_draft
    return (*DRAFTS[drafts], f"--speculative-draft-model-path={make(model, folder)}")


def _make_eagle3_draft(model: Any, folder: Path) -> Path:
    """Writes a draft model of one layer, which guesses some of a tiny model's tokens.

    It reads the embeddings and the output of the first layer. Its projection is fitted to the model's own answers to
    random tokens; its layer adds small random numbers, and its norm and head are the model's.

    Args:
        model: Hugging Face's model in float32.
        folder: Folder of the draft model.
    """
    config = model.config.text_config
    rope = dict(config.rope_parameters)
    width = config.hidden_size
    head_width = getattr(config, "head_dim", width // config.num_attention_heads)
    described = {name: getattr(config, name) for name in _COPIED} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "head_dim": head_width,
        "num_hidden_layers": 1,
        "draft_vocab_size": config.vocab_size,
        "target_hidden_size": width,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "float32",
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        # What goes into the first layer, and what comes out of it.
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 0], "use_aux_hidden_state": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)

    def noise(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.005

    _, states = _answers(model, generator)
    num_queries, num_keys = config.num_attention_heads * head_width, config.num_key_value_heads * head_width
    weights = {
        "midlayer.self_attn.q_proj.weight": noise(num_queries, 2 * width),
        "midlayer.self_attn.k_proj.weight": noise(num_keys, 2 * width),
        "midlayer.self_attn.v_proj.weight": noise(num_keys, 2 * width),
        "midlayer.self_attn.o_proj.weight": noise(width, num_queries),
        "midlayer.mlp.gate_proj.weight": noise(config.intermediate_size, width),
        "midlayer.mlp.up_proj.weight": noise(config.intermediate_size, width),
        "midlayer.mlp.down_proj.weight": noise(width, config.intermediate_size),
        "midlayer.hidden_norm.weight": torch.ones(width),
        "midlayer.input_layernorm.weight": torch.ones(width),
        "midlayer.post_attention_layernorm.weight": torch.ones(width),
        "fc.weight": _fitted(torch.cat(states[:2], dim=-1)[:, :-1], states[-1][:, 1:]),
        "norm.weight": model.model.language_model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    save_file({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def _make_mtp_head(model: Any, folder: Path) -> Path:
    """Writes the multi-token prediction head of a tiny Qwen3.5, which guesses some of the model's tokens.

    It reads the embedding of a token and the model's output at the one before. Its projection is fitted to the model's
    own answers to random tokens; its layer is the model's last one with full attention, and adds little.

    Args:
        model: Hugging Face's model in float32.
        folder: Folder of the head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    config, language_model = model.config.text_config, model.model.language_model
    layer = next(each for each in reversed(language_model.layers) if hasattr(each, "self_attn"))
    weights = {f"mtp.layers.0.{name}": tensor for name, tensor in layer.state_dict().items()}
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weights[name] = tensor * 0.01
    ids, states = _answers(model, torch.Generator().manual_seed(0))
    embedded, outputs = model.get_input_embeddings()(ids), states[-1]
    read = torch.cat([_normalized(embedded[:, 1:-1]), _normalized(outputs[:, :-2])], dim=-1)
    # The norm multiplies by 1 + weight.
    wanted = outputs[:, 1:-1] / (1 + language_model.norm.weight)
    weights |= {
        "mtp.fc.weight": _fitted(read, wanted),
        "mtp.norm.weight": language_model.norm.weight,
        "mtp.pre_fc_norm_embedding.weight": torch.zeros(config.hidden_size),
        "mtp.pre_fc_norm_hidden.weight": torch.zeros(config.hidden_size),
    }
    save_file({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def _answers(model: Any, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns a model's answers to random tokens [prompts, tokens], and its hidden states at each token."""
    prompts = torch.randint(0, 256, (_NUM_PROMPTS, _PROMPT_LENGTH), generator=generator).to(model.device)
    ids = model.generate(prompts, max_new_tokens=_ANSWER_LENGTH, do_sample=False, eos_token_id=None)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    return ids[:, _PROMPT_LENGTH:], tuple(each[:, _PROMPT_LENGTH:] for each in states)


def _fitted(read: Tensor, wanted: Tensor) -> Tensor:
    """Returns the projection [D, 2 * D] that maps what a draft model reads to what it should put out."""
    fitted: Tensor = torch.linalg.lstsq(read.detach().flatten(0, 1), wanted.detach().flatten(0, 1)).solution.T
    return fitted


def _normalized(rows: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(rows, rows.shape[-1:], eps=1e-6)
