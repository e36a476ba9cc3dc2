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
from mmtok_bench.server import SglangServer, cpu_arguments, cpu_environment
from tests.runtime.chats import CHATS
from tests.runtime.conftest import FAMILIES, checkpoint
from tests.runtime.device_quantised import compare
from tests.runtime.emulated_quantisation import quantisation_environment
from tests.runtime.hand_pruned import HandPruned
from tests.runtime.quantised import Quantisation, dequantise, dequantised, quantise
from tests.runtime.serving import Served, template_arguments

FAMILY: FamilyName = "qwen2.5-vl"
SERVED: list[tuple[FamilyName, Quantisation]] = [
    *((family, method) for family in FAMILIES for method in ("fp8", "awq")),
    # SGLang reads experts in GPTQ by kernels for a GPU alone.
    *((family, "gptq") for family in FAMILIES if family != "glm-4.5v" and not family.endswith("-moe")),
]
ROOT = Path(__file__).parents[2]


def test_the_formats_hold_the_weights(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    weight = load_file(checkpoint(FAMILY) / "model.safetensors")[f"{name}.weight"].float()
    fp8, awq, gptq = (
        load_file(quantise(checkpoint(FAMILY), tmp_path / method, method) / "model.safetensors")
        for method in ("fp8", "awq", "gptq")
    )
    parts = {part: fp8[f"{name}.{part}"] for part in ("weight", "weight_scale_inv")}
    torch.testing.assert_close(dequantised("fp8", parts), weight, rtol=0.07, atol=1e-3)
    of_bits: list[tuple[Quantisation, dict[str, Tensor]]] = [("awq", awq), ("gptq", gptq)]
    for method, stored in of_bits:
        parts = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        off = dequantised(method, parts) - weight
        assert (off.abs() <= 1.01 * parts["scales"].float().repeat_interleave(128, 0).T).all()
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(*each, marks=() if each == (FAMILY, "fp8") else pytest.mark.exhaustive) for each in SERVED],
)
def test_a_server_of_a_quantised_checkpoint(tmp_path: Path, family: FamilyName, method: Quantisation) -> None:
    """Answers are those of the hand-pruned model with the weights that the quantised numbers stand for."""
    path = quantise(checkpoint(family), tmp_path / method, method)
    judge = HandPruned(family, dequantise(path, tmp_path / "whole", method))
    arguments = (*cpu_arguments(), *template_arguments(family, path), "--enable-cache-report", "--mmtok-budget=10%")
    environment = cpu_environment() | quantisation_environment(tmp_path / "plugin")
    with SglangServer(path, *arguments, env=environment) as server:
        served = Served(family, server, judge)
        for chat in CHATS:
            served.check(chat, served.ask(chat))
