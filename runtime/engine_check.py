"""Whether an exported file selects as the float32 reference does, on the device that it will run on."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_curve, coverage_matrix
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["sample_problems", "what_is_wrong"]

# As bench/close_calls.py: leads of up to 3e-6 of a gain were seen to go either way in float32.
_CLOSE_CALL = 2e-5
# As exporters/check.py: products and sums of thousands of terms in another order; 1.1e-5 was seen.
_COVERAGE_TOLERANCE = 1e-4
_NUM_CLUSTERS = 24
# Of the sample, to keep a start short where the file takes images of many sizes.
_MAX_TOKENS, _MAX_WORDS = 1024, 8
# No image and no question is larger; a file that takes nothing smaller is not one that can be tried.
_MAX_SMALLEST = 1 << 15


def sample_problems(manifest: Manifest, device: torch.device) -> list[SelectionProblem]:
    """Returns two images like a model's, the second with a shorter text and with excluded tokens.

    Features are of a few kinds of things, and words name some of them, so that gains differ as a model's do.

    Args:
        manifest: Of the file, which is to select from them.
        device: Where they are made.

    Raises:
        ValueError: The smallest image or text that the file takes is larger than any.
    """
    sizes, generator = manifest.dimensions, torch.Generator().manual_seed(0)
    for name in ("N", "M"):
        if sizes[name].minimum > _MAX_SMALLEST:
            raise ValueError(f"it takes no {name} below {sizes[name].minimum}, expected at most {_MAX_SMALLEST}")
    num_tokens = max(sizes["N"].minimum, min(sizes["N"].optimum, _MAX_TOKENS))
    num_words = max(sizes["M"].minimum, min(sizes["M"].maximum, _MAX_WORDS))
    widths = {name: int(manifest.input(name).shape[-1]) for name in ("vision", "keys")}
    problems = []
    for num_named, is_masked in ((num_words, False), (max(1, num_words // 2), True)):
        kinds = {name: torch.randn(_NUM_CLUSTERS, width, generator=generator) for name, width in widths.items()}
        which = torch.randint(_NUM_CLUSTERS, (num_tokens,), generator=generator)
        features = {
            name: kinds[name][which] + torch.randn(num_tokens, width, generator=generator)
            for name, width in widths.items()
        }
        named = torch.randint(_NUM_CLUSTERS, (num_named,), generator=generator)
        noise = torch.randn(num_named, widths["vision"], generator=generator)
        features["text"] = 0.3 * kinds["vision"][named] + noise
        vision, keys, text = (
            features[name].to(device, getattr(torch, manifest.input(name).dtype)) for name in ("vision", "keys", "text")
        )
        excluded = None
        if is_masked and num_tokens > 1:
            excluded = torch.arange(num_tokens, device=device) < num_tokens // 8
            # What would be picked first, so that a file which does not read the mask is found out.
            excluded[coverage_matrix(vision, keys, text, manifest.constants).sum(dim=0).argmax()] = True
        num_pickable = num_tokens - (0 if excluded is None else int(excluded.sum()))
        problems.append(SelectionProblem(vision, keys, text, min(manifest.budget, num_pickable), excluded))
    return problems


def what_is_wrong(problem: SelectionProblem, config: SelectionConfig, selection: Selection) -> str | None:
    """Returns what is not as in the float32 reference, None if nothing is.

    Each pick is held against the largest gain after the picks before it: two gains closer than float32 tells apart may
    be ordered either way.
    """
    order: list[int] = selection.order.tolist()
    if selection.kept.tolist() != sorted(set(order)) or len(order) != problem.num_picks:
        return f"it keeps {selection.kept.tolist()} by the order {order}, expected {problem.num_picks} tokens"
    if order and not 0 <= min(order) <= max(order) < len(problem.vision):
        return f"it picks {order} of {len(problem.vision)} tokens"
    matrix = coverage_matrix(problem.vision, problem.keys, problem.text, config)
    wrong = _wrong_pick(matrix.double(), problem.excluded, order)
    if wrong is not None:
        return wrong
    for name, found, expected in (
        ("coverage", selection.coverage, coverage_curve(matrix, selection.order)),
        ("total", selection.total, matrix.amax(dim=1).sum()),
    ):
        if not torch.allclose(found, expected, rtol=_COVERAGE_TOLERANCE, atol=0):
            return f"its {name} differs by more than {_COVERAGE_TOLERANCE} of it"
    return None


def _wrong_pick(matrix: Tensor, excluded: Tensor | None, order: list[int]) -> str | None:
    covered = matrix.new_zeros(len(matrix))
    barred = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    if excluded is not None:
        barred |= excluded
    for pick, token in enumerate(order):
        gains = (matrix - covered[:, None]).clamp_(min=0).sum(dim=0).masked_fill_(barred, -torch.inf)
        best = int(gains.argmax())
        if not gains[token] >= gains[best] * (1 - _CLOSE_CALL):
            return f"pick {pick} is token {token}, which gains {gains[token]:.3g}; token {best} gains {gains[best]:.3g}"
        barred[token] = True
        covered = torch.maximum(covered, matrix[:, token])
    return None
