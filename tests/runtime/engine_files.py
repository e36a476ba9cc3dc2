"""Exported selections for the tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtok_deploy.config import KeySource
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.presets import PRESETS
from mmtok_export.artifact import export_model
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import SelectionSpec

__all__ = ["export_for"]

# Widths of the checkpoints' text model and vision encoder. LLaVAs have 576 patches a square or tile, others any number.
_VISION_WIDTH, _KEYS_WIDTH = 256, 64
_NUM_TOKENS = {
    "llava-1.5": DimRange.fixed(576),
    "llava-next": DimRange.fixed(576),
    "internvl3": DimRange(83, 832, 832),
}


def export_for(family: str, path: Path, budget: int, *, keys: KeySource = "input", **change: Any) -> Path:
    """Writes the selection that a float32 server of the family's tiny checkpoint takes, started with --mmtok-keys."""
    values: dict[str, Any] = {
        "budget": budget,
        "num_tokens": _NUM_TOKENS.get(family, DimRange(budget, 128, 512)),
        "num_words": DimRange(1, 16, 64),
        "batch": DimRange(1, 1, 3),
        "vision_width": _VISION_WIDTH,
        # A token of InternVL is 2 x 2 patches.
        "keys_width": 4 * _KEYS_WIDTH if family == "internvl3" else _KEYS_WIDTH,
        "dtype": "float32",
        "keys_dtype": "float32",
        "config": PRESETS[family].config,
        "form": "lazy",
    }
    if keys == "output":
        values["keys_width"] = _VISION_WIDTH
    spec = SelectionSpec(**values | change)
    export_model(build_selection(spec), path, "selection", spec, details={"keys": keys})
    return path
