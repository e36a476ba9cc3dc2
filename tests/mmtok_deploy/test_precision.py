from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmtok_deploy import SelectionConfig
from mmtok_deploy.backends import BackendName
from mmtok_deploy.methods import MethodName, comparator, visionzip
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import SelectionProblem
from tests.mmtok_deploy.problems import random_problem, using_backend

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def allowed() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = allowed()
    yield
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


class Products(TorchDispatchMode):
    """Records what PyTorch is allowed at every product of matrices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.precisions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "bmm", "mv"):
            self.precisions.append(torch.get_float32_matmul_precision())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("backend", ["reference", "blocked", "lazy"])
def test_a_selection_is_float32_in_a_process_that_allows_less(backend: BackendName, precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = allowed()
    with using_backend(backend), Products() as products:
        random_problem(40).select(8)
    # Similarities to the text and to the image.
    assert len(products.precisions) >= 2
    assert set(products.precisions) == {"highest"}
    assert (torch.get_float32_matmul_precision(), allowed()) == (precision, before)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "dart", "scope", "apet", "otprune"])
def test_other_methods_as_well(name: MethodName) -> None:
    torch.set_float32_matmul_precision("high")
    problem = random_problem(20)
    with Products() as products:
        comparator(name)([SelectionProblem(problem.vision, problem.keys, problem.text, 4)], SelectionConfig())
    assert products.precisions
    assert set(products.precisions) == {"highest"}


def test_the_class_tokens_attention_as_well() -> None:
    torch.set_float32_matmul_precision("high")
    with Products() as products:
        visionzip.class_token_attention(torch.randn(1, 5, 8), torch.randn(1, 5, 8), 2)
    assert set(products.precisions) == {"highest"}


def test_what_was_allowed_is_allowed_again_after_an_error() -> None:
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(KeyError), float32_products():  # noqa: PT012
        assert torch.get_float32_matmul_precision() == "highest"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("backend", BACKENDS, ids=["cuda", "cpu"])
def test_a_backends_own_setting(backend: Any) -> None:
    backend.fp32_precision = "tf32"
    before = allowed()
    with float32_products():
        assert not {"tf32", "bf16"} & set(allowed())
        assert not torch.backends.cuda.matmul.allow_tf32
    assert allowed() == before


def test_one_within_another() -> None:
    torch.set_float32_matmul_precision("high")
    with float32_products():
        with float32_products():
            pass
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
