"""Exported files that are not what they say: refused when a server starts, or harmless."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from mmtok_deploy import Budget, SelectionConfig, executors
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines import EngineError, check_graph
from mmtok_deploy.engines.tensorrt import TensorRTEngine, engine_tensors
from mmtok_deploy.executors import EngineExecutor, make_executor
from mmtok_deploy.manifest import ArtifactError, Check, Manifest, TensorInfo, describe_file
from mmtok_deploy.problem import SelectionProblem
from mmtok_export.artifact import export_model
from mmtok_export.selection_graph import build_selection
from mmtok_sglang.engine_file import EngineMismatchError, check_engine_file
from mmtok_sglang.families import FAMILIES
from mmtok_sglang.settings import Settings
from tests.exporters.graphs import SMALL_SPEC as SPEC
from tests.exporters.graphs import relabel
from tests.mmtok_deploy.problems import random_problem

CPU = torch.device("cpu")
FAMILY = FAMILIES["qwen2.5-vl"]
MODEL = SimpleNamespace(vision_config=SimpleNamespace(out_hidden_size=SPEC.vision_width, hidden_size=SPEC.keys_width))
CASE = random_problem(20, 3, [2])
EXPECTED = CASE.select(5).order.tolist()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "selection.onnx"
    export_model(build_selection(SPEC), path, "selection", SPEC)
    return path


@pytest.fixture
def file(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    for path in (exported, Manifest.path_of(exported)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / exported.name


def settings_for(file: Path, config: SelectionConfig = SPEC.config, **fields: Any) -> Settings:
    return Settings("qwen2.5-vl", Budget(tokens=5), config, "question", engine=file, **fields)


def start(settings: Settings) -> list[int]:
    """Returns what a server with these settings picks of a fixed image, if it starts."""
    check_engine_file(settings, FAMILY, MODEL, torch.float32)
    executor = make_executor("auto", CPU, settings.config, settings.engine, None, settings.engine_sha256)
    assert isinstance(executor, EngineExecutor)
    executor.check()
    problem = SelectionProblem(CASE.vision, CASE.keys, CASE.text, 5, CASE.excluded)
    picks: list[int] = executor.select([problem])[0].order.tolist()
    return picks


REFUSALS = (ArtifactError, EngineError, EngineMismatchError)


def assert_refused_or_harmless(file: Path) -> bool:
    """Returns whether the file was refused."""
    try:
        picks = start(settings_for(file))
    except REFUSALS:
        return True
    assert picks == EXPECTED
    return False


def test_a_file_that_is_what_it_says(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert start(settings_for(file)) == EXPECTED
    assert caplog.messages == []


def test_a_file_that_its_export_did_not_check_is_named(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    unchecked = replace(Manifest.load(file), check=Check("not run", "", "no NVIDIA GPU was at hand"))
    Manifest.path_of(file).write_text(unchecked.to_json())
    assert start(settings_for(file)) == EXPECTED
    assert "selection.onnx was not checked at export (no NVIDIA GPU was at hand)" in caplog.text


def test_the_pinned_file_starts_and_no_other(file: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pinned = sha256(file.read_bytes()).hexdigest()
    assert start(settings_for(file, engine_sha256=pinned)) == EXPECTED
    other = tmp_path_factory.mktemp("other") / "selection.onnx"
    export_model(build_selection(replace(SPEC, form="loop")), other, "selection", replace(SPEC, form="loop"))
    with pytest.raises(EngineMismatchError, match=rf"--mmtok-engine-sha256 names {pinned}: it is not the file"):
        start(settings_for(other, engine_sha256=pinned))
    # Put in the pinned one's place after the start's first look: the bytes that are loaded are what is held to the pin.
    with pytest.raises(ArtifactError, match=f"expected {pinned}: it is not the file that was pinned"):
        make_executor("auto", CPU, SPEC.config, other, None, pinned)


def test_what_is_hashed_is_what_is_loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Manifest.read_file

    def swap_after_reading(manifest: Manifest, path: Path, pinned: str | None = None) -> bytes:
        content = read(manifest, path, pinned)
        path.write_bytes(b"another file")
        return content

    monkeypatch.setattr(Manifest, "read_file", swap_after_reading)
    assert start(settings_for(file)) == EXPECTED


def test_a_file_of_other_constants_than_its_manifest_says_selects_otherwise(file: Path) -> None:
    changed = SelectionConfig(tv_temp=1.0, vv_temp=3.0, alpha=4.0)
    relabel(file, replace(Manifest.load(file), constants=changed))
    with pytest.raises(EngineError, match=r"does not select as the reference does .*: export it again"):
        start(settings_for(file, changed))


@pytest.mark.parametrize("broken", ["order", "kept", "excluded", "total", "text_mask"])
def test_a_file_that_selects_otherwise_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    executor = make_executor("auto", CPU, SPEC.config, file)
    assert isinstance(executor, EngineExecutor)
    run = executor._engine.run

    def run_broken(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if broken == "excluded":
            inputs |= {"excluded": torch.zeros_like(inputs["excluded"])}
        if broken == "text_mask":
            inputs |= {"text_mask": torch.ones_like(inputs["text_mask"])}
        outputs = run(inputs)
        if broken == "order":
            outputs["order"] = outputs["order"].flip(1)
        elif broken == "kept":
            outputs["kept"] = outputs["kept"].flip(1)
        elif broken == "total":
            outputs["total"] = outputs["total"] * 1.01
        return outputs

    monkeypatch.setattr(executor._engine, "run", run_broken)
    with pytest.raises(EngineError, match="does not select as the reference does"):
        executor.check()


def test_whatever_a_file_raises_names_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = make_executor("auto", CPU, SPEC.config, file)
    assert isinstance(executor, EngineExecutor)
    monkeypatch.setattr(executors, "_selection", lambda *args: 1 / 0)
    with pytest.raises(EngineError, match=r"selection\.onnx .* does not run: ZeroDivisionError"):
        executor.check()


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yields where every value stands in a manifest, objects and lists included."""
    if path:
        yield path
    if isinstance(value, dict):
        for name, each in value.items():
            yield from places(each, (*path, name))
    elif isinstance(value, list):
        for idx, each in enumerate(value):
            yield from places(each, (*path, idx))


