"""Installing the plugin in a process: a family's classes and all hooks, or nothing.

Everything is checked before anything changes. A process that could not install all of it serves nothing.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.managers import multimodal_processor
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

__all__ = ["Hook", "HookError", "install", "install_hooks", "refuse_half_hooked"]

logger = logging.getLogger(__name__)


class HookError(RuntimeError):
    """A hook point of SGLang is missing, has changed, or could not be hooked; or its classes are the user's."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One function of SGLang and what is wrapped around it.

    Args:
        target: Dotted path below `sglang.srt`.
        parameters: The target's parameter names in the supported version, those that collect others as `*args` and
            `**kwargs`: a change means that the hook must be read again, so it is found at start and not in mid-forward.
        around: Called as `around(original, *args, **kwargs)` in the target's place; a coroutine function if the target
            is one.
        reason: Why it is there, and why on this function.
        until: When it can go.
    """

    target: str
    parameters: str
    around: Callable[..., Any]
    reason: str = ""
    until: str = ""

    @property
    def path(self) -> str:
        """The target's full dotted path."""
        return f"sglang.srt.{self.target}"


_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}

_installed = False
_is_half_hooked = False


def install(hooks: Sequence[Hook], model_class: type, processor_class: type) -> None:
    """Registers a family's classes with SGLang and installs every hook in this process, once.

    Args:
        hooks: The hooks.
        model_class: What SGLang makes the model of; its name is the checkpoint's architecture.
        processor_class: What it makes the multimodal processor of.

    Raises:
        HookError: As `install_hooks`; or the classes' methods do not fit those of SGLang that they override; or the
            user registers a class for this architecture, too.
    """
    problems = [*_override_problems(model_class), *_override_problems(processor_class)]
    if problems:
        raise HookError("MMTok's classes do not fit this SGLang, so nothing would be pruned: " + "; ".join(problems))
    _check_classes(model_class.__name__)
    install_hooks(hooks)
    _register_classes(model_class, processor_class)


def install_hooks(hooks: Sequence[Hook]) -> None:
    """Installs every hook in this process, once.

    Raises:
        HookError: A target is missing, has other parameters than expected, or is taken by another plugin; or an earlier
            call failed half way. Nothing is installed if a target is missing or changed. If a hook fails later, those
            before it stay, since SGLang's registry takes none back: the process is marked, and serves nothing.
    """
    global _installed, _is_half_hooked
    refuse_half_hooked()
    if _installed:
        return
    load_plugins()
    problems = [problem for hook in hooks if (problem := _problem(hook))]
    if problems:
        raise HookError("MMTok cannot hook this SGLang, so nothing would be pruned: " + "; ".join(problems))
    originals = {hook.path: pkgutil.resolve_name(hook.path) for hook in hooks}
    # Until every target is seen to be hooked: whatever is raised in between leaves the process marked.
    _is_half_hooked = True
    for hook in hooks:
        HookRegistry.register(hook.path, hook.around, HookType.AROUND)
    _apply_hooks()
    # The registry logs a failure and goes on: look whether each target is now our wrapper of what it was.
    failed = [
        path
        for path, original in originals.items()
        if getattr(pkgutil.resolve_name(path), "__wrapped__", None) is not original
    ]
    if failed:
        raise HookError(
            f"MMTok could not hook {', '.join(failed)} (hooked by another plugin?): see the log above. This process "
            "is half hooked and serves nothing"
        )
    _is_half_hooked = False
    _installed = True
    logger.info("MMTok: installed %d hooks", len(hooks))


def _apply_hooks() -> None:
    """Applies the registered hooks, without SGLang's line for each of them: one line says that all are installed."""
    registry = logging.getLogger(HookRegistry.__module__)
    level = registry.level
    registry.setLevel(logging.WARNING)
    try:
        HookRegistry.apply_hooks()
    finally:
        registry.setLevel(level)


def refuse_half_hooked() -> None:
    """Raises HookError if an earlier `install_hooks` of this process failed half way: no server may run in it."""
    if _is_half_hooked:
        raise HookError(
            "MMTok could not install all of its hooks in this process before, and some of them are in place: start "
            "the server in a new process"
        )


