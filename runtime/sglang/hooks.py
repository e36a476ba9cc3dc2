"""Hooks on SGLang's functions: checked first, then installed, all of them or none."""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

__all__ = ["Hook", "HookError", "install_hooks"]

logger = logging.getLogger(__name__)


class HookError(RuntimeError):
    """A hook point of SGLang is missing, has changed, or could not be hooked."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One function of SGLang and what is wrapped around it.

    Args:
        target: Dotted path below `sglang.srt`.
        parameters: The target's parameter names in the supported version: a change means that the hook must be read
            again, so it is found at start and not in mid-forward.
        around: Called as `around(original, *args, **kwargs)` in the target's place.
    """

    target: str
    parameters: str
    around: Callable[..., Any]

    @property
    def path(self) -> str:
        """The target's full dotted path."""
        return f"sglang.srt.{self.target}"


_installed = False


def install_hooks(hooks: Sequence[Hook]) -> None:
    """Installs every hook in this process, once.

    Raises:
        HookError: A target is missing, has other parameters than expected, or is taken by another plugin. Nothing is
            installed if a target is missing or changed.
    """
    global _installed
    if _installed:
        return
    load_plugins()
    problems = [problem for hook in hooks if (problem := _problem(hook))]
    if problems:
        raise HookError("MMTok cannot hook this SGLang, so nothing would be pruned: " + "; ".join(problems))
    originals = {hook.path: pkgutil.resolve_name(hook.path) for hook in hooks}
    for hook in hooks:
        HookRegistry.register(hook.path, hook.around, HookType.AROUND)
    HookRegistry.apply_hooks()
    # The registry logs a failure and goes on: look whether each target is now our wrapper of what it was.
    for path, original in originals.items():
        if getattr(pkgutil.resolve_name(path), "__wrapped__", None) is not original:
            raise HookError(f"MMTok could not hook {path} (is it hooked by another plugin?): see the log above")
    _installed = True
    logger.info("MMTok: installed %d hooks", len(hooks))


def _problem(hook: Hook) -> str | None:
    try:
        target = pkgutil.resolve_name(hook.path)
    except (ImportError, AttributeError) as error:
        return f"{hook.path} is missing ({error})"
    found = " ".join(inspect.signature(inspect.unwrap(target)).parameters)
    if found != hook.parameters:
        return f"{hook.path} takes ({found}), expected ({hook.parameters})"
    return None