ODD_VALUES = [None, True, -1, 0, 3, 1.5, 10**12, 10**30, "", "load", "../../etc/passwd", [], {}, ["B", "N"], {"a": 1}]


@pytest.mark.slow
def test_every_field_of_the_manifest(file: Path) -> None:
    path = Manifest.path_of(file)
    whole = json.loads(path.read_text())
    num_refused = num_harmless = 0
    for place in places(whole):
        for odd in [*ODD_VALUES, KeyError]:
            changed = copy.deepcopy(whole)
            parent: Any = changed
            for step in place[:-1]:
                parent = parent[step]
            if odd is KeyError:
                del parent[place[-1]]
            else:
                parent[place[-1]] = odd
            path.write_text(json.dumps(changed))
            is_refused = assert_refused_or_harmless(file)
            num_refused, num_harmless = num_refused + is_refused, num_harmless + (not is_refused)
    assert num_refused > 1000
    assert num_harmless > 10  # what it says of dates and versions


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_of_the_manifest(file: Path, seed: int) -> None:
    path = Manifest.path_of(file)
    whole, draw = path.read_bytes(), random.Random(seed)
    for _ in range(100):
        place = draw.randrange(len(whole))
        flipped = whole[place] ^ (1 << draw.randrange(8))
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        assert_refused_or_harmless(file)


