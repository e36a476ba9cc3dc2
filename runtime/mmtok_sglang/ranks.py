"""The tensor-parallel ranks of a model, which must keep the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

__all__ = ["is_first_rank", "num_ranks", "of_first_rank"]


def num_ranks() -> int:
    """Returns how many ranks share this process's layers; 1 outside of a server."""
    return get_parallel().tp_group.world_size if parallel_state.model_parallel_is_initialized() else 1


def is_first_rank() -> bool:
    """True in the one process of a tensor-parallel group that counts and logs for all."""
    return not parallel_state.model_parallel_is_initialized() or get_parallel().tp_group.rank_in_group == 0


def of_first_rank(indices: Sequence[Tensor]) -> list[Tensor]:
    """Returns the first rank's indices on every rank, without waiting for the device.

    Ranks select from equal features and so agree, until one of them alone runs out of memory: then its language model
    would read other tokens than the rest.

    Args:
        indices: [K] int64 each, of equal lengths on all ranks.
    """
    if num_ranks() == 1:
        return list(indices)
    together = get_parallel().tp_group.broadcast(torch.cat(list(indices)), src=0)
    # In memory of their own: each is remembered by itself, and a view would keep the batch.
    return [each.clone() for each in together.split([len(each) for each in indices])]
