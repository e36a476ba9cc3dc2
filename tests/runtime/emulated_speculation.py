"""An SGLang plugin for tests alone: speculative decoding without a GPU, by NGRAM, EAGLE3 or a Qwen3.5's own head.

SGLang's own workers draft from earlier text or by a draft model, verify by the model, and accept. Their kernels are
replaced by PyTorch operations: the tree's links and positions, where its keys and values go, the attention of drafts,
that of the tree by its mask, states of linear attention behind chains of drafts, and the walk that accepts tokens. A
verified batch is greedy.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from torch import Tensor
from torch.nn.functional import conv1d, scaled_dot_product_attention, silu

from mmtok_sglang import cpu_linear_attention
from mmtok_sglang.positions import PositionWriter
from mmtok_soak.second_plugin import plugin_environment

__all__ = ["register", "speculation_environment"]


def speculation_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a server on a CPU that speculates, if it has --speculative-algorithm."""
    return plugin_environment(folder, "mmtok_test_speculation", f"{__name__}:register", Path(__file__).parents[2])


def register() -> None:
    """Puts PyTorch operations in the place of the kernels."""
    # A module imports its kernel where it is defined, from a package that cannot be imported without a driver.
    kernels = ModuleType("sgl_kernel.speculative")
    kernels.reconstruct_indices_from_tree_mask = None  # type: ignore[attr-defined]
    stand_ins = {"sgl_kernel": ModuleType("sgl_kernel"), "sgl_kernel.speculative": kernels}
    sys.modules |= stand_ins
    from sglang.srt.speculative import eagle_utils, ngram_worker, spec_utils

    for name in stand_ins:
        del sys.modules[name]
    # The mask of drafts alone, without the prefix, as on SGLang's own CPU platform.
    ngram_worker._is_cpu = True
    ngram_worker.reconstruct_indices_from_tree_mask_func = _fill_tree
    ngram_worker.assign_extend_cache_locs_func = _cache_locations
    eagle_utils.verify_tree_greedy_func = _accept_greedily
    spec_utils.fill_front_out_cache_loc_func = _fill_targets
    spec_utils.fill_accept_out_cache_loc_func = _fill_sources
    allocation.assign_req_to_token_pool_func = _reserve
    MHATokenToKVPool._init_kv_copy_and_warmup = _move_by_index
    forward_extend = TorchNativeAttnBackend.forward_extend

    def attend(
        backend: Any, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not forward_batch.forward_mode.is_target_verify():
            return forward_extend(backend, q, k, v, layer, forward_batch, *args, **kwargs)  # type: ignore[no-any-return]
        return _attend_by_tree(backend, q, k, v, layer, forward_batch)

    TorchNativeAttnBackend.forward_extend = attend
    _register_eagle()


def _register_eagle() -> None:
    from sglang.kernels.ops.speculative import cache_locs
    from sglang.srt.arg_groups import speculative_hook
    from sglang.srt.speculative import eagle_utils, eagle_worker_common, eagle_worker_v2
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    speculative_hook._check_oot_speculative_algorithm = lambda **_: None
    eagle_utils._is_cpu = eagle_worker_common._is_cpu = eagle_worker_v2._is_cpu = True
    eagle_worker_common.assign_draft_cache_locs_contiguous_func = _draft_cache_locations
    cache_locs.assign_extend_cache_locs_func = _cache_locations
    eagle_utils.build_tree_kernel_efficient_func = _build_tree
    eagle_worker_common.fill_bonus_tokens_func = _fill_bonus_tokens
    DraftBackendFactory.create_decode_backend = lambda factory: _StepsBackend(factory)
    DraftBackendFactory.create_draft_extend_backend = lambda _: None
    _register_linear_attention()
    _compare_positions()


def _register_linear_attention() -> None:
    from sglang.srt.layers.attention import hybrid_linear_attn_backend
    from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel

    convolve = cpu_linear_attention.causal_conv1d_update

    def convolve_drafts(
        x: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        conv_state_indices: Tensor,
        intermediate_conv_window: Tensor | None = None,
        intermediate_state_indices: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns the convolution of one more token [B, D], or of a chain of drafts [B, D, T] whose states it keeps."""
        if intermediate_conv_window is None:
            return convolve(x, conv_state, weight, bias, activation, conv_state_indices)
        assert intermediate_state_indices is not None
        width, outputs = conv_state.shape[2], []
        for tokens, slot, row in zip(x, conv_state_indices.tolist(), intermediate_state_indices.tolist(), strict=True):
            joined = torch.cat([conv_state[slot].to(x.dtype), tokens], dim=1)
            outputs.append(silu(conv1d(joined, weight[:, None], bias, groups=len(joined))).T)
            for step in range(tokens.shape[1]):
                intermediate_conv_window[row, step] = joined[:, step + 1 : step + 1 + width]
        # In the layout of `x`.
        return torch.stack(outputs).transpose(1, 2)

    cpu_linear_attention.causal_conv1d_update = convolve_drafts
    TritonGDNKernel.target_verify = _verify_linear_attention
    hybrid_linear_attn_backend.scatter_mamba_states_after_mtp_verify = _commit_states


def _verify_linear_attention(
    _: Any,
    A_log: Tensor,  # noqa: N803
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    ssm_states: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    intermediate_states_buffer: Tensor,
    intermediate_state_indices: Tensor,
    retrieve_parent_token: Tensor | None,
    **__: Any,
) -> Tensor:
    """Returns the output of chains of drafts, whose states it keeps; those of the requests stay."""
    assert retrieve_parent_token is None
    g, beta = cpu_linear_attention.gates(A_log, a, b, dt_bias)
    output, one, first = torch.empty_like(v), torch.tensor([0, 1]), torch.tensor([0])
    for request, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        state = ssm_states[cache_indices[request]][None].clone()
        for step, place in enumerate(range(start, end)):
            at = slice(place, place + 1)
            output[:, at], _, _ = cpu_linear_attention.gated_delta_rule(
                *(q[:, at], k[:, at], v[:, at], g[:, at], beta[:, at], state, one, first),
                head_first=False,
                use_qk_l2norm_in_kernel=True,
                inplace_update=True,
            )
            intermediate_states_buffer[intermediate_state_indices[request], step] = state[0]
    return output


def _commit_states(
    caches: Any,
    slots: Tensor,
    steps: Tensor,
    tracked_slots: Tensor | None,
    tracked_steps: Tensor | None,
    src_indices_raw: Tensor | None = None,
) -> None:
    """Copies the states after the last accepted draft of each request, and those that the prefix cache keeps."""
    assert src_indices_raw is None
    kept = [(slots, steps)]
    if tracked_slots is not None and tracked_steps is not None:
        kept.append((tracked_slots, tracked_steps))
    pools = [(caches.temporal, caches.intermediate_ssm)]
    for pool, states in [*pools, *zip(caches.conv, caches.intermediate_conv_window, strict=True)]:
        for targets, of_steps in kept:
            for request, (slot, step) in enumerate(zip(targets.tolist(), of_steps.tolist(), strict=True)):
                if step >= 0:
                    pool[:, slot] = states[:, request, step]


def _compare_positions() -> None:
    """Ends the server if a draft model reads a prompt at other positions than the model."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    forward, write = ModelRunner.forward, PositionWriter.write
    last: list[Tensor] = []

    def written(writer: PositionWriter, spans: Any, positions: Tensor) -> None:
        write(writer, spans, positions)
        last[:] = [positions]

    def compared(runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not forward_batch.forward_mode.is_extend_without_speculative():
            return forward(runner, forward_batch, *args, **kwargs)
        if not runner.is_draft_worker:
            last[:] = [forward_batch.mrope_positions]
        elif runner.model_config.model_is_mrope and not torch.equal(forward_batch.mrope_positions, last[0]):
            raise AssertionError(f"a draft model reads {forward_batch.mrope_positions}, the model {last[0]}")
        return forward(runner, forward_batch, *args, **kwargs)

    PositionWriter.write = written  # type: ignore[assignment,method-assign]
    ModelRunner.forward = compared


class _StepBackend(TorchNativeAttnBackend):
    """The attention of one step of drafts: each branch reads the prefix and its own drafts."""

    def __init__(self, runner: Any, step: int, num_steps: int, topk: int) -> None:
        super().__init__(runner)
        self._step, self._num_steps, self._topk = step, num_steps, topk

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        pool, table = self.token_to_kv_pool, self.req_to_token_pool.req_to_token
        pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        outputs = []
        for number, query in enumerate(queries):
            row, branch = divmod(number, self._topk)
            places = table[forward_batch.req_pool_indices[row]]
            prefix_len = int(forward_batch.seq_lens[row])
            first = prefix_len + branch * self._num_steps
            own = torch.cat([places[:prefix_len], places[first : first + self._step + 1]]).long()
            outputs.append(
                scaled_dot_product_attention(
                    query[None, :, None],
                    keys[own].movedim(0, 1)[None],
                    values[own].movedim(0, 1)[None],
                    scale=layer.scaling,
                    enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
                ).flatten()
            )
        return torch.stack(outputs)


class _StepsBackend:
    """The attention of all steps, as SGLang's draft worker has it."""

    def __init__(self, factory: Any) -> None:
        steps = range(factory.speculative_num_steps - 1)
        self.attn_backends = [
            _StepBackend(factory.draft_model_runner, step, factory.speculative_num_steps, factory.topk)
            for step in steps
        ]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def _draft_cache_locations(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    **_: Any,
) -> None:
    width = topk * num_cols
    rows = zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
    out_cache_loc.copy_(torch.cat([req_to_token[row, start : start + width] for row, start in rows]))


def _build_tree(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: Any,
) -> None:
    """Fills in the links and the mask of each tree; node 0 is the last accepted token.

    Args:
        parent_list: [B, P], number of each draft's parent among all drafts that were made.
        top_scores_index: [B, num_verify_tokens - 1], numbers of the drafts that are verified.
    """
    batch_size = len(seq_lens)
    mask = tree_mask.view(batch_size, num_verify_tokens, num_verify_tokens)
    mask.copy_(torch.eye(num_verify_tokens, dtype=torch.bool).expand_as(mask))
    mask[:, :, 0] = True
    retrieve_index.copy_(torch.arange(batch_size * num_verify_tokens).view(batch_size, num_verify_tokens))
    depths = torch.zeros(batch_size, num_verify_tokens, dtype=torch.int64)
    for row in range(batch_size):
        chosen = top_scores_index[row].tolist()
        parents = [0] * num_verify_tokens
        for node, number in enumerate(chosen, start=1):
            group = number // topk
            parents[node] = 0 if group == 0 else chosen.index(int(parent_list[row, group])) + 1
            mask[row, node] |= mask[row, parents[node]]
            depths[row, node] = depths[row, parents[node]] + 1
        for node in range(num_verify_tokens - 1, 0, -1):
            retrieve_next_sibling[row, node] = retrieve_next_token[row, parents[node]]
            retrieve_next_token[row, parents[node]] = node
    positions.copy_((seq_lens[:, None] + depths).flatten())


def _fill_bonus_tokens(tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, width: int, batch_size: int) -> None:
    last = tokens.view(batch_size, width).gather(1, (accept_lens.long() - 1)[:, None])
    bonus_tokens.copy_(last[:, 0])


def _move_by_index(pool: Any) -> None:
    pool.use_native_move_kv_cache = True


def _reserve(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    first = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        # SGLang's kernel does not see the end of the row: an error here.
        req_to_token[row, start:end] = out_cache_loc[first : first + end - start]
        first += end - start


def _fill_tree(
    tree_mask: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    batch_size: int,
    num_drafts: int,
) -> None:
    mask = tree_mask.view(batch_size, num_drafts, num_drafts)
    depths = mask.sum(dim=-1) - 1
    positions.copy_((seq_lens[:, None] + depths).flatten())
    retrieve_index.copy_(torch.arange(batch_size * num_drafts).view(batch_size, num_drafts))
    from sglang.srt.speculative import ngram_worker

    tokens, siblings = ngram_worker._derive_tree_links(mask.numpy(), batch_size, num_drafts)
    retrieve_next_token.copy_(tokens)
    retrieve_next_sibling.copy_(siblings)


def _cache_locations(
    req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, end_offset: Tensor, **_: Any
) -> Tensor:
    bounds = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    return torch.cat([req_to_token[row, start:end] for row, start, end in bounds]).long()


def _accept_greedily(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walks each tree from its root along the children that are the model's own next tokens."""
    for row in range(len(candidates)):
        node, num_accepted = 0, 0
        accept_index[row, 0] = retrieve_index[row, 0]
        while True:
            wanted = int(target_predict[row, node])
            predicts[retrieve_index[row, node]] = wanted
            child = int(retrieve_next_token[row, node])
            while child >= 0 and int(candidates[row, child]) != wanted:
                child = int(retrieve_next_sibling[row, child])
            if child < 0 or num_accepted + 1 == accept_index.shape[1]:
                break
            node, num_accepted = child, num_accepted + 1
            accept_index[row, num_accepted] = retrieve_index[row, node]
        accept_token_num[row] = num_accepted
    return predicts, accept_index, accept_token_num


def _fill_targets(num_accepted: Tensor, out_cache_loc: Tensor, targets: Tensor) -> None:
    windows = out_cache_loc.view(len(num_accepted), -1)
    chosen = torch.cat([window[:count] for window, count in zip(windows, num_accepted.tolist(), strict=True)])
    targets[: len(chosen)] = chosen


def _fill_sources(accept_index: Tensor, out_cache_loc: Tensor, sources: Tensor, size: int) -> None:
    chosen = accept_index.flatten()
    chosen = out_cache_loc[chosen[chosen >= 0].long()]
    sources[: len(chosen)] = chosen


def _attend_by_tree(backend: Any, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any) -> Tensor:
    """Returns the attention of drafts to the whole prefix, and to their ancestors among the drafts."""
    pool, table = backend.token_to_kv_pool, backend.req_to_token_pool.req_to_token
    pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
    keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    batch_size = forward_batch.batch_size
    queries = q.view(batch_size, -1, layer.tp_q_head_num, layer.qk_head_dim)
    num_drafts = queries.shape[1]
    trees = forward_batch.spec_info.custom_mask.view(batch_size, num_drafts, num_drafts).bool()
    outputs = []
    for row, prefix_len, tree, query in zip(
        forward_batch.req_pool_indices, forward_batch.seq_lens.tolist(), trees, queries, strict=True
    ):
        places = table[row, : prefix_len + num_drafts].long()
        mask = torch.cat([torch.ones(num_drafts, prefix_len, dtype=torch.bool), tree], dim=1)
        outputs.append(
            scaled_dot_product_attention(
                query.movedim(0, 1)[None],
                keys[places].movedim(0, 1)[None],
                values[places].movedim(0, 1)[None],
                attn_mask=mask,
                scale=layer.scaling,
                enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            )[0].movedim(0, 1)
        )
    return torch.cat(outputs).reshape(q.shape[0], -1)
