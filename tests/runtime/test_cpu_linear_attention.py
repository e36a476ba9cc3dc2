"""Linear attention on plain PyTorch against Transformers' functions for it, in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from mmtok_sglang import cpu_linear_attention as ours

HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, WIDTH = 2, 4, 16, 8, 4
CHANNELS = 24
# Sequences of one batch: across a chunk's end, of one token, of one whole chunk.
LENGTHS = (70, 1, 64)
STARTS = torch.tensor([0, 70, 71, 135])
SLOTS = torch.tensor([3, 1, 5])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def rule_inputs(num_tokens: int) -> tuple[Tensor, ...]:
    """Returns queries, keys, values, gates and betas of a batch's tokens."""
    q, k = torch.randn(2, 1, num_tokens, HEADS, KEY_DIM)
    v = torch.randn(1, num_tokens, VALUE_HEADS, VALUE_DIM)
    a, b = torch.randn(2, num_tokens, VALUE_HEADS)
    A_log, dt_bias = torch.randn(2, VALUE_HEADS)  # noqa: N806
    g, beta = ours.gates(A_log, a, b, dt_bias)
    close(g[0], -A_log.exp() * F.softplus(a + dt_bias))
    close(beta[0], b.sigmoid())
    return q, k, v, g, beta


def rule_of_transformers(inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H, V] and the state [H, V, K] after one sequence."""
    q, k, *rest = inputs
    q, k = (each.repeat_interleave(VALUE_HEADS // HEADS, dim=2) for each in (q, k))
    output, after = theirs.torch_chunk_gated_delta_rule(
        q, k, *rest, initial_state=state.mT[None], output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    assert after is not None
    return output[0], after[0].mT


def run_rule(inputs: tuple[Tensor, ...], states: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = inputs
    output, _, before_chunks = ours.gated_delta_rule(
        *(q, k, v, g, beta),
        initial_state=states,
        cu_seqlens=STARTS,
        initial_state_indices=SLOTS,
        head_first=False,
        use_qk_l2norm_in_kernel=True,
        inplace_update=True,
    )
    return output[0], before_chunks[0]


def test_a_batch_of_sequences_is_read_each_from_its_own_state() -> None:
    inputs = rule_inputs(sum(LENGTHS))
    states = torch.randn(7, VALUE_HEADS, VALUE_DIM, KEY_DIM)
    before = states.clone()
    output, _ = run_rule(inputs, states)
    for idx, slot in enumerate(SLOTS):
        tokens = slice(*STARTS[idx : idx + 2].tolist())
        expected, after = rule_of_transformers(tuple(each[:, tokens] for each in inputs), before[slot])
        close(output[tokens], expected)
        close(states[slot], after)
    others = [slot for slot in range(7) if slot not in SLOTS]
    assert torch.equal(states[others], before[others])


def test_states_before_chunks_are_those_after_the_tokens_before() -> None:
    inputs = rule_inputs(sum(LENGTHS))
    states = torch.randn(7, VALUE_HEADS, VALUE_DIM, KEY_DIM)
    before = states.clone()
    _, before_chunks = run_rule(inputs, states)
    assert len(before_chunks) == 2 + 1 + 1
    assert torch.equal(before_chunks[[0, 2, 3]], before[SLOTS])
    _, after = rule_of_transformers(tuple(each[:, :64] for each in inputs), before[SLOTS[0]])
    close(before_chunks[1], after)


def test_one_more_token_goes_on_from_the_state() -> None:
    mixed = torch.randn(3, 2 * HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM)
    a, b = torch.randn(2, 3, VALUE_HEADS)
    A_log, dt_bias = torch.randn(2, VALUE_HEADS)  # noqa: N806
    states = torch.randn(7, VALUE_HEADS, VALUE_DIM, KEY_DIM)
    before, out = states.clone(), torch.empty(3, 1, VALUE_HEADS, VALUE_DIM)
    ours.gated_delta_rule_decode(mixed, a, b, A_log, dt_bias, KEY_DIM**-0.5, states, out, SLOTS, True)
    sizes = [HEADS * KEY_DIM, HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM]
    q, k, v = (
        each.reshape(3, 1, -1, dim)
        for each, dim in zip(mixed.split(sizes, dim=1), (KEY_DIM, KEY_DIM, VALUE_DIM), strict=True)
    )
    g, beta = ours.gates(A_log, a, b, dt_bias)
    for idx, slot in enumerate(SLOTS):
        at = slice(idx, idx + 1)
        expected, after = rule_of_transformers((q[at], k[at], v[at], g[:, at], beta[:, at]), before[slot])
        close(out[idx], expected)
        close(states[slot], after)


def test_a_convolution_goes_on_over_chunks_and_decoded_tokens() -> None:
    x, weight = torch.randn(CHANNELS, 12), torch.randn(CHANNELS, WIDTH)
    expected = F.silu(F.conv1d(F.pad(x, (WIDTH - 1, 0)), weight[:, None], groups=CHANNELS))
    states, slots = torch.randn(7, CHANNELS, WIDTH - 1), torch.tensor([4])
    found = []
    # A chunk shorter than the window among them.
    for start, stop in ((0, 7), (7, 9), (9, 11)):
        found.append(
            ours.causal_conv1d(
                *(x[:, start:stop], weight, None, states, torch.tensor([0, stop - start]), [stop - start], slots),
                torch.tensor([start > 0]),
                "silu",
            )
        )
    found.append(ours.causal_conv1d_update(x[:, 11:].T, states, weight, None, "silu", slots).T)
    close(torch.cat(found, dim=1), expected)


def test_states_are_copied_where_the_mask_says_so() -> None:
    pools = torch.randn(2, 7, 3), torch.randn(2, 7, 5)
    before = [pool.clone() for pool in pools]
    mask, targets = torch.tensor([True, False, True]), torch.tensor([0, 2, 6])
    ours.copy_states(*pools, SLOTS, mask, targets, 3, False)
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool[:, [0, 6]], old[:, [3, 5]])
        assert torch.equal(pool[:, 1:6], old[:, 1:6])


def test_the_gated_norm_is_transformers() -> None:
    norm = theirs.Qwen3NextRMSNormGated(VALUE_DIM)
    nn.init.normal_(norm.weight)
    x, z = torch.randn(2, 9, VALUE_DIM)
    found = ours.gated_rms_norm(x, norm.weight, None, z, None, 1e-6, True, True, "swish")
    close(found, norm(x, z))


def test_another_activation_is_refused() -> None:
    x = torch.randn(3, VALUE_DIM)
    with pytest.raises(ValueError, match="has the activation silu, got 'sigmoid'"):
        ours.gated_rms_norm(x, x[0], None, x, None, 1e-6, True, True, "sigmoid")


def test_a_model_without_linear_attention_is_left_alone() -> None:
    pin_memory = torch.Tensor.pin_memory
    ours.use_torch_for_linear_attention(nn.Linear(2, 2))
    assert torch.Tensor.pin_memory is pin_memory


def test_a_gated_experts_output_is_added_in_place() -> None:
    hidden, shared, others = torch.randn(3, 5, CHANNELS)
    weight, before = torch.randn(CHANNELS), others.clone()
    ours.add_shared_expert(hidden, weight, shared, others)
    close(others, before + F.linear(hidden, weight[None]).sigmoid() * shared)
