from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtok_deploy import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import ArtifactError, Check, FileInfo, Manifest, TensorInfo, describe_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"graph")
    path.with_name("a.onnx.data").write_bytes(b"weights")
    manifest = Manifest(
        kind="selection",
        format="onnx",
        files=(describe_file(path), describe_file(path.with_name("a.onnx.data"))),
        inputs=(TensorInfo("vision", "float16", ("B", "N", 8)),),
        outputs=(TensorInfo("kept", "int64", ("B", 4)),),
        dimensions={"B": DimRange.fixed(1), "N": DimRange(4, 8, 16)},
        budget=4,
        form="lazy",
        constants=SelectionConfig(0.01, 0.3, 0.7, "text"),
        versions={"mmtok-deploy": "0.1.0"},
        requires={"onnxruntime": "1.18"},
        created="2026-11-21T00:00:00+00:00",
        check=Check("passed", "onnxruntime", "all equal"),
        details={"edges": {"vision": {"width": 8}}},
    )
    Manifest.path_of(path).write_text(manifest.to_json())
    return path


def test_what_is_written_is_read(file: Path) -> None:
    manifest = Manifest.load(file)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.constants == SelectionConfig(0.01, 0.3, 0.7, "text")
    assert manifest.input("vision").shape == ("B", "N", 8)


def test_an_input_that_is_not_there(file: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a\.onnx has no input 'text', only vision"):
        Manifest.load(file).input("text")


@pytest.mark.parametrize("name", ["a.onnx", "a.onnx.data"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"has \d bytes, exported were \d: export it again"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "is not what was exported"),
        (lambda path: path.unlink(), "(is not there|does not exist)"),
    ],
    ids=["truncated", "changed", "missing"],
)
def test_a_file_that_is_not_whole_is_refused(file: Path, name: str, change: Any, message: str) -> None:
    change(file.with_name(name))
    with pytest.raises(ArtifactError, match=message):
        Manifest.load(file)


def test_a_renamed_file_is_refused(file: Path) -> None:
    renamed = file.rename(file.with_name("b.onnx"))
    Manifest.path_of(file).rename(Manifest.path_of(renamed))
    with pytest.raises(ArtifactError, match=r"describes a\.onnx, not b\.onnx"):
        Manifest.load(renamed)


def test_without_a_manifest(file: Path) -> None:
    Manifest.path_of(file).unlink()
    with pytest.raises(ArtifactError, match=r"a\.onnx\.json is not there"):
        Manifest.load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema 1 is not understood, this version reads 2"),
        ({"surprise": 1}, "fields differ: surprise"),
        ({"kind": "poem"}, "kind is one of selection, encoder, attached, got 'poem'"),
        ({"files": []}, "files names at least"),
        ({"files": [{"name": "../a", "size_bytes": 1, "sha256": ""}]}, "without folders"),
        ({"dimensions": {"N": {"minimum": 4, "optimum": 2, "maximum": 9}}}, "MIN <= OPTIMUM"),
        ({"inputs": 3}, "not a manifest"),
    ],
)
def test_another_manifest_is_refused(file: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads(Manifest.load(file).to_json()) | change
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "null"])
def test_not_a_manifest(text: str) -> None:
    with pytest.raises(ArtifactError, match="not a manifest of an exported file"):
        Manifest.from_json(text)


def test_a_file_name_has_no_folder() -> None:
    with pytest.raises(ValueError, match="without folders"):
        FileInfo("a/b", 1, "")
