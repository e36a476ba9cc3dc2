"""The direction of imports: bench -> runtime, exporters -> core; a library is imported only where it is served."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "mmtok_deploy"
LINKED = ("exporters", "runtime", "bench")

MAY_IMPORT = {
    "core": {"core"},
    "exporters": {"core", "exporters"},
    "runtime": {"core", "runtime"},
    "bench": {"core", "exporters", "runtime", "bench"},
}
# These start commands of every layer, so they import inside the function that needs it.
LAZY_ENTRY_POINTS = {"mmtok_deploy/cli.py", "mmtok_deploy/doctor.py"}

# Library -> the only files (or folders, ending in a slash) that import it.
SERVES: dict[str, tuple[str, ...]] = {
    "sglang": ("runtime/sglang/",),
    "onnx": ("exporters/artifact.py",),
    "onnx_ir": ("exporters/",),
    "onnxscript": ("exporters/",),
    "onnxruntime": ("mmtok_deploy/engines/onnxruntime.py",),
    "tensorrt": ("mmtok_deploy/engines/tensorrt.py",),
    "tensorrt_rtx": ("mmtok_deploy/engines/tensorrt.py",),
    "plotly": ("bench/report/",),
    "jinja2": ("bench/report/page.py",),
    "triton": ("mmtok_deploy/backends/triton.py", "mmtok_deploy/backends/triton_kernels.py"),
}


class Import(NamedTuple):
    file: str
    line: int
    name: str
    is_lazy: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"

    def is_of(self, module: str) -> bool:
        return f"{self.name}.".startswith(f"{module}.")


def imports_of(file: str, source: str) -> list[Import]:
    """Returns what a file of the package imports, relative names resolved, `from a import b` as a.b."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {id(node) for function in functions for node in ast.walk(function)}
    return [
        Import(file, getattr(node, "lineno", 0), name, id(node) in lazy)
        for node in ast.walk(tree)
        for name in _names(node, _package_of(file))
    ]


def _names(node: ast.AST, package: list[str]) -> Iterable[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            return [f"{module}.{alias.name}" for alias in node.names]
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def _package_of(file: str) -> list[str]:
    folders = list(Path(file).parent.parts)
    return folders if folders[0] == PACKAGE else [PACKAGE, *folders]


def _layer(folder: str) -> str:
    return folder if folder in LINKED else "core"


@functools.cache
def all_imports() -> list[Import]:
    files = [
        *(ROOT / PACKAGE).glob("*.py"),
        *(ROOT / PACKAGE / "backends").glob("*.py"),
        *(ROOT / PACKAGE / "engines").glob("*.py"),
        *(path for top in LINKED for path in (ROOT / top).rglob("*.py")),
    ]
    return [
        found
        for path in sorted(files)
        for found in imports_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]


def is_against_the_direction(found: Import) -> bool:
    if not found.is_of(PACKAGE) or (found.is_lazy and found.file in LAZY_ENTRY_POINTS):
        return False
    target = _layer(f"{found.name}..".split(".")[1])
    return target not in MAY_IMPORT[_layer(found.file.split("/")[0])]


@pytest.mark.parametrize("top", LINKED)
def test_folders_at_the_top_are_linked_into_the_package(top: str) -> None:
    assert (ROOT / top).is_dir()
    assert not (ROOT / top).is_symlink()
    assert os.readlink(ROOT / PACKAGE / top) == f"../{top}"


def test_the_package_is_a_folder() -> None:
    assert (ROOT / PACKAGE).is_dir()
    assert not (ROOT / PACKAGE).is_symlink()


def test_direction() -> None:
    assert [str(found) for found in all_imports() if is_against_the_direction(found)] == []


def test_names_are_the_installed_ones() -> None:
    # `import runtime` works at the repository root alone.
    assert [str(found) for found in all_imports() if any(found.is_of(top) for top in LINKED)] == []


@pytest.mark.parametrize("library", SERVES)
def test_a_library_is_imported_where_it_is_served(library: str) -> None:
    found = [each for each in all_imports() if each.is_of(library)]
    assert [str(each) for each in found if not each.file.startswith(SERVES[library])] == []
    assert [place for place in SERVES[library] if not any(each.file.startswith(place) for each in found)] == []


@pytest.mark.parametrize(
    ("file", "source", "names"),
    [
        ("bench/a.py", "import os, torch.nn as nn", ["os", "torch.nn"]),
        ("bench/a.py", "from torch import nn, Tensor as T", ["torch.nn", "torch.Tensor"]),
        ("bench/a.py", "from . import b\nfrom .c import d", ["mmtok_deploy.bench.b", "mmtok_deploy.bench.c.d"]),
        ("runtime/sglang/a.py", "from ..x import y\nfrom ... import z", ["mmtok_deploy.runtime.x.y", "mmtok_deploy.z"]),
        ("mmtok_deploy/a.py", "from .runtime import b", ["mmtok_deploy.runtime.b"]),
        ("mmtok_deploy/a.py", "importlib.import_module('sglang')\n__import__('onnx')", ["sglang", "onnx"]),
        ("mmtok_deploy/a.py", "version('sglang')  # import sglang", []),
    ],
)
def test_the_scanner_resolves_names(file: str, source: str, names: list[str]) -> None:
    assert [found.name for found in imports_of(file, source)] == names


@pytest.mark.parametrize(
    ("file", "source", "is_refused"),
    [
        ("mmtok_deploy/a.py", "from mmtok_deploy import runtime", True),
        ("mmtok_deploy/a.py", "def f():\n    import mmtok_deploy.bench.demo", True),
        ("mmtok_deploy/cli.py", "import mmtok_deploy.bench.demo", True),
        ("mmtok_deploy/cli.py", "def f():\n    import mmtok_deploy.bench.demo", False),
        ("mmtok_deploy/a.py", "from mmtok_deploy.budget import Budget", False),
        ("mmtok_deploy/a.py", "import mmtok_deploy", False),
        ("exporters/a.py", "if TYPE_CHECKING:\n    from mmtok_deploy.runtime import b", True),
        ("exporters/a.py", "from mmtok_deploy.bench import b", True),
        ("exporters/a.py", "from mmtok_deploy.budget import Budget", False),
        ("runtime/sglang/a.py", "from mmtok_deploy.exporters.b import c", True),
        ("runtime/sglang/a.py", "from ..executors import c", False),
        ("bench/a.py", "from mmtok_deploy.exporters import b, c\nimport mmtok_deploy.runtime", False),
    ],
)
def test_the_scanner_knows_the_direction(file: str, source: str, is_refused: bool) -> None:
    assert any(is_against_the_direction(found) for found in imports_of(file, source)) is is_refused
