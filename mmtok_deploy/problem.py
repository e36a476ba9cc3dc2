"""What a selection backend is given, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Selection", "SelectionProblem"]


@dataclass(frozen=True, slots=True, eq=False)
class SelectionProblem:
    """One image (or tile) to select tokens from, checked: what `select_tokens` makes of its arguments.

    Everything that decides a shape is known to the host, so that no backend has to wait for an accelerator.

    Args:
        vision: [N, D] vision tokens after the projector, float32, float16 or bfloat16.
        keys: [N, d] vision features before the projector, on the same device.
        text: [M, D] language-model input embeddings of the guidance words; M may be 0.
        num_picks: K, at most the number of tokens that may be picked.
        excluded: [N] bool, tokens never to pick.
        attention: [N] what the vision tower pays to each token, for methods that go by it
            (`methods/visionzip.py`, `methods/scope.py`); None where the tower has no class token, or nobody reads it.
        seed: For methods that draw (`methods/random_tokens.py`).
    """

    vision: Tensor
    keys: Tensor
    text: Tensor
    num_picks: int
    excluded: Tensor | None = None
    attention: Tensor | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The tokens selected from one image, on the features' device.

    Args:
        order: [K] int64, token indices as picked; the first j are the selection for a budget of j.
        kept: [K] int64, the same indices in raster order.
        coverage: [K] float32, f(S) after each pick; never falls.
        total: [] float32, f of all N tokens; `coverage / total` is the share of text and image that is covered. Not
            finite where the features are not: then the indices mean nothing, but are valid ones.
    """

    order: Tensor
    kept: Tensor
    coverage: Tensor
    total: Tensor

    def __len__(self) -> int:
        return len(self.kept)
