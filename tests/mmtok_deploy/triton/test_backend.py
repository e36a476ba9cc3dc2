"""Choosing the Triton backend by name, and what its layout says of a batch."""

from __future__ import annotations

import sys

import pytest
import torch

import mmtok_deploy.backends
from mmtok_deploy.backends import get_backend
from mmtok_deploy.backends.triton_layout import ROW_ALIGNMENT, Field, layout_of

CPU = torch.device("cpu")


class TestChoice:
    def test_on_a_cpu_it_says_what_to_do(self) -> None:
        pytest.importorskip("triton")
        with pytest.raises(
            ValueError, match=r"runs on CUDA devices, the features are on 'cpu': .*choose backend 'auto'"
        ):
            get_backend("triton", CPU)

    def test_without_triton_it_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(mmtok_deploy.backends, "triton", raising=False)
        for name in ("triton", "triton_kernels", "triton_launch"):
            monkeypatch.delitem(sys.modules, f"mmtok_deploy.backends.{name}", raising=False)
        monkeypatch.setitem(sys.modules, "triton", None)
        with pytest.raises(
            ValueError, match=r"needs Triton, which comes with PyTorch for CUDA .*install it, or choose"
        ):
            get_backend("triton", CPU)

    def test_a_gpu_that_is_too_old_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        with pytest.raises(ValueError, match=r"needs compute capability 8\.0 \(Ampere\) or newer, Tesla T4 has 7\.5"):
            get_backend("triton", torch.device("cuda"))


class TestLayout:
    def test_problems_lie_one_after_another(self) -> None:
        layout = layout_of(((33, 3, 5), (0, 2, 0), (7, 0, 7)), "multimodal", CPU)
        first, empty, last = ({field: int(row[field]) for field in Field} for row in layout.table)
        assert (first[Field.IMAGE_ROWS], first[Field.WORD_ROW], first[Field.NUM_ROWS]) == (33, 64, 96)
        assert (empty[Field.NUM_WORDS], empty[Field.NUM_ROWS]) == (0, 0)
        assert [last[field] for field in list(Field)[Field.FIRST_TOKEN :]] == [33, 5, 5, 96, 33 * 96]
        assert layout.size == (3, 33, 3, 96)
        assert (layout.total_tokens, layout.total_rows, layout.total_entries) == (40, 128, 33 * 96 + 7 * ROW_ALIGNMENT)

    def test_rows_are_those_of_the_coverage(self) -> None:
        fields = (Field.IMAGE_ROWS, Field.NUM_WORDS, Field.NUM_ROWS)
        text, vision = (
            layout_of(((9, 3, 5),), coverage, CPU).table[0, fields].tolist() for coverage in ("text", "vision")
        )
        assert (text, vision) == ([0, 3, 32], [9, 0, 32])
