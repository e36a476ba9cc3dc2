from __future__ import annotations

import json
import os
import re
import resource
import signal
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

from mmtok_deploy import SelectionConfig
from mmtok_deploy.cli import main
from mmtok_deploy.manifest import Manifest
from mmtok_export import artifact
from mmtok_export.artifact import export_model
from mmtok_export.check import CheckFailedError
from mmtok_export.new_artifact import new_artifact
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import SelectionSpec


def test_a_file_and_its_manifest_and_nothing_else(exported: Path, spec: SelectionSpec) -> None:
    assert sorted(path.name for path in exported.parent.iterdir()) == ["selection.onnx", "selection.onnx.json"]
    manifest = Manifest.load(exported)
    assert (manifest.kind, manifest.format, manifest.budget, manifest.form) == ("selection", "onnx", 5, "lazy")
    assert manifest.constants == spec.config
    assert manifest.dimensions == {"B": spec.batch, "N": spec.num_tokens, "M": spec.num_words}
    assert manifest.check.status == "passed"
    assert re.fullmatch(r"\d\d picks compared, all equal", manifest.check.detail)
    assert manifest.requires == {"onnx opset": "20", "onnx ir version": "10", "onnxruntime": "1.18"}
    metadata = onnxruntime.InferenceSession(exported).get_modelmeta().custom_metadata_map
    assert metadata == manifest.metadata()
    assert (metadata["mmtok.file"], metadata["mmtok.budget"]) == ("selection.onnx", "5")
    assert json.loads(Manifest.path_of(exported).read_text())["schema"] == 2


def test_large_weights_stand_beside_the_graph(
    exported: Path, spec: SelectionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "_MAX_INLINE_BYTES", 0)
    path = exported.with_name("large.onnx")
    manifest = export_model(build_selection(spec), path, "selection", spec)
    assert manifest.check.status == "passed"
    assert [file.name for file in manifest.files] == ["large.onnx", "large.onnx.data"]
    Manifest.load(path)


def test_what_is_there_stays_unless_forced(exported: Path, spec: SelectionSpec) -> None:
    before = exported.read_bytes()
    other = replace(spec, budget=4)
    with pytest.raises(FileExistsError, match=r"selection\.onnx is there already: .*--force"):
        export_model(build_selection(other), exported, "selection", other)
    assert exported.read_bytes() == before
    export_model(build_selection(other), exported, "selection", other, force=True)
    assert Manifest.load(exported).budget == 4


def test_what_another_export_wrote_meanwhile_stays_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with pytest.raises(FileExistsError, match="--force"), new_artifact(path, force=False) as late:  # noqa: PT012
        late.write_text("late")
        with new_artifact(path, force=False) as early:
            early.write_text("early")
    assert path.read_text() == "early"
    assert list(tmp_path.iterdir()) == [path]
    with new_artifact(path, force=True) as forced:
        forced.write_text("forced")
    assert path.read_text() == "forced"


def test_weights_of_another_file_are_not_overwritten(spec: SelectionSpec, tmp_path: Path) -> None:
    weights = tmp_path / "a.onnx.data"
    weights.write_bytes(b"somebody's")
    with pytest.raises(FileExistsError, match=r"a\.onnx\.data is there already"):
        export_model(build_selection(spec), tmp_path / "a.onnx", "selection", spec)
    export_model(build_selection(spec), tmp_path / "a.onnx", "selection", spec, force=True)
    assert not weights.exists()


def test_a_folder_is_no_output(spec: SelectionSpec, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is a folder: name a file"):
        export_model(build_selection(spec), tmp_path, "selection", spec, force=True)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_alone_is_not_overwritten(exported: Path, spec: SelectionSpec) -> None:
    exported.unlink()
    with pytest.raises(FileExistsError, match=r"selection\.onnx\.json is there already"):
        export_model(build_selection(spec), exported, "selection", spec)


def test_a_graph_that_answers_otherwise_is_not_written(spec: SelectionSpec, tmp_path: Path) -> None:
    # The manifest promises another temperature than the graph has.
    promised = replace(spec, config=SelectionConfig(vv_temp=0.9))
    with pytest.raises(CheckFailedError, match=r"pick \d is token \d+, which gains|coverage differs"):
        export_model(build_selection(spec), tmp_path / "new" / "wrong.onnx", "selection", promised)
    assert list((tmp_path / "new").iterdir()) == []


def test_whatever_happens_nothing_half_written_is_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_artifact(tmp_path / "a.onnx", force=False) as file:  # noqa: PT012
        file.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_has_left_goes_at_the_next_start(tmp_path: Path) -> None:
    process_id = os.fork()
    if process_id == 0:
        try:
            with new_artifact(tmp_path / "a.onnx", force=False) as file:
                file.write_text("gigabytes")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # a failed test must not go on in the copy of its process
    os.waitpid(process_id, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with new_artifact(tmp_path / "b.onnx", force=False) as file:
        # One that is being written stays.
        with new_artifact(tmp_path / "c.onnx", force=False) as other:
            other.write_text("c")
        file.write_text("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.onnx", "c.onnx"]


def test_no_space_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A limit on the size of files stands for a full disk: writing fails half-way, as it would there.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        assert main(["export", "selection", "--budget=4", "--tokens=16", f"--output={tmp_path}/a.onnx"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert "File too large" in said
    assert "free some space" in said
    assert list(tmp_path.iterdir()) == []
