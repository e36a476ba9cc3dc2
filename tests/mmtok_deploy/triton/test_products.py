"""What products of float32 features on tensor cores do to the answers, emulated: why three of them, and not one.

Tensor cores multiply numbers of 11 bits (tf32) exactly, and cut their sums to float32 where others round.
Source: Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330 (2021).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmtok_deploy.backends.reference import greedy_maximum_coverage
from tests.mmtok_deploy.problems import golden

NAMES = ["llava_n100_k20", "llava_n144_k143", "llava_n256_k32", "qwen_n100_k20", "qwen_n144_k143", "qwen_n256_k32"]


def rounded_to_tf32(numbers: Tensor) -> Tensor:
    return ((numbers.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def cut(sums: Tensor) -> Tensor:
    rounded = sums.float()
    return torch.where(rounded.double().abs() > sums.abs(), torch.nextafter(rounded, torch.zeros(())), rounded)


def products(left: Tensor, right: Tensor, precision: str, step: int = 8) -> Tensor:
    """Returns left @ right^T, as tensor cores do it in steps of 8 numbers."""
    large = [rounded_to_tf32(each) for each in (left, right)]
    small = [rounded_to_tf32(each - coarse) for each, coarse in zip((left, right), large, strict=True)]
    pairs = [(large[0], large[1])]
    if precision == "tf32x3":
        pairs = [(large[0], small[1]), (small[0], large[1]), *pairs]
    sums = torch.zeros(len(left), len(right))
    for start in range(0, left.shape[1], step):
        for one, other in pairs:
            a, b = (each[:, start : start + step].double() for each in (one, other))
            sums = cut(sums.double() + a @ b.T)
    return sums


def cosines(left: Tensor, right: Tensor, precision: str) -> Tensor:
    norms = [torch.linalg.vector_norm(each, dim=1) for each in (left, right)]
    unit_products: Tensor = products(left, right, precision) / (norms[0][:, None] * norms[1])
    return unit_products


def order_with(name: str, precision: str) -> list[int]:
    case = golden(name)
    vision, keys, text = case.problem.vision, case.problem.keys, case.problem.text
    words = torch.softmax(cosines(text, vision, precision) / case.config.tv_temp, dim=1) / len(text)
    image = torch.softmax(cosines(keys, keys, precision) / case.config.vv_temp, dim=1) / len(keys)
    matrix = torch.cat([words, image * case.config.alpha])
    return greedy_maximum_coverage(matrix, case.budget, case.problem.excluded).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_three_products_keep_the_golden_answers(name: str) -> None:
    assert order_with(name, "tf32x3") == golden(name).order


def test_one_product_does_not() -> None:
    assert any(order_with(name, "tf32") != golden(name).order for name in NAMES)


@pytest.mark.parametrize(("width", "largest_error"), [(1024, 2e-5), (3584, 5e-5)])
def test_three_products_are_good_to(width: int, largest_error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(48, width, generator=generator) + torch.randn(width, generator=generator)
    exact = torch.nn.functional.normalize(rows.double(), dim=1)
    error = (cosines(rows, rows, "tf32x3") - exact @ exact.T).abs().max()
    assert error < largest_error
