from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from mmtok_deploy.runtime.sglang import hooks
from mmtok_deploy.runtime.sglang.families import FAMILIES
from mmtok_deploy.runtime.sglang.hooks import Hook, HookError, install_hooks
from tests.runtime.stand_ins import make_settings

FAMILY_HOOKS = [
    pytest.param(hook, id=f"{name}-{hook.target}")
    for name, family in FAMILIES.items()
    for hook in family.hooks(make_settings(family=name))
]


@pytest.mark.parametrize("hook", FAMILY_HOOKS)
def test_every_target_is_in_this_sglang_as_recorded(hook: Hook) -> None:
    assert hooks._problem(hook) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_no_target_is_hooked_twice(name: str) -> None:
    targets = [hook.target for hook in FAMILIES[name].hooks(make_settings(family=name))]
    assert len(targets) == len(set(targets))


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of SGLang's, and a registry of hooks, that last as long as the test."""
    module = ModuleType("sglang.srt.stand_in")
    source = (
        "def double(number): return 2 * number\n"
        "class Model:\n"
        "    def forward(self, x, *, y=0): return x + y\n"
        "    @staticmethod\n"
        "    def of(x): return x\n"
    )
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "sglang.srt.stand_in", module)
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(hooks, "_installed", False)
    monkeypatch.setattr(hooks, "load_plugins", lambda: None)
    return module


def add_one(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    return original(*args, **kwargs) + 1


GOOD = [
    Hook("stand_in.double", "number", add_one),
    Hook("stand_in.Model.forward", "self x y", add_one),
    Hook("stand_in.Model.of", "x", add_one),
]


def results(upstream: ModuleType) -> tuple[int, int, int]:
    return upstream.double(5), upstream.Model().forward(5, y=1), upstream.Model.of(5)


def test_hooks_go_around_functions_methods_and_static_methods(upstream: ModuleType) -> None:
    install_hooks(GOOD)
    assert results(upstream) == (11, 7, 6)


def test_hooks_are_installed_once_in_a_process(upstream: ModuleType) -> None:
    install_hooks(GOOD)
    install_hooks(GOOD)
    assert results(upstream) == (11, 7, 6)


BAD = [
    Hook("stand_in.triple", "number", add_one),
    Hook("stand_in.Model.backward", "self", add_one),
    Hook("no_such_module.double", "number", add_one),
    Hook("stand_in.Model.forward", "self x", add_one),
    Hook("stand_in.double", "numbers", add_one),
]


def test_a_missing_or_changed_target_leaves_nothing_installed(upstream: ModuleType) -> None:
    with pytest.raises(HookError) as error:
        install_hooks([*GOOD, *BAD])
    assert results(upstream) == (10, 6, 5)
    assert not HookRegistry._hooks
    assert not hooks._installed
    message = str(error.value)
    for path in ("stand_in.triple", "stand_in.Model.backward", "no_such_module.double"):
        assert f"sglang.srt.{path} is missing (" in message
    assert "sglang.srt.stand_in.Model.forward takes (self x y), expected (self x)" in message
    assert "sglang.srt.stand_in.double takes (number), expected (numbers)" in message


def test_a_target_of_another_plugin_is_refused(upstream: ModuleType) -> None:
    HookRegistry.register("sglang.srt.stand_in.double", add_one, HookType.AROUND)
    HookRegistry.apply_hooks()
    with pytest.raises(HookError, match=r"could not hook sglang\.srt\.stand_in\.double .*another plugin"):
        install_hooks(GOOD)
    assert not hooks._installed


def test_a_hook_that_sglang_cannot_apply_is_refused(upstream: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: str, hooks: list[Any]) -> None:
        raise TypeError(target)

    # SGLang logs the failure and goes on.
    monkeypatch.setattr(HookRegistry, "_apply_target", fail)
    with pytest.raises(HookError, match="could not hook"):
        install_hooks(GOOD)
