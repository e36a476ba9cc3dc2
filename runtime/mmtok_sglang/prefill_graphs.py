"""Prefills of pruned prompts as CUDA graphs: of so few tokens, launches take longer than the kernels.

SGLang 0.5.23 has breakable graphs for prefill, and leaves them off for multimodal models that are not on its list:
"Multimodal prefill replay faults under BCG" (srt/arg_groups/cuda_graph_hook.py). Replayed by its runner on the host,
Qwen2.5-VL's answers are right, and Qwen3-VL's are wrong, since the graph has no DeepStack; `families/qwen3_vl.py` adds
it.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.configs import model_config
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.utils import is_cuda

__all__ = ["CAPTURED_TOKENS", "log_prefill_graphs", "prefer_prefill_graphs"]

logger = logging.getLogger(__name__)

CAPTURED_TOKENS = (8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024)
"""Tokens of the prefill batches that are captured. A batch is padded to the next of them, at most to twice its tokens;
from about a thousand on, the kernels of a 7B model take longer than their launches."""

# Each says which prefills are captured, or that none are.
_CHOICES = (
    "cuda_graph_config",
    "disable_cuda_graph",
    "disable_prefill_cuda_graph",
    "cuda_graph_backend_prefill",
    "cuda_graph_max_bs_prefill",
    "cuda_graph_bs_prefill",
)


def prefer_prefill_graphs(server_args: Any) -> bool:
    """Has SGLang capture prefills of the families that allow it, unless the user has chosen.

    A LLaVA's are captured only if the user asks for it: on a GPU this was not tried. SGLang captures a Qwen3.5 with a
    mixture of experts by itself.

    What else SGLang takes for a reason against them (pipeline parallelism, LoRA adapters) still is one.

    Args:
        server_args: Arguments with a budget, not resolved yet.

    Returns:
        Whether sizes were chosen here.
    """
    # Only now: the families import SGLang's models.
    from mmtok_sglang.families import FAMILIES

    allowed = model_config.multimodal_breakable_cuda_graph_supported_model_archs
    replayed = [family.architecture for family in FAMILIES.values() if family.replays_prefills]
    allowed += [name for name in replayed if name not in allowed]
    if not is_cuda() or any(getattr(server_args, name) for name in _CHOICES):
        return False
    bounds = [bound for bound in (server_args.chunked_prefill_size, server_args.max_total_tokens) if bound]
    sizes = [size for size in CAPTURED_TOKENS if all(size <= bound or bound < 0 for bound in bounds)]
    if sizes:
        declare_resolution(server_args, "mmtok", cuda_graph_bs_prefill=sizes)
    return bool(sizes)


def log_prefill_graphs(server_args: Any) -> None:
    """Says that prefills are captured, and how not to have it; for resolved arguments whose sizes were chosen here."""
    prefill = resolving_view(server_args).cuda_graph_config.prefill
    if prefill.backend == Backend.BREAKABLE:
        _log_once(max(prefill.bs), len(prefill.bs))


@cache
def _log_once(num_tokens: int, num_sizes: int) -> None:
    logger.info(
        "MMTok: prefills of up to %d tokens run as CUDA graphs of %d sizes (--cuda-graph-backend-prefill breakable), "
        "since launches would take most of a pruned prompt's time; --disable-prefill-cuda-graph turns them off",
        num_tokens,
        num_sizes,
    )
