from __future__ import annotations

import logging
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pytest
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from mmtok_sglang import plugin
from mmtok_sglang.plugin import SUPPORTED_SGLANG, activate_cpu_platform, register
from mmtok_sglang.server_args import MMTokServerArgs

CPU_PLATFORM = "mmtok_sglang.cpu_platform:TorchCpuPlatform"


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(sys, "argv", ["launch_server", "--model-path", "model"])
    for name in ("SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("engine_is_imported", [True, False])
def test_the_arguments_are_replaced(monkeypatch: pytest.MonkeyPatch, engine_is_imported: bool) -> None:
    engine = ModuleType("sglang.srt.entrypoints.engine")
    engine_class = SimpleNamespace(server_args_class=None)
    engine.__dict__["Engine"] = engine_class
    if engine_is_imported:
        monkeypatch.setitem(sys.modules, engine.__name__, engine)
    else:
        monkeypatch.delitem(sys.modules, engine.__name__, raising=False)
    register()
    ((target, [(kind, hook, _)]),) = HookRegistry._hooks.items()
    assert (target, kind, hook) == ("sglang.srt.server_args.ServerArgs", HookType.REPLACE, MMTokServerArgs)
    assert (engine_class.server_args_class is MMTokServerArgs) is engine_is_imported


def test_another_version_of_sglang_leaves_the_plugin_inactive(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "version", lambda name: "0.5.24")
    with caplog.at_level(logging.WARNING):
        register()
    assert not HookRegistry._hooks
    (line,) = caplog.messages
    assert f"supports sglang {SUPPORTED_SGLANG}, found 0.5.24" in line
    assert "inactive" in line


@pytest.mark.parametrize("flag", [["--mmtok-budget", "64"], ["--mmtok-budget=64"], ["--mmtok-alpha", "1"]])
def test_another_version_of_sglang_does_not_serve_with_a_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    # SGLang swallows a plugin's exceptions, but not its exit.
    monkeypatch.setattr(plugin, "version", lambda name: "0.5.24")
    monkeypatch.setattr(sys, "argv", [*sys.argv, *flag])
    with pytest.raises(SystemExit) as exit_status:
        register()
    assert exit_status.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert f"found 0.5.24: pip install 'sglang=={SUPPORTED_SGLANG}'" in message
    assert not HookRegistry._hooks


@pytest.mark.parametrize(
    ("has_accelerator", "environment", "expected"),
    [
        (False, {}, CPU_PLATFORM),
        (True, {}, None),
        (True, {"SGLANG_PLATFORM": "torch_cpu"}, CPU_PLATFORM),
        (True, {"SGLANG_PLATFORM": "another"}, None),
        (False, {"SGLANG_USE_CPU_ENGINE": "1"}, None),
        (False, {"SGLANG_USE_CPU_ENGINE": "0"}, CPU_PLATFORM),
        (False, {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_PLATFORM": "torch_cpu"}, CPU_PLATFORM),
    ],
)
def test_where_the_cpu_platform_is_active(
    monkeypatch: pytest.MonkeyPatch, has_accelerator: bool, environment: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert activate_cpu_platform() == expected
