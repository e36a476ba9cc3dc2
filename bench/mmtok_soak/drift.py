"""Changes the signature of each hooked function: the plugin must notice before it installs a hook.

Runs as a program of its own, since hooks stay in the process that installs them: `python -m
mmtok_soak.drift FAMILY` prints one JSON object.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import pkgutil
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

__all__ = ["drift_of"]

_CHANGES = ("a new parameter", "a parameter less", "another name", "missing")


def drift_of(family: str) -> dict[str, Any]:
    """Returns `num_tried`, the number of changed functions, `num_hooks` and `failures`."""
    from mmtok_deploy import Budget
    from mmtok_deploy.presets import PRESETS
    from mmtok_sglang.families import FAMILIES
    from mmtok_sglang.hooks import hooks_of
    from mmtok_sglang.install import HookError, install_hooks
    from mmtok_sglang.server import Server
    from mmtok_sglang.settings import Settings

    preset = PRESETS[family]
    settings = Settings(family, Budget.parse("10%"), preset.config, preset.guidance)
    hooks = hooks_of(Server(settings, FAMILIES[family]))
    failures, num_tried = [], 0
    for hook in hooks:
        owner = pkgutil.resolve_name(hook.path.rpartition(".")[0])
        name = hook.path.rpartition(".")[2]
        for change in _CHANGES:
            before = {each.path: pkgutil.resolve_name(each.path) for each in hooks}
            num_tried += 1
            with _changed(owner, name, change):
                try:
                    install_hooks(hooks)
                    failures.append(f"{hook.path} with {change}: the hooks are installed all the same")
                    return {"num_tried": num_tried, "num_hooks": len(hooks), "failures": failures}
                except HookError as error:
                    if hook.path not in str(error):
                        failures.append(f"{hook.path} with {change}: the error does not name it: {error}")
            after = {each.path: pkgutil.resolve_name(each.path) for each in hooks}
            changed = [path for path in before if before[path] is not after[path]]
            if changed:
                failures.append(f"{hook.path} with {change}: hooked nevertheless: {', '.join(changed)}")
    return {"num_tried": num_tried, "num_hooks": len(hooks), "failures": failures}


def _changed(owner: Any, name: str, change: str) -> Any:
    """Returns a context manager that changes a function of SGLang."""
    if change == "missing":
        return _missing(owner, name)
    target = inspect.unwrap(getattr(owner, name))
    signature = inspect.signature(getattr(target, "__func__", target))
    parameters = list(signature.parameters.values())
    if change == "a new parameter":
        added = inspect.Parameter("added_since", inspect.Parameter.KEYWORD_ONLY)
        is_last = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        parameters.insert(len(parameters) - is_last, added)
    elif change == "a parameter less":
        parameters.pop()
    else:
        parameters[-1] = parameters[-1].replace(name="renamed_since")
    stand_in = _coroutine if inspect.iscoroutinefunction(target) else _function
    # A new function each time, so that the stand-ins keep their signature.
    changed: Any = types.FunctionType(stand_in.__code__, stand_in.__globals__, name)
    changed.__signature__ = signature.replace(parameters=parameters)
    return mock.patch.object(owner, name, changed)


def _function() -> None:
    """Stands in for a changed function of SGLang."""


async def _coroutine() -> None:
    """Stands in for a changed coroutine function of SGLang."""


@contextlib.contextmanager
def _missing(owner: Any, name: str) -> Iterator[None]:
    value = vars(owner)[name]
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, value)


if __name__ == "__main__":
    print(json.dumps(drift_of(sys.argv[1])))
