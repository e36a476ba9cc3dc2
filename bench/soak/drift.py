"""A changed signature of each function that is hooked: found before anything is hooked.

Run as a program of its own, since hooks stay in the process that installs them: `python -m
mmtok_deploy.bench.soak.drift FAMILY` prints one JSON object.
"""

from __future__ import annotations

import json
import pkgutil
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

__all__ = ["drift_of"]

_CHANGES = ("a new parameter", "a parameter less", "another name", "missing")


def drift_of(family: str) -> dict[str, Any]:
    """Returns how many changed targets were tried, and what was wrong: `num_tried` and `failures`."""
    from mmtok_deploy import Budget
    from mmtok_deploy.presets import PRESETS
    from mmtok_deploy.runtime.sglang.families import FAMILIES
    from mmtok_deploy.runtime.sglang.hooks import HookError, install_hooks
    from mmtok_deploy.runtime.sglang.settings import Settings

    preset = PRESETS[family]
    settings = Settings(family, Budget.parse("10%"), preset.config, preset.guidance)
    hooks = FAMILIES[family].hooks(settings)
    failures, num_tried = [], 0
    for hook in hooks:
        owner = pkgutil.resolve_name(hook.path.rpartition(".")[0])
        name = hook.path.rpartition(".")[2]
        for change in _CHANGES:
            if change == "missing" and any(name in vars(base) for base in getattr(owner, "__mro__", ())[1:]):
                # What is inherited then takes its place, with the parameters that are expected.
                continue
            before = {each.path: pkgutil.resolve_name(each.path) for each in hooks}
            num_tried += 1
            with _changed(owner, name, hook.parameters.split(), change):
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


def _changed(owner: Any, name: str, parameters: list[str], change: str) -> Any:
    if change == "missing":
        return _missing(owner, name)
    names = list(parameters)
    if change == "a new parameter":
        names.append("added_since")
    elif change == "a parameter less":
        names.pop()
    else:
        names[-1] = "renamed_since"
    return mock.patch.object(owner, name, _function(names))


class _missing:  # noqa: N801 - used as a context manager
    """Takes an attribute away for as long as a `with` block runs."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._value = vars(owner)[name]

    def __enter__(self) -> None:
        delattr(self._owner, self._name)

    def __exit__(self, *error: object) -> None:
        setattr(self._owner, self._name, self._value)


def _function(names: list[str]) -> Callable[..., None]:
    """Returns a function with these parameters."""
    made: dict[str, Any] = {}
    exec(f"def changed({', '.join(names)}): pass", made)
    function: Callable[..., None] = made["changed"]
    return function


if __name__ == "__main__":
    print(json.dumps(drift_of(sys.argv[1])))
