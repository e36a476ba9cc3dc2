from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from mmtok_sglang import hooks
from mmtok_sglang.families import FAMILIES
from mmtok_sglang.hooks import Hook, HookError, install_hooks
from mmtok_sglang.settings import Settings
from tests.runtime.stand_ins import make_settings


def with_everything(family: str) -> Settings:
    """Settings with which every hook is there."""
    return replace(make_settings(family=family), agent_url="http://agent/v1")


FAMILY_HOOKS = [
    pytest.param(hook, id=f"{name}-{hook.target}")
    for name, family in FAMILIES.items()
    for hook in family.hooks(with_everything(name))
]


@pytest.mark.parametrize("hook", FAMILY_HOOKS)
def test_every_target_is_in_this_sglang_as_recorded(hook: Hook) -> None:
    assert hooks._problem(hook) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_no_target_is_hooked_twice(name: str) -> None:
    targets = [hook.target for hook in FAMILIES[name].hooks(with_everything(name))]
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
    monkeypatch.setattr(hooks, "_is_half_hooked", False)
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


@pytest.mark.parametrize("failing", range(len(GOOD)))
def test_a_hook_that_fails_late_leaves_a_process_that_serves_nothing(
    upstream: ModuleType, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    apply = HookRegistry._apply_target

    def fail(target: str, hooks: list[Any]) -> None:
        # SGLang logs the failure and goes on.
        if target == GOOD[failing].path:
            raise TypeError(target)
        apply(target, hooks)

    monkeypatch.setattr(HookRegistry, "_apply_target", fail)
    with pytest.raises(HookError, match=rf"could not hook {re.escape(GOOD[failing].path)} .*serves nothing"):
        install_hooks(GOOD)
    monkeypatch.setattr(HookRegistry, "_apply_target", apply)
    with pytest.raises(HookError, match="start the server in a new process"):
        install_hooks(GOOD)
    with pytest.raises(HookError, match="start the server in a new process"):
        hooks.refuse_half_hooked()


def test_an_exception_while_hooking_marks_the_process(upstream: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookRegistry, "apply_hooks", lambda: sys.exit(1))
    with pytest.raises(SystemExit):
        install_hooks(GOOD)
    with pytest.raises(HookError, match="new process"):
        hooks.refuse_half_hooked()


def drifted(function: Callable[..., Any], drift: str) -> Callable[..., Any]:
    """Returns a function that takes other parameters than `function`, or is called otherwise."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    another = inspect.Parameter("another", inspect.Parameter.KEYWORD_ONLY, default=None)
    if drift == "more":
        has_rest = parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        parameters.insert(len(parameters) - bool(has_rest), another)
    elif drift == "fewer":
        parameters.pop()
    elif drift == "renamed":
        parameters[-1] = parameters[-1].replace(name="another")
    is_coroutine = inspect.iscoroutinefunction(function) != (drift == "coroutine")

    async def coroutine(*args: Any, **kwargs: Any) -> None: ...

    def plain(*args: Any, **kwargs: Any) -> None: ...

    changed: Any = coroutine if is_coroutine else plain
    changed.__signature__ = signature.replace(parameters=parameters)
    return changed  # type: ignore[no-any-return]


@pytest.mark.parametrize("drift", ["more", "fewer", "renamed", "coroutine", "gone", "class method"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_target_that_changes_is_found_before_anything_is_hooked(
    name: str, drift: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    for state in ("_installed", "_is_half_hooked"):
        monkeypatch.setattr(hooks, state, False)
    monkeypatch.setattr(hooks, "load_plugins", lambda: None)
    family_hooks = FAMILIES[name].hooks(with_everything(name))
    for hook in family_hooks:
        path, _, attribute = hook.path.rpartition(".")
        parent = pkgutil.resolve_name(path)
        written = inspect.getattr_static(parent, attribute)
        function = inspect.unwrap(getattr(written, "__func__", written))
        if drift == "class method" and not isinstance(written, staticmethod):
            continue
        with monkeypatch.context() as upstream:
            is_static = isinstance(written, staticmethod)
            if drift == "gone":
                upstream.delattr(parent, attribute)
            elif drift == "class method":
                upstream.setattr(parent, attribute, classmethod(lambda cls, obj, **kwargs: None))
            else:
                changed = drifted(function, drift)
                upstream.setattr(parent, attribute, staticmethod(changed) if is_static else changed)
            with pytest.raises(HookError, match=rf"MMTok cannot hook this SGLang.*{re.escape(hook.path)} (takes|is)"):
                install_hooks(family_hooks)
        assert hooks._problem(hook) is None
    assert not HookRegistry._hooks
    hooks.refuse_half_hooked()


def test_one_line_says_that_hooks_are_installed(upstream: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        install_hooks(GOOD)
    assert caplog.messages == ["MMTok: installed 3 hooks"]
