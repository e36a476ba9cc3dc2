"""Linear attention on plain PyTorch: SGLang's kernels for it (a gated delta rule, as in Qwen3.5) are Triton's.

So are those of the gates of its models' attention and shared expert. The functions compute in float32, linear attention
token by token: exact, and slow for long prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)

__all__ = ["use_torch_for_linear_attention"]

_CHUNK = 64
"""Tokens between the states of a prefill that the prefix cache can keep: sglang 0.5.23, `FLA_CHUNK_SIZE`."""


def use_torch_for_linear_attention(model: nn.Module) -> None:
    """Puts PyTorch functions in the place of the kernels that a model's linear attention calls, if it has some.

    Replaces: functions that these modules of sglang 0.5.23 have imported. Can go when SGLang lets a platform bring
    kernels of linear attention.
    """
    from sglang.srt.layers.radix_linear_attention import RadixLinearAttention

    if not any(isinstance(module, RadixLinearAttention) for module in model.modules()):
        return
    from sglang.kernels.ops.attention.fla import layernorm_gated
    from sglang.srt.layers.attention import hybrid_linear_attn_backend
    from sglang.srt.layers.attention.linear import gdn_backend
    from sglang.srt.layers.attention.linear.kernels import gdn_triton
    from sglang.srt.models import qwen2_moe, qwen3_5

    gdn_backend.causal_conv1d_fn = causal_conv1d
    gdn_backend.causal_conv1d_update = causal_conv1d_update
    gdn_backend.fused_gdn_gating = gates
    gdn_triton.chunk_gated_delta_rule = gated_delta_rule
    gdn_triton.fused_recurrent_gated_delta_rule_packed_decode = gated_delta_rule_decode
    hybrid_linear_attn_backend.track_mamba_states_all_layers = copy_states
    layernorm_gated.layernorm_fn = gated_rms_norm
    qwen2_moe.fused_gate_sigmoid_mul_add = add_shared_expert
    qwen3_5.fused_sigmoid_mul = sigmoid_mul
    # Which ratios of heads have a fused split: for all others SGLang splits by PyTorch itself.
    qwen3_5._GDN_FUSED_QKVZBA_RATIOS = ()
    # Pinned memory is for copies to an accelerator; without a driver there is none, and SGLang asks for it all the same
    # (srt/managers/schedule_batch.py, `prepare_for_decode`).
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    query_start_loc: Tensor,
    seq_lens_cpu: Any,
    cache_indices: Tensor,
    has_initial_state: Tensor,
    activation: str,
) -> Tensor:
    """Returns the [D, T] convolution of sequences one after another, each token with the w - 1 before it.

    Args:
        x: [D, T], the sequences' tokens.
        weight: [D, w].
        bias: [D].
        conv_states: [slots, D, w - 1], the last tokens of what was read before; changed in place to those of `x`.
        query_start_loc: [B + 1] int, where each sequence begins, and the end of the last.
        seq_lens_cpu: Not read.
        cache_indices: [B] int, the slot of each sequence.
        has_initial_state: [B] bool, whether something was read before.
        activation: "silu".

    Raises:
        ValueError: Another activation.
    """
    _check_activation(activation)
    output = torch.empty_like(x)
    for idx, tokens in _sequences(query_start_loc):
        slot = int(cache_indices[idx])
        before = conv_states[slot] if has_initial_state[idx] else torch.zeros_like(conv_states[slot])
        joined = torch.cat([before.to(x.dtype), x[:, tokens]], dim=1)
        output[:, tokens] = F.silu(F.conv1d(joined, weight[:, None], bias, groups=len(x)))
        conv_states[slot] = joined[:, -conv_states.shape[2] :]
    return output


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str, conv_state_indices: Tensor
) -> Tensor:
    """Returns the [B, D] convolution of one more token of each sequence; arguments as of `causal_conv1d`, x [B, D]."""
    ends = torch.arange(len(x) + 1)
    has_state = torch.ones(len(x), dtype=torch.bool)
    return causal_conv1d(x.T, weight, bias, conv_state, ends, None, conv_state_indices, has_state, activation).T


def gates(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
    """Returns how much of the state is kept, as a logarithm, and how much of a token is written: [1, T, H] float32."""
    decay = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    initial_state_indices: Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    inplace_update: bool,
) -> tuple[Tensor, None, Tensor]:
    """Returns the [1, T, H, V] output of sequences one after another, None, and states that the prefix cache may keep.

    They are [1, chunks, H, V, K], before each chunk of 64 tokens of each sequence.

    Args:
        q: [1, T, h, K] queries; H is a multiple of h.
        k: [1, T, h, K] keys.
        v: [1, T, H, V] values.
        g: [1, T, H], `gates`' first.
        beta: [1, T, H], `gates`' second.
        initial_state: [slots, H, V, K], changed in place to the states after the sequences.
        cu_seqlens: [B + 1] int, where each sequence begins, and the end of the last.
        initial_state_indices: [B] int, the slot of each sequence.
        head_first: Not read: False.
        use_qk_l2norm_in_kernel: Not read: True.
        inplace_update: Not read: True.

    Source: Gated Delta Networks (arXiv 2412.06464), equation 10.
    """
    output = torch.empty_like(v)
    before_chunks = []
    for idx, tokens in _sequences(cu_seqlens):
        slot = int(initial_state_indices[idx])
        state = initial_state[slot][None].to(torch.float32, copy=True)
        for place in range(tokens.start, tokens.stop):
            at = slice(place, place + 1)
            if (place - tokens.start) % _CHUNK == 0:
                before_chunks.append(state)
            output[0, at], state = _step(q[0, at], k[0, at], v[0, at], g[0, at], beta[0, at], state)
        initial_state[slot] = state[0]
    return output, None, torch.cat(before_chunks)[None]


def gated_delta_rule_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,  # noqa: N803
    dt_bias: Tensor,
    scale: float,
    initial_state: Tensor,
    out: Tensor,
    ssm_state_indices: Tensor,
    use_qk_l2norm_in_kernel: bool,
) -> None:
    """Writes the [B, 1, H, V] output of one more token of each sequence to `out`.

    Args:
        mixed_qkv: [B, h * K + h * K + H * V].
        a: [B, H], input of `gates`.
        b: [B, H], input of `gates`.
        A_log: [H], input of `gates`.
        dt_bias: [H], input of `gates`.
        scale: Not read: 1 / sqrt(K).
        initial_state: [slots, H, V, K], changed in place.
        out: [B, 1, H, V].
        ssm_state_indices: [B] int, the slot of each sequence.
        use_qk_l2norm_in_kernel: Not read: True.
    """
    _, num_heads, value_dim, key_dim = initial_state.shape
    keys_width = (mixed_qkv.shape[1] - num_heads * value_dim) // 2
    q, k, v = mixed_qkv.split([keys_width, keys_width, num_heads * value_dim], dim=1)
    q, k, v = (each.unflatten(1, (-1, dim)) for each, dim in ((q, key_dim), (k, key_dim), (v, value_dim)))
    (g,), (beta,) = gates(A_log, a, b, dt_bias)
    slots = ssm_state_indices.long()
    output, state = _step(q, k, v, g, beta, initial_state[slots].float())
    out[:, 0] = output.to(out.dtype)
    initial_state[slots] = state.to(initial_state.dtype)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the [B, H, V] output of a token of each sequence and the [B, H, V, K] states after it, in float32."""
    repeats = v.shape[1] // k.shape[1]
    q, k = (_normalized(each.float()).repeat_interleave(repeats, dim=1) for each in (q, k))
    state = state * g.exp()[..., None, None]
    missing = beta[..., None] * (v.float() - (state @ k[..., None])[..., 0])
    state = state + missing[..., None] * k[..., None, :]
    return (state @ q[..., None])[..., 0] * q.shape[-1] ** -0.5, state


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def copy_states(
    conv_states_pool: Tensor,
    ssm_states_pool: Tensor,
    cache_indices: Tensor,
    mamba_track_mask: Tensor,
    mamba_track_indices: Tensor,
    batch_size: int,
    check_freed_slots: bool,
) -> None:
    """Copies the states of sequences, of all layers, to slots of the prefix cache.

    Args:
        conv_states_pool: [layers, slots, ...], changed in place.
        ssm_states_pool: [layers, slots, ...], changed in place.
        cache_indices: [B] int, the slot of each sequence.
        mamba_track_mask: [B] bool, whose states are copied.
        mamba_track_indices: [B] int, the slot that they are copied to.
        batch_size: B.
        check_freed_slots: Not read: False.
    """
    sources, targets = cache_indices[mamba_track_mask].long(), mamba_track_indices[mamba_track_mask].long()
    for pool in (conv_states_pool, ssm_states_pool):
        pool[:, targets] = pool[:, sources]


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: None,
    z: Tensor,
    group_size: None,
    eps: float,
    norm_before_gate: bool,
    is_rms_norm: bool,
    activation: str,
) -> Tensor:
    """Returns rows of `x` [rows, V], normalised and multiplied by `weight` and silu(`z`).

    Raises:
        ValueError: Another activation.
    """
    _check_activation(activation)
    normalized = F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return (normalized * F.silu(z.float())).to(x.dtype)


def sigmoid_mul(attn_output: Tensor, gate: Tensor, inplace: bool) -> Tensor:
    """Returns `attn_output` [T, D] multiplied by the sigmoid of `gate` [T, heads, D / heads], in its place."""
    return attn_output.mul_(gate.reshape(attn_output.shape).sigmoid())


def add_shared_expert(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, final_hidden_states: Tensor
) -> None:
    """Adds to the output of a mixture of experts that of the expert of every token, times its gate.

    Args:
        hidden_states: [T, D], the layer's input.
        gate_weight: [D].
        shared_output: [T, D].
        final_hidden_states: [T, D], changed in place.
    """
    gate = (hidden_states.float() @ gate_weight.float()).sigmoid()[:, None]
    final_hidden_states += (gate * shared_output.float()).to(final_hidden_states.dtype)


def _sequences(starts: Tensor) -> Iterator[tuple[int, slice]]:
    ends = starts.tolist()
    yield from ((idx, slice(*ends[idx : idx + 2])) for idx in range(len(ends) - 1))


def _check_activation(name: str) -> None:
    if name not in ("silu", "swish"):
        raise ValueError(f"linear attention on a CPU has the activation silu, got {name!r}")