def test_a_flipped_bit_of_the_file(file: Path) -> None:
    whole, draw = file.read_bytes(), random.Random(0)
    for _ in range(500):
        place = draw.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match="its checksum differs"):
            start(settings_for(file))


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_file_that_its_manifest_describes_and_that_is_no_graph(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    described = replace(Manifest.from_json(Manifest.path_of(file).read_text()), files=(describe_file(file),))
    Manifest.path_of(file).write_text(described.to_json())
    with pytest.raises(REFUSALS):
        start(settings_for(file))


class TestTensors:
    def test_another_graph_than_the_manifests(self, file: Path) -> None:
        other = replace(SPEC, num_tokens=DimRange.fixed(30), vision_width=4)
        path = file.with_name("other.onnx")
        export_model(build_selection(other), path, "selection", other)
        file.write_bytes(path.read_bytes())
        described = replace(Manifest.from_json(Manifest.path_of(file).read_text()), files=(describe_file(file),))
        Manifest.path_of(file).write_text(described.to_json())
        with pytest.raises(ArtifactError, match=r"selection\.onnx has vision as float32 .*4\], its manifest says"):
            start(settings_for(file))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors: tensors.pop("kept"), "has outputs"),
            (lambda tensors: tensors.update(more=TensorInfo("more", "bool", (1,))), "has outputs"),
            (lambda tensors: tensors.update(kept=TensorInfo("kept", "int32", ("", 5))), "kept as int32"),
            (lambda tensors: tensors.update(kept=TensorInfo("kept", "int64", ("", 6))), r"kept as int64 \[, 6\]"),
            (lambda tensors: tensors.update(kept=TensorInfo("kept", "int64", (5,))), r"kept as int64 \[5\]"),
            (lambda tensors: tensors.update(kept=TensorInfo("kept", "int64", (1, 5))), r"kept as int64 \[1, 5\]"),
        ],
    )
    def test_what_the_library_reports_is_held_against_the_manifest(self, file: Path, change: Any, message: str) -> None:
        manifest = Manifest.load(file)
        tensors = {tensor.name: tensor for tensor in manifest.outputs}
        check_graph(manifest, manifest.inputs, list(tensors.values()))
        change(tensors)
        with pytest.raises(ArtifactError, match=message):
            check_graph(manifest, manifest.inputs, list(tensors.values()))

    def test_a_tensorrt_engine(self, file: Path) -> None:
        """Its API, without a GPU."""
        manifest = Manifest.load(file)
        engine = StandInEngine(manifest)
        check_graph(manifest, *engine_tensors(engine))
        engine.dtypes["kept"] = "FP8"
        with pytest.raises(ArtifactError, match="kept is a FP8, which no exported file has"):
            engine_tensors(engine)

    def test_tensorrt_is_given_no_smaller_memory_than_it_writes(self, file: Path) -> None:
        manifest = Manifest.load(file)
        engine = object.__new__(TensorRTEngine)
        engine.manifest, engine._device = manifest, CPU
        engine._context = SimpleNamespace(
            set_input_shape=lambda name, shape: True, get_tensor_shape=lambda name: (1, 64), name="context"
        )
        inputs = {
            "vision": torch.zeros(1, 20, SPEC.vision_width),
            "keys": torch.zeros(1, 20, SPEC.keys_width),
            "text": torch.zeros(1, 3, SPEC.vision_width),
            "text_mask": torch.ones(1, 3, dtype=torch.bool),
            "excluded": torch.zeros(1, 20, dtype=torch.bool),
        }
        with pytest.raises(EngineError, match=r"TensorRT would write \w+ of shape \(1, 64\), its manifest says \(1, 5"):
            engine.run(inputs)


class StandInEngine:
    """What TensorRT's ICudaEngine says of its tensors."""

    NAMES: ClassVar = {"float32": "FLOAT", "int64": "INT64", "bool": "BOOL"}

    def __init__(self, manifest: Manifest) -> None:
        self._modes = [(each, "INPUT") for each in manifest.inputs] + [(each, "OUTPUT") for each in manifest.outputs]
        self._tensors = {each.name: (each, mode) for each, mode in self._modes}
        self.num_io_tensors = len(self._modes)
        self.dtypes = {name: self.NAMES[each.dtype] for name, (each, _) in self._tensors.items()}

    def get_tensor_name(self, idx: int) -> str:
        return self._modes[idx][0].name

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.dtypes[name])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self._tensors[name][0].shape]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=self._tensors[name][1])
