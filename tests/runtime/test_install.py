"""Classes and hooks are installed as a whole, in a process, or not at all."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from sglang.srt.environ import envs
from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING, import_processors
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from typing_extensions import override

from mmtok_sglang import install as installing
from mmtok_sglang.families import FAMILIES
from mmtok_sglang.install import Hook, HookError, install, install_hooks


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
    monkeypatch.setattr(installing, "_installed", False)
    monkeypatch.setattr(installing, "_is_half_hooked", False)
    monkeypatch.setattr(installing, "load_plugins", lambda: None)
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
    assert not installing._installed
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
    assert not installing._installed


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
        installing.refuse_half_hooked()


def test_an_exception_while_hooking_marks_the_process(upstream: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookRegistry, "apply_hooks", lambda: sys.exit(1))
    with pytest.raises(SystemExit):
        install_hooks(GOOD)
    with pytest.raises(HookError, match="new process"):
        installing.refuse_half_hooked()


def test_one_line_says_that_hooks_are_installed(upstream: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        install_hooks(GOOD)
    assert caplog.messages == ["MMTok: installed 3 hooks"]


@pytest.fixture
def registries(upstream: ModuleType) -> Iterator[None]:
    """SGLang's registries of models and processors, as they are after the test what they were before."""
    with mock.patch.dict(ModelRegistry.models), mock.patch.dict(PROCESSOR_MAPPING):
        yield


def processor_of(architecture: str) -> Any:
    """Returns what SGLang would make the processor of: `get_mm_processor_cls` takes the first whose name fits."""
    return next(processor for model, processor in PROCESSOR_MAPPING.items() if model.__name__ == architecture)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("is_imported_before", [True, False])
@pytest.mark.usefixtures("registries")
def test_a_familys_classes_come_before_sglangs(name: str, is_imported_before: bool) -> None:
    family = FAMILIES[name]
    num_models = len(ModelRegistry.models)
    PROCESSOR_MAPPING.clear()
    if is_imported_before:
        import_processors("sglang.srt.multimodal.processors")
    install(GOOD, family.model_class, family.processor_class)
    import_processors("sglang.srt.multimodal.processors")
    assert ModelRegistry.resolve_model_cls([family.architecture]) == (family.model_class, family.architecture)
    assert processor_of(family.architecture) is family.processor_class
    # Every other model is as it was.
    assert len(ModelRegistry.models) <= num_models + 1
    assert processor_of("Qwen3OmniMoeForConditionalGeneration").__name__ == "QwenVLImageProcessor"


@pytest.mark.usefixtures("registries")
def test_a_users_model_of_another_architecture_stays() -> None:
    family = FAMILIES["qwen2.5-vl"]
    ours = type("MyOwnForConditionalGeneration", (), {"__module__": "my_models.mine"})
    ModelRegistry.models["MyOwnForConditionalGeneration"] = ours
    install(GOOD, family.model_class, family.processor_class)
    assert ModelRegistry.models["MyOwnForConditionalGeneration"] is ours


@pytest.mark.usefixtures("registries")
def test_a_users_model_of_the_same_architecture_is_refused(upstream: ModuleType) -> None:
    family = FAMILIES["qwen2.5-vl"]
    theirs = type(family.architecture, (), {"__module__": "my_models.mine"})
    ModelRegistry.models[family.architecture] = theirs
    with pytest.raises(HookError, match="SGLANG_EXTERNAL_MODEL_PACKAGE brings a model of its own for Qwen2_5_VL"):
        install(GOOD, family.model_class, family.processor_class)
    assert results(upstream) == (10, 6, 5)
    assert ModelRegistry.models[family.architecture] is theirs


_PROCESSOR = """
from sglang.srt.models.{module} import {model} as model
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

class MyProcessor(BaseMultimodalProcessor):
    models = [model]
"""


@pytest.mark.parametrize(
    ("model", "module_name", "is_refused"),
    [
        ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", True),
        ("Qwen2VLForConditionalGeneration", "qwen2_vl", False),
    ],
)
@pytest.mark.usefixtures("registries")
def test_a_users_processor_of_the_same_architecture_alone_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    upstream: ModuleType,
    model: str,
    module_name: str,
    is_refused: bool,
) -> None:
    package = f"my_processors_{module_name}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "mine.py").write_text(_PROCESSOR.format(module=module_name, model=model))
    monkeypatch.syspath_prepend(tmp_path)
    family = FAMILIES["qwen2.5-vl"]
    with envs.SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE.override(package):
        if is_refused:
            with pytest.raises(HookError, match="PROCESSOR_PACKAGE brings a processor of its own for Qwen2_5_VL"):
                install(GOOD, family.model_class, family.processor_class)
            assert results(upstream) == (10, 6, 5)
            return
        install(GOOD, family.model_class, family.processor_class)
        # As the tokenizer process goes on.
        import_processors("sglang.srt.multimodal.processors")
        import_processors(package, overwrite=True)
    assert processor_of(model).__name__ == "MyProcessor"
    assert processor_of(family.architecture) is family.processor_class


class Theirs:
    """Stands in for a class of SGLang's."""

    def encode(self, items: Any, *, dtype: Any = None) -> Any: ...

    async def process(self, text: Any) -> Any: ...

    @classmethod
    def load(cls, data: Any) -> Any: ...


Theirs.__module__ = "sglang.srt.stand_in"


def overriding(name: str, function: Callable[..., Any]) -> type:
    written = override(function)
    return type("Ours", (Theirs,), {"__module__": "ours", name: classmethod(written) if name == "load" else written})


async def coroutine(self: Any, text: Any) -> None: ...


@pytest.mark.parametrize(
    ("name", "function", "problem"),
    [
        ("encode", lambda self, items, dtype=None: None, None),
        ("encode", lambda self, *args, **kwargs: None, None),
        ("process", coroutine, None),
        ("load", lambda cls, *args, **kwargs: None, None),
        ("load", lambda cls, data, more: None, "Ours.load overrides one .*missing.* 'more'"),
        ("encode", lambda self, items: None, r"Ours.encode overrides one that takes \(self items dtype\): .*dtype"),
        ("encode", lambda self, items, dtype, more: None, "Ours.encode overrides one .*missing.* 'more'"),
        ("decode", lambda self: None, "Ours.decode overrides nothing"),
        ("process", lambda self, text: None, "Ours.process and what it overrides are not both coroutine functions"),
    ],
)
@pytest.mark.usefixtures("registries")
def test_methods_that_do_not_fit_sglangs_are_found_before_anything_is_installed(
    upstream: ModuleType, name: str, function: Callable[..., Any], problem: str | None
) -> None:
    ours = overriding(name, function)
    if problem is None:
        install(GOOD, ours, type("Processor", (), {}))
        assert ModelRegistry.models["Ours"] is ours
        return
    with pytest.raises(HookError, match=problem):
        install(GOOD, ours, type("Processor", (), {}))
    assert results(upstream) == (10, 6, 5)
    assert "Ours" not in ModelRegistry.models


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_it_overrides(name: str) -> None:
    """What is not marked would not be looked at when SGLang changes."""
    for ours in (FAMILIES[name].model_class, FAMILIES[name].processor_class):
        for base in ours.__mro__:
            if not base.__module__.startswith("mmtok_sglang"):
                continue
            for method, written in vars(base).items():
                function = installing._function_of(written)
                is_sglangs = any(method in vars(each) for each in ours.__mro__ if each.__module__.startswith("sglang"))
                if is_sglangs and callable(function) and not method.startswith("__"):
                    assert getattr(function, "__override__", False), f"{base.__name__}.{method}"
