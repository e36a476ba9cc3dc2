"""Servers that must not start: they would prune wrongly, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmtok_bench.server import ServerError, SglangServer, cpu_environment
from tests.runtime.conftest import checkpoint, make_server

pytestmark = pytest.mark.slow


def _refusal(server: SglangServer) -> str:
    with pytest.raises(ServerError) as refusal, server:
        pass
    message = str(refusal.value)
    assert "exit status 2" in message
    assert "Traceback" not in message
    assert "usage:" not in message
    return message


def test_another_model(tmp_path: Path) -> None:
    folder = tmp_path / "another"
    shutil.copytree(checkpoint("qwen2.5-vl"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    message = _refusal(SglangServer(folder, "--mmtok-budget=10%", env=cpu_environment()))
    assert "--mmtok-budget does not support LlavaOnevisionForConditionalGeneration: the crops of a large" in message


def test_qwen_on_the_transformers_implementation() -> None:
    server = make_server("qwen2.5-vl", "--mmtok-budget=10%", "--model-impl=transformers")
    assert "on --model-impl auto or sglang, got transformers: drop --model-impl" in _refusal(server)


def test_a_graph_that_hides_the_features() -> None:
    message = _refusal(make_server("qwen2.5-vl", "--mmtok-budget=10%", SGLANG_VIT_ENABLE_CUDA_GRAPH="1"))
    assert "--mmtok-budget cannot be combined with SGLANG_VIT_ENABLE_CUDA_GRAPH" in message


def test_a_bad_budget() -> None:
    message = _refusal(make_server("qwen2.5-vl", "--mmtok-budget=ten"))
    assert "error: --mmtok-budget 'ten' is not understood: expected a whole number" in message


def test_a_flag_without_a_budget() -> None:
    message = _refusal(make_server("qwen2.5-vl", "--mmtok-alpha=1.0"))
    assert "--mmtok-alpha has no effect without --mmtok-budget" in message


def test_a_value_out_of_range() -> None:
    message = _refusal(make_server("qwen2.5-vl", "--mmtok-budget=10%", "--mmtok-tv-temp=-1"))
    assert message.splitlines()[-1].strip() == "error: --mmtok-tv-temp is a positive number, got -1.0"


def test_an_engine_that_does_not_exist() -> None:
    message = _refusal(make_server("qwen2.5-vl", "--mmtok-budget=10%", "--mmtok-engine=/no/such/file.onnx"))
    assert message.splitlines()[-1].strip() == "error: --mmtok-engine: /no/such/file.onnx does not exist"


def test_a_feature_cache_that_leaves_no_room() -> None:
    message = _refusal(make_server("qwen2.5-vl", "--mmtok-budget=10%", "--mmtok-feature-cache-mb=99999999"))
    assert (
        "error: the model, and 97,656.31 GiB for features and selections (--mmtok-feature-cache-mb 99999999)" in message
    )
