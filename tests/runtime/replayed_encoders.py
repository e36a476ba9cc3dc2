"""An SGLang plugin for tests alone: replays those vision encoders, too, that were not compared on a GPU yet."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Called by SGLang in each process of a server."""
    # Only now: SGLang's models are imported where a server has chosen its device.
    from mmtok_sglang.families.qwen import QwenModel

    for model in (QwenModel, *QwenModel.__subclasses__()):
        model.replays_encoder = True
