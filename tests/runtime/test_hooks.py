"""The list of hooks: what each is, and that a change of SGLang's is found before anything is hooked."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry

from mmtok_sglang import install
from mmtok_sglang.families import FAMILIES
from mmtok_sglang.hooks import hooks_of
from mmtok_sglang.install import Hook, HookError, install_hooks
from mmtok_sglang.server import Server
from tests.runtime.stand_ins import make_settings


def make_hooks(family: str, *, with_agent: bool = True) -> list[Hook]:
    settings = make_settings(family=family)
    if with_agent:
        settings = replace(settings, agent_url="http://agent/v1")
    return hooks_of(Server(settings, FAMILIES[family]))


HOOKS = make_hooks("qwen2.5-vl")


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target)
def test_every_target_is_in_this_sglang_as_recorded(hook: Hook) -> None:
    assert install._problem(hook) is None


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target)
def test_every_hook_says_why_it_is_there_and_when_it_can_go(hook: Hook) -> None:
    assert hook.reason
    assert hook.until


@pytest.mark.parametrize("with_agent", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_same_hooks(name: str, with_agent: bool) -> None:
    assert [hook.target for hook in make_hooks(name, with_agent=with_agent)] == [hook.target for hook in HOOKS]


def test_no_target_is_hooked_twice() -> None:
    targets = [hook.target for hook in HOOKS]
    assert len(targets) == len(set(targets))


def test_no_method_of_a_model_or_a_processor_is_hooked() -> None:
    assert [hook.target for hook in HOOKS if hook.target.startswith(("models.", "multimodal."))] == []


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
def test_a_target_that_changes_is_found_before_anything_is_hooked(drift: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    for state in ("_installed", "_is_half_hooked"):
        monkeypatch.setattr(install, state, False)
    monkeypatch.setattr(install, "load_plugins", lambda: None)
    for hook in HOOKS:
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
                install_hooks(HOOKS)
        assert install._problem(hook) is None
    assert not HookRegistry._hooks
    install.refuse_half_hooked()