def _check_classes(architecture: str) -> None:
    """Raises HookError if the user has a model or a processor of this architecture registered with SGLang."""
    from sglang.srt.models.registry import ModelRegistry  # imports every model of SGLang's

    model = ModelRegistry.models.get(architecture)
    if isinstance(model, type) and not _is_sglangs(model):
        raise HookError(
            f"SGLANG_EXTERNAL_MODEL_PACKAGE brings a model of its own for {architecture}, which MMTok does not prune: "
            "drop one of the two"
        )
    package = envs.SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE.get()
    if not package:
        return
    # SGLang would import it later, and put its classes in the place of ours.
    multimodal_processor.import_processors(package, overwrite=True)
    for model, processor in multimodal_processor.PROCESSOR_MAPPING.items():
        if model.__name__ == architecture and not _is_sglangs(processor):
            raise HookError(
                f"SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE brings a processor of its own for {architecture}, which cuts no "
                "placeholders: drop one of the two"
            )


def _register_classes(model_class: type, processor_class: type) -> None:
    """Registers a family's classes with SGLang, in place of those that it has for the architecture.

    Source: sglang 0.5.23 srt/models/registry.py and srt/managers/multimodal_processor.py.
    """
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.models[model_class.__name__] = model_class
    # SGLang takes the first model whose name fits, and imports its own processors after this.
    mapping = multimodal_processor.PROCESSOR_MAPPING
    first = {model_class: processor_class, **mapping}
    mapping.clear()
    mapping.update(first)


def _override_problems(subclass: type) -> Iterator[str]:
    """Gives what is wrong with the methods that a class marks as overrides of SGLang's."""
    for ours in subclass.__mro__:
        for name, written in vars(ours).items():
            function = _function_of(written)
            if not getattr(function, "__override__", False):
                continue
            bases = (vars(base) for base in subclass.__mro__ if _is_sglangs(base))
            theirs = next((_function_of(methods[name]) for methods in bases if name in methods), None)
            if theirs is None:
                yield f"{subclass.__name__}.{name} overrides nothing"
                continue
            parameters = inspect.signature(theirs).parameters.values()
            names = [each.name for each in parameters if each.kind not in _STARS]
            try:
                inspect.signature(function).bind(**dict.fromkeys(names))
            except TypeError as error:
                yield f"{subclass.__name__}.{name} overrides one that takes ({' '.join(names)}): {error}"
            if inspect.iscoroutinefunction(function) != inspect.iscoroutinefunction(theirs):
                yield f"{subclass.__name__}.{name} and what it overrides are not both coroutine functions"


def _function_of(written: Any) -> Any:
    """Returns the function of a class method or a static method; anything else as it is."""
    return getattr(written, "__func__", written)


def _is_sglangs(each: type) -> bool:
    return each.__module__.partition(".")[0] == "sglang"


def _problem(hook: Hook) -> str | None:
    path, _, name = hook.path.rpartition(".")
    try:
        parent = pkgutil.resolve_name(path)
        target = getattr(parent, name)
    except (ImportError, AttributeError) as error:
        return f"{hook.path} is missing ({error})"
    # As it is written in its class: a static method that becomes a class method gets one more argument, and a method
    # that is inherited may be an abstract one.
    written = vars(parent).get(name)
    if written is None:
        return f"{hook.path} is inherited, expected in the class itself"
    function = inspect.unwrap(_function_of(written))
    if not inspect.isfunction(function):
        return f"{hook.path} is a {type(function).__name__}, expected a function"
    found = " ".join(_STARS.get(each.kind, "") + each.name for each in inspect.signature(function).parameters.values())
    if found != hook.parameters:
        return f"{hook.path} takes ({found}), expected ({hook.parameters})"
    is_coroutine = inspect.iscoroutinefunction(target)
    if is_coroutine != inspect.iscoroutinefunction(hook.around):
        return f"{hook.path} is {'a' if is_coroutine else 'no'} coroutine function, expected the opposite"
    return None
