"""Prefill-decode disaggregation: a prefill and a decode server have to compute the same length of each prompt.

Both servers receive each request, and each computes the length of its prompt from its own settings. The prefill server
selects the tokens and transfers their keys and values; the decode server reserves memory for them and goes on decoding.
If the settings differ, the decode server reads memory that was not written, without an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from mmtok_sglang.repeated_warnings import RepeatedWarning
from mmtok_sglang.settings import Settings

__all__ = ["announcing", "check_prefill_server", "fail_transfer", "problems_of"]

logger = logging.getLogger(__name__)

# Settings that decide how many tokens a prompt has, and which requests are refused.
_OF_THE_PROMPT = (
    "budget",
    "auto",
    "min_tokens_in",
    "encoder_scale",
    "skip_repeats",
    "share_tiles",
    "method",
    "video_budget",
    "limits",
)
_REFUSED = RepeatedWarning(logger)


def announcing(settings: Settings) -> Callable[..., None]:
    """Returns what makes SGLang's comparison of a prefill and a decode server include the settings.

    SGLang compares the data types of both KV caches, as text, when a decode server first hears of a prefill server, and
    lets each server without the plugin compare, too.
    """
    shared = ", ".join(f"{name} {getattr(settings, name)}" for name in _OF_THE_PROMPT)

    def init(original: Callable[..., None], manager: Any, args: Any, *others: Any, **named: Any) -> None:
        args.kv_cache_dtype_str = f"{args.kv_cache_dtype_str} and MMTok ({shared})"
        original(manager, args, *others, **named)

    return init


def check_prefill_server(original: Callable[..., bool], manager: Any, bootstrap_addr: str) -> bool:
    """Returns whether a prefill server is known and fits this decode server.

    SGLang raises an error for one that does not fit, which ends the decode server's scheduler. Here it is logged, and
    SGLang fails the requests of that prefill server after 15 attempts.
    """
    try:
        return original(manager, bootstrap_addr)
    except RuntimeError as error:
        _REFUSED.log(
            f"MMTok: the prefill server at {bootstrap_addr} does not fit this decode server, and its requests fail",
            error=error,
        )
        return False


def fail_transfer(req: Any, why: str) -> None:
    """Tells the decode server that a request of a prefill server has failed; else it waits for minutes."""
    sender = getattr(req, "disagg_kv_sender", None)
    if sender is not None:
        sender.kv_mgr.conclude_failure(bootstrap_room=req.bootstrap_room, failure_reason=f"MMTok: {why}")


def problems_of(cfg: Any) -> Iterator[str]:
    """Gives what a server with a budget refuses of SGLang's resolved arguments for disaggregation."""
    if cfg.disaggregation_mode == "null":
        return
    transfer = cfg.disaggregation_transfer_backend
    if transfer not in ("mooncake", "nixl"):
        yield f"--disaggregation-transfer-backend {transfer}: not verified; use mooncake or nixl"
    if cfg.speculative_algorithm is not None:
        yield f"--disaggregation-mode with --speculative-algorithm {cfg.speculative_algorithm}: not verified"
    if cfg.enable_pd_role_switch:
        yield "--enable-pd-role-switch: not verified"
    if cfg.disaggregation_decode_allocation_policy != "early":
        yield f"--disaggregation-decode-allocation-policy {cfg.disaggregation_decode_allocation_policy}: not verified"
