from __future__ import annotations

import os

import pytest

from mmtok_deploy.environment import sglang_platform, sglang_plugins, use_cpu_engine, without_sglang_choices

VARIABLES = ("SGLANG_PLUGINS", "SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_unset() -> None:
    assert sglang_plugins() is None
    assert sglang_platform() is None
    assert use_cpu_engine() is False


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", None),
        ("mmtok", ["mmtok"]),
        (" mmtok , other,", ["mmtok", "other"]),
        (",", []),
    ],
)
def test_plugins(value: str, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", value)
    assert sglang_plugins() == expected


@pytest.mark.parametrize(("value", "expected"), [("", None), ("torch_cpu", "torch_cpu")])
def test_platform(value: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", value)
    assert sglang_platform() == expected


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True), ("true", False)])
def test_cpu_engine_is_asked_for_as_sglang_reads_it(
    value: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", value)
    assert use_cpu_engine() is expected


def test_without_sglang_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    environment = without_sglang_choices()
    assert environment == {name: value for name, value in os.environ.items() if name not in VARIABLES}
    assert environment["PATH"]
    assert use_cpu_engine()
