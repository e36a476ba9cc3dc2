"""The model families that are measured, and what SGLang's command line needs for each."""

from __future__ import annotations

from typing import Literal

__all__ = ["Family", "family_arguments"]

Family = Literal["qwen2.5-vl", "llava-1.5", "llava-next"]


def family_arguments(family: Family) -> tuple[str, ...]:
    """Returns the server arguments without which a model of the family is not served, or not pruned."""
    # SGLang 0.5.23's own LLaVA-1.5 does not load (models/llava.py, line 788), and LLaVA-NeXT has no other.
    return () if family == "qwen2.5-vl" else ("--model-impl=transformers",)
