"""The coverage matrix: how well each vision token stands for each word and each part of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.precision import float32_products

__all__ = ["coverage_bound", "coverage_curve", "coverage_matrix", "unit_rows"]

# What float32 rounds of a value of f, relatively: 2**-24 for an addition, and a sum has few on its longest path.
_VALUE_ROUNDING = 2**-22


@float32_products()
def coverage_matrix(
    vision: Tensor, keys: Tensor, text: Tensor, config: SelectionConfig, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns C = [P; alpha Q], the matrix whose row-wise maxima over a set of columns add up to the set's coverage.

    With x, c, t the unit rows of `vision`, `keys` and `text`:
    P = softmax(t x^T / tv_temp) / M and Q = softmax(c c^T / vv_temp) / N, both over the N vision tokens.
    Text coverage is P alone, vision coverage Q alone (alpha weighs the two and has no meaning for one).

    Args:
        vision: [N, D] vision tokens as the language model would read them; float32, float16 or bfloat16.
        keys: [N, d] vision features before the projector; any of the three dtypes.
        text: [M, D] input embeddings of the guidance words; M may be 0 unless coverage is "text".
        config: Temperatures, weight, coverage.
        dtype: Dtype of the computation: float32, or float64 to judge a selection.

    Returns:
        [M + N, N] in `dtype` (or [M, N], or [N, N]) on the features' device.

    Source: MMTok, arXiv 2508.18264, sections 3.1 to 3.3.
    """
    blocks = []
    if config.coverage != "vision" and len(text):
        similarity = unit_rows(text, dtype) @ unit_rows(vision, dtype).T
        blocks.append(torch.softmax(similarity / config.tv_temp, dim=1) / len(text))
    if config.coverage != "text":
        unit_keys = unit_rows(keys, dtype)
        image_rows = torch.softmax(unit_keys @ unit_keys.T / config.vv_temp, dim=1) / len(keys)
        # Without text rows alpha would only scale every gain: left out, so that alpha = 0 still covers the image.
        blocks.append(image_rows * config.alpha if blocks else image_rows)
    return torch.cat(blocks)


def coverage_curve(matrix: Tensor, order: Tensor) -> Tensor:
    """Returns f after each pick.

    Args:
        matrix: [R, N] float32, C.
        order: [K] int64, columns as picked.

    Returns:
        [K] float32, never falling.
    """
    coverage = matrix[:, order].cummax(dim=1).values.sum(dim=0)
    # Sums are rounded: without cummax, a pick that gains nothing could lower the value by its last bit.
    return coverage.cummax(dim=0).values


def coverage_bound(curve: Tensor, total: Tensor) -> Tensor:
    """Returns an upper bound of f(T) over all sets T of at most K tokens that may be picked, from K greedy picks.

    With f_j the coverage after j picks and f_0 = 0, it is the smallest of f_{j-1} + K (f_j - f_{j-1}) for j = 1 .. K,
    and at most f of all tokens. Why it holds: C has no negative entry, so f is monotone and submodular. Let S be the
    first j - 1 picks. f(T) <= f(S + T) since f is monotone, and f(S + T) - f(S) is at most the sum over T of each
    token's own gain f(S + t) - f(S), since f is submodular. Pick j has the largest gain of all tokens that may be
    picked, f_j - f_{j-1}, and T has at most K of them.

    It is never above f_K / (1 - (1 - 1/K)^K), which these K inequalities imply. It is raised by what float32 may round
    of the values of f, 5e-7 K relatively. C is what the backend made of the features, in float32.

    Args:
        curve: [K] f after each greedy pick, K at least 1, as `Selection.coverage` or `coverage_curve` has it.
        total: [] f of all tokens.

    Returns:
        [] in the dtype and on the device of `curve`; nothing is waited for.

    Source: Nemhauser, Wolsey and Fisher, An analysis of approximations for maximizing submodular set functions I,
        1978, section 4.
    """
    num_picks = len(curve)
    before = torch.cat([curve.new_zeros(1), curve[:-1]])
    bound = (before + num_picks * (curve - before)).amin()
    return torch.minimum(bound * (1 + 2 * num_picks * _VALUE_ROUNDING), total)


def unit_rows(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the rows [n, w] in `dtype` and of length 1; those shorter than 1e-8 are divided by that."""
    # Converted first: a norm in float16 overflows at 65504, and the clamp's 1e-8 would be 0.
    rows = rows.to(dtype)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths.clamp(min=1e-8)
