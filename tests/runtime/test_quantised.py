"""Checkpoints whose language model is quantised: images are selected by the same features."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmtok_bench.families import FamilyName
from mmtok_bench.server import cpu_environment
from tests.runtime.conftest import checkpoint
from tests.runtime.device_quantised import compare
from tests.runtime.quantised import Quantisation, quantise

FAMILY: FamilyName = "qwen2.5-vl"
ROOT = Path(__file__).parents[2]
# What the AWQ and GPTQ formats put in the eight fours of bits of an int32.
AWQ_ORDER, GPTQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7], list(range(8))


def unpacked(packed: Tensor, order: list[int]) -> Tensor:
    fours = packed.to(torch.int64)[..., None] >> (4 * torch.arange(8)) & 15
    return fours[..., order].flatten(-2).float()


def test_the_formats_hold_the_weights(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    weight = load_file(checkpoint(FAMILY) / "model.safetensors")[f"{name}.weight"].float()
    fp8, awq, gptq = (
        load_file(quantise(checkpoint(FAMILY), tmp_path / method, method) / "model.safetensors")
        for method in ("fp8", "awq", "gptq")
    )
    scale = fp8[f"{name}.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    torch.testing.assert_close(fp8[f"{name}.weight"].float() * scale, weight, rtol=0.07, atol=1e-3)
    steps, zeros = unpacked(awq[f"{name}.qweight"], AWQ_ORDER), unpacked(awq[f"{name}.qzeros"], AWQ_ORDER)
    scales = awq[f"{name}.scales"].float().repeat_interleave(128, 0)
    off = (steps - zeros.repeat_interleave(128, 0)) * scales - weight.T
    assert (off.abs() <= 1.01 * scales).all()
    steps, zeros = unpacked(gptq[f"{name}.qweight"].T, GPTQ_ORDER).T, unpacked(gptq[f"{name}.qzeros"], GPTQ_ORDER) + 1
    scales = gptq[f"{name}.scales"].float().repeat_interleave(128, 0)
    off = (steps - zeros.repeat_interleave(128, 0)) * scales - weight.T
    assert (off.abs() <= 1.01 * scales).all()
    assert torch.equal(fp8["visual.merger.mlp.0.weight"], awq["visual.merger.mlp.0.weight"])


def test_other_tokens_would_be_seen_by_their_coverage() -> None:
    whole = [[(10, 0.9), (12, 0.8)], [(10, 0.7), (12, 0.5)]]
    metrics, is_same = compare(whole, [[(10, 0.9), (12, 0.75)], [(10, 0.7), (12, 0.5)]])
    assert metrics == pytest.approx({"max_difference": 0.05, "control_difference": 0.2})
    assert is_same
    assert not compare(whole, [[(10, 0.9), (11, 0.8)], [(10, 0.7), (12, 0.5)]])[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "dtype"), [("fp8", "bfloat16"), ("awq", "float16")])
def test_a_quantised_checkpoint_has_the_features_of_the_whole_one(
    tmp_path: Path, method: Quantisation, dtype: str
) -> None:
    """On SGLang's own model classes, which leave the vision encoder of such a checkpoint unquantised, bit for bit."""
    whole = features_of(checkpoint(FAMILY), tmp_path / "whole.pt", dtype)
    quantised = features_of(quantise(checkpoint(FAMILY), tmp_path / method, method), tmp_path / "features.pt", dtype)
    assert [len(vision[0]) for vision, _ in whole] == [108, 108]
    for each, other in zip(whole, quantised, strict=True):
        assert all(map(torch.equal, each, other))


def features_of(path: Path, file: Path, dtype: str) -> list[tuple[Tensor, Tensor]]:
    command = [sys.executable, "-m", "tests.runtime.features_of_checkpoint", str(path), str(file), dtype]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **cpu_environment()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[tuple[Tensor, Tensor]] = torch.load(file)
    return found
