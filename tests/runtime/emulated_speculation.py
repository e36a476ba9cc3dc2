"""An SGLang plugin for tests alone: NGRAM speculative decoding without a GPU.

SGLang's own worker drafts from its corpus, verifies by the model, and accepts. Its kernels are replaced by PyTorch
operations: the tree's links and positions, where its keys and values go, the attention by its mask, and the walk that
accepts tokens. A verified batch is greedy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmtok_bench.second_plugin import plugin_environment

__all__ = ["register", "speculation_environment"]


def speculation_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a server on a CPU that speculates, if it has --speculative-algorithm NGRAM."""
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

    def attend(backend: Any, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, **kwargs: Any) -> Tensor:
        if not forward_batch.forward_mode.is_target_verify():
            return forward_extend(backend, q, k, v, layer, forward_batch, **kwargs)  # type: ignore[no-any-return]
        return _attend_by_tree(backend, q, k, v, layer, forward_batch)

    TorchNativeAttnBackend.forward_extend = attend


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
