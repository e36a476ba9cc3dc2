"""The model families that are measured, and what SGLang's command line needs for each."""

from __future__ import annotations

from typing import Literal

__all__ = ["Family", "PocketFamily", "family_arguments"]

Family = Literal["qwen2.5-vl", "llava-1.5", "llava-next"]
PocketFamily = Literal["llava-1.5", "qwen2.5-vl"]
"""Those of which this package brings a trained model along."""


def family_arguments(family: Family | None) -> tuple[str, ...]:
    """Returns the server arguments without which a model of the family is not served, or not pruned.

    None is a model whose family was not named: nothing is known to be needed.
    """
    # SGLang 0.5.23's own LLaVA-1.5 does not load (models/llava.py, line 788), and LLaVA-NeXT has no other.
    return () if family in ("qwen2.5-vl", None) else ("--model-impl=transformers",)
