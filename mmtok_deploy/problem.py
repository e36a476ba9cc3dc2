"""Input and output of a selection backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Selection", "SelectionProblem"]


@dataclass(frozen=True, slots=True, eq=False)
class SelectionProblem:
    """One image (or tile) to select tokens from, with sizes and dtypes that `select_tokens` has checked.

    Everything that decides a shape is known to the host, so that no backend has to wait for an accelerator.

    Args:
        vision: [N, D] vision tokens after the projector, float32, float16 or bfloat16.
        keys: [N, d] vision features before the projector, on the same device.
        text: [M, D] language-model input embeddings of the guidance words; M may be 0.
        num_picks: K, at most the number of tokens that may be picked.
        excluded: [N] bool, tokens never to pick.
        attention: [N] attention of the vision tower's class token to each token, for methods that read it
            (`methods/visionzip.py`, `methods/scope.py`); None if the tower has no class token or no method reads it.
        seed: Seed for methods that draw (`methods/random_tokens.py`).
        num_frames: F, the frames that the tokens are of, N / F each, one after another; 1 for an image. For methods
            that go by frames (`methods/evs.py`, `methods/whole_frames.py`).
    """

    vision: Tensor
    keys: Tensor
    text: Tensor
    num_picks: int
    excluded: Tensor | None = None
    attention: Tensor | None = None
    seed: int = 0
    num_frames: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The tokens selected from one image, on the features' device.

    Args:
        order: [K] int64, token indices as picked; the first j are the selection for a budget of j.
        kept: [K] int64, the same indices in raster order.
        coverage: [K] float32, f(S) after each pick; never falls.
        total: [] float32, f of all N tokens; `coverage / total` is the share of text and image that is covered. Not
            finite if the features are not: the indices are then valid, but mean nothing.
    """

    order: Tensor
    kept: Tensor
    coverage: Tensor
    total: Tensor

    def __len__(self) -> int:
        return len(self.kept)
