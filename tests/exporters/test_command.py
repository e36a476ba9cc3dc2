from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mmtok_deploy import SelectionConfig
from mmtok_deploy.cli import main
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines import open_engine
from mmtok_deploy.manifest import ArtifactError, Manifest
from mmtok_deploy.presets import PRESETS
from mmtok_export import artifact, command
from mmtok_export.check import estimated_seconds
from mmtok_export.tensorrt import build_engine
from tests.exporters.graphs import relabel

SMALL = ["--budget=4", "--tokens=16", "--text-tokens=3", "--vision-width=8", "--keys-width=6", "--dtype=float32"]


def export(*arguments: str) -> int:
    try:
        return main(["export", *arguments])
    except SystemExit as usage_error:
        return int(usage_error.code or 0)


def test_every_preset_has_the_widths_of_its_model() -> None:
    assert set(command._FEATURES) == set(PRESETS)


def test_selection_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "a.onnx"
    assert export("selection", *SMALL, f"--output={path}") == 0
    said = capsys.readouterr().out
    assert re.match(
        rf"{re.escape(str(path))}  \d\d kB, keeps 4 tokens, lazy; B 1, N 16, M 3\n  check passed: 8 picks", said
    )
    assert export("check", str(path)) == 0
    checked = capsys.readouterr().out
    assert said.startswith(checked)
    assert all(line.startswith("  next, ") for line in said.removeprefix(checked).splitlines())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_engine_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert export("selection", *SMALL, f"--output={tmp_path}/a.onnx", "--tensorrt", "--target=sm86") == 0
    engine = tmp_path / "a.sm86.rtx.engine"
    assert Manifest.load(engine).details["compute_capabilities"] == ["8.6"]
    assert export("check", str(engine)) == 1
    said = capsys.readouterr()
    assert "check not run: no NVIDIA GPU was at hand" in said.out
    assert "was not checked" in said.err


def test_constants_of_a_preset_and_of_flags(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    arguments = ["--budget=25%", "--tokens=16", "--preset=qwen2.5-vl", "--alpha=2", "--form=loop"]
    assert export("selection", *arguments, f"--output={path}") == 0
    manifest = Manifest.load(path)
    constants = manifest.constants
    assert (constants.tv_temp, constants.vv_temp, constants.alpha, constants.coverage) == (0.01, 0.2, 2, "multimodal")
    assert (manifest.budget, manifest.form) == (4, "loop")
    assert [(each.name, each.dtype, each.shape[-1]) for each in manifest.inputs[:3]] == [
        ("vision", "float16", 3584),
        ("keys", "float32", 1280),
        ("text", "float16", 3584),
    ]


def test_keys_of_the_projectors_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{keys}.onnx" for keys in ("input", "output")]
    for path in paths:
        arguments = ["--budget=4", "--tokens=16", "--preset=qwen2.5-vl", f"--keys={path.stem}", f"--output={path}"]
        assert export("selection", *arguments) == 0
    by_input, by_output = map(Manifest.load, paths)
    assert (by_input.key_source, by_output.key_source) == ("input", "output")
    # The tokens themselves, as the server has them.
    assert [(each.name, each.dtype, each.shape[-1]) for each in by_output.inputs[:2]] == [
        ("vision", "float16", 3584),
        ("keys", "float16", 3584),
    ]
    for wrong in ("--keys-width=6", "--keys-dtype=float32"):
        assert export("selection", "--budget=4", "--tokens=16", "--keys=output", wrong) == 2
        assert "compares the vision tokens themselves: drop --keys-width and --keys-dtype" in capsys.readouterr().err


def test_where_it_goes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--budget=4", "--tokens=8:16", "--vision-width=8", "--keys-width=6"]
    assert export("selection", *arguments) == 0
    assert sorted(path.name for path in (tmp_path / "artifacts/export").iterdir()) == [
        "selection-llava-1.5-n8-16-k4.onnx",
        "selection-llava-1.5-n8-16-k4.onnx.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget=20"], "keeps 20 tokens needs images of at least as many, got 16"),
        (["--budget=all"], "a budget of all tokens needs no selection"),
        (["--budget=-4"], "budget '-4' is not understood"),
        (["--tokens=16:8"], "MIN <= OPTIMUM <= MAX, got 16:8:8"),
        (["--text-tokens=0"], "1 <= MIN"),
        (["--tv-temp=0"], "tv_temp is a positive number, got 0.0"),
        (["--target=8.6"], "--target is for an engine: add --tensorrt"),
        (["--tensorrt", "--target=x"], "a compute capability is written 8.6 or sm86, got 'x'"),
        (["--tensorrt", "--target=10.0"], "no engines for compute capability 10.0"),
        (["--tensorrt", "--target=7.5"], "no engines for compute capability 7.5 (for 7.5 it multiplies no float32"),
        (["--tensorrt=tensorrt-rtx", "--target=9.0"], "no engines for compute capability 9.0"),
        (["--tensorrt=tensorrt", "--target=8.6"], "TensorRT builds for the GPU at hand alone, not for 8.6"),
        (["--tensorrt", "--target=8.6", "--tokens=4000", "--budget=4000"], "TensorRT keeps at most 3840 tokens"),
        (["--plugin=a.so"], "--plugin is for an engine: add --tensorrt"),
        (["--tensorrt", "--target=8.6", "--plugin=a.so"], "--plugin a.so does not exist"),
        (["--vision-width=0"], "--vision-width: expected a number of at least 1, got '0'"),
        (["--keys-width=x"], "--keys-width: expected a number of at least 1, got 'x'"),
        (["--output=a.json"], "--output is a file that ends with .onnx, or a folder that ends with /, got a.json"),
        (["--form=unrolled", "--budget-input"], "the unrolled form writes out a fixed number of picks"),
        (["--tensorrt", "--target=8.6", "--budget-input"], "an engine makes a fixed number of picks"),
        (["--form=scan"], "invalid choice"),
    ],
)
def test_usage_errors_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("selection", *SMALL, f"--output={tmp_path}/a.onnx", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("selection", *SMALL, f"--output={exported}") == 2
    assert "is there already: choose another --output, or --force to replace it" in capsys.readouterr().err
    assert export("selection", *SMALL, f"--output={exported}", "--force") == 0


def test_check_refuses_a_file_that_changed(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported.write_bytes(exported.read_bytes() + b"x")
    assert export("check", str(exported)) == 2
    assert "export it again" in capsys.readouterr().err


def test_a_renamed_file_is_known(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = exported.rename(exported.with_name("other.onnx"))
    assert export("check", str(renamed)) == 2
    assert re.search(
        r"other\.onnx\.json is not there.*exported as selection\.onnx: budget 5, form lazy, constants",
        capsys.readouterr().err,
    )
    Manifest.path_of(exported).rename(Manifest.path_of(renamed))
    assert export("check", str(renamed)) == 2
    assert re.search(
        r"describes selection\.onnx, not other\.onnx.*exported as selection\.onnx", capsys.readouterr().err
    )


def test_check_finds_a_wrong_answer(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.load(exported)
    relabel(exported, replace(manifest, constants=SelectionConfig(vv_temp=0.9)))
    assert export("check", str(exported)) == 1
    assert re.search(r"mmtok export: (pick|coverage|total)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 7}, r"budget is 7, and kept is \['B', 5\]"),
        ({"form": "loop"}, "has mmtok.form lazy, its manifest says loop"),
        ({"constants": {"tv_temp": 0.5, "vv_temp": 0.2, "alpha": 0.5, "coverage": "text"}}, "has mmtok.constants"),
        ({"dimensions": {"B": [1, 1, 9], "N": [5, 20, 40], "M": [1, 3, 9]}}, "has mmtok.contract_sha256"),
        ({"inputs": {"text": "float16"}}, "has text as float32 .* manifest says float16"),
        ({"outputs": {"total": ["M"]}}, "has mmtok.contract_sha256"),
    ],
)
def test_a_manifest_that_is_not_the_graphs_is_refused_by_whatever_loads_it(
    exported: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    path = Manifest.path_of(exported)
    values = json.loads(path.read_text())
    for name, new in change.items():
        if name == "dimensions":
            values[name] = {
                key: dict(zip(("minimum", "optimum", "maximum"), sizes, strict=True)) for key, sizes in new.items()
            }
        elif name == "inputs":
            for tensor in values[name]:
                tensor["dtype"] = new.get(tensor["name"], tensor["dtype"])
        elif name == "outputs":
            for tensor in values[name]:
                tensor["shape"] = new.get(tensor["name"], tensor["shape"])
        else:
            values[name] = new
    path.write_text(json.dumps(values))
    assert export("check", str(exported)) == 2
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(ArtifactError, match=message):
        open_engine(exported, torch.device("cpu"))
    with pytest.raises(ArtifactError, match=message):
        build_engine(exported, exported.with_name("a.engine"), "tensorrt-rtx", ["8.6"])


def test_features_of_ones_own(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    widths = {name: int(Manifest.load(exported).input(name).shape[-1]) for name in ("vision", "keys", "text")}
    sizes = {"vision": 20, "keys": 20, "text": 3}
    own: dict[str, Any] = {
        name: rng.standard_normal((2, sizes[name], width), dtype=np.float32) for name, width in widths.items()
    }
    np.savez(tmp_path / "own.npz", **own)
    assert export("check", str(exported), f"--features={tmp_path}/own.npz") == 0
    assert "check passed: of the given features, 10 picks compared" in capsys.readouterr().out
    np.savez(tmp_path / "own.npz", **{**own, "more": own["text"]})
    assert export("check", str(exported), f"--features={tmp_path}/own.npz") == 2
    assert (
        "--features holds vision, keys, text, more: expected keys, text, vision; excluded, text_mask may be given"
        in capsys.readouterr().err
    )
    np.savez(tmp_path / "own.npz", **{**own, "text": own["text"].astype(np.float64) + 1e-12})
    assert export("check", str(exported), f"--features={tmp_path}/own.npz") == 2
    assert "text is torch.float64, and the file takes float32" in capsys.readouterr().err
    spoilt = own["keys"].copy()
    spoilt[0, 0, 0] = np.nan
    np.savez(tmp_path / "own.npz", **{**own, "keys": spoilt})
    assert export("check", str(exported), f"--features={tmp_path}/own.npz") == 2
    assert "keys has values that are not finite" in capsys.readouterr().err
    (tmp_path / "own.npz").write_text("nothing")
    assert export("check", str(exported), f"--features={tmp_path}/own.npz") == 2
    assert "own.npz is no .npz with an array for" in capsys.readouterr().err


def test_a_manifest_of_another_kind(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Manifest.path_of(exported)
    path.write_text(path.read_text().replace('"kind": "selection"', '"kind": "encoder"'))
    assert export("check", str(exported)) == 2
    assert 'says the kind "encoder", and does not name the features of an encoder' in capsys.readouterr().err


def test_skip_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("selection", *SMALL, f"--output={tmp_path}/a.onnx", "--skip-check") == 0
    assert "check not run: --skip-check" in capsys.readouterr().out
    assert Manifest.load(tmp_path / "a.onnx").check.status == "not run"


def test_a_long_check_says_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(artifact, "_SECONDS_WITHOUT_A_WORD", -1)
    assert export("selection", *SMALL, f"--output={tmp_path}/a.onnx") == 0
    assert re.search(r"the check takes about \d+ s on this machine; --skip-check", capsys.readouterr().err)


def test_a_large_graph_is_estimated_larger(exported: Path) -> None:
    manifest = Manifest.load(exported)
    large = replace(manifest, dimensions=manifest.dimensions | {"N": DimRange.fixed(16384)})
    assert estimated_seconds(manifest) < 1
    assert estimated_seconds(large) > 20


def test_a_folder_as_output_means_a_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for output in ("there", "there/", "new/"):
        assert export("selection", *SMALL, f"--output={tmp_path}/{output}", "--force") == 0
        assert (tmp_path / output / "selection-llava-1.5-n16-k4.onnx").is_file()


def test_a_link_to_nowhere(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "link.onnx"
    link.symlink_to("nowhere.onnx")
    assert export("selection", *SMALL, f"--output={link}", "--force") == 2
    assert "link.onnx is a link to nowhere.onnx, which is not there: remove the link" in capsys.readouterr().err
    assert link.is_symlink()
    assert export("check", str(link)) == 2
    assert "link.onnx does not exist (it is a link to nowhere.onnx)" in capsys.readouterr().err


def test_a_folder_is_not_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("check", str(tmp_path)) == 2
    assert "is a folder: name the file in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\n you tried"),
            "out of memory .*fewer",
        ),
        (MemoryError(), "out of memory"),
        (DecodeError("Error parsing message"), "protobuf refuses it .* 2 GiB"),
        (onnx.checker.ValidationError("field 'x'\nnot set"), r"(onnx.*|protobuf).*not set"),
        (RuntimeError("something else\nand more"), r"RuntimeError: something else and more$"),
    ],
)
def test_a_librarys_error_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(command, "_selection", fail)
    assert export("selection", *SMALL) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)


def test_a_mistake_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("no such key")

    monkeypatch.setattr(command, "_selection", fail)
    with pytest.raises(KeyError):
        export("selection", *SMALL)


@pytest.mark.parametrize("arguments", [["--help"], ["selection", "--budget=x"], ["check"]])
def test_help_and_wrong_arguments_do_not_wait_for_libraries(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom mmtok_deploy.cli import main\n"
        f"try: main(['export', *{arguments}])\nfinally: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    loaded = set(done.stdout.split())
    assert "mmtok_export.arguments" in loaded
    assert not loaded & {"torch", "onnx", "onnxruntime", "transformers", "numpy"}


def test_interrupted_while_libraries_are_imported(tmp_path: Path) -> None:
    # A stand-in for PyTorch is imported for as long as the test wants.
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "mmtok_deploy", "export", "selection", *SMALL, f"--output={tmp_path}/a.onnx"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        # A shell's background jobs ignore SIGINT, and hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines() == ["mmtok export: interrupted; no incomplete file is left"]


def test_a_library_that_is_not_installed(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mmtok_export.check", None)
    assert export("check", str(exported)) == 1
    assert "pip install 'mmtok-deploy[export]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "missing.onnx"], "missing.onnx does not exist"),
        (["engine", "."], ". is a folder: name the file in it"),
        (["engine", "empty.onnx"], "empty.onnx.json is not there"),
        (["triton", "missing.onnx", "--repository=models"], "missing.onnx does not exist"),
        (["attach", "--onnx=missing.onnx", "--vision=x", "--budget=4"], "missing.onnx does not exist"),
        (["attach", "--onnx=empty.onnx", "--vision=x", "--budget=4"], "name a --preset"),
        (
            ["attach", "--onnx=empty.onnx", "--vision=x", "--budget=4", "--preset=qwen2-vl", "--target=8.6"],
            "for an engine",
        ),
        (["attach", "--onnx=empty.onnx", "--vision=x", "--budget=all", "--preset=qwen2-vl"], "needs no selection"),
        (
            ["encoder", "--model=missing", "--budget=4"],
            "expected a Hugging Face checkpoint directory, and missing has no",
        ),
        (["encoder", "--model=model", "--budget=4", "--image-size=30x28"], "width and height are multiples of 28 px"),
        (["encoder", "--model=llava", "--budget=4", "--image-size=30x28"], "takes images of 336x336, got 30x28"),
        (["encoder", "--model=llava", "--budget=4", "--tokens=4:8"], "can be made of qwen2-vl, .*, got llava-1.5"),
        (["encoder", "--model=model", "--budget=4", "--alpha=-1"], "alpha is a number of at least 0, got -1.0"),
        (["encoder", "--model=model", "--budget=4", "--output=empty.onnx"], "empty.onnx is there already"),
        (["encoder", "--model=model", "--budget=9", "--tokens=4:8"], "keeps 9 tokens needs images of at least as many"),
        (["selection", "--budget=4", "--vv-temp=nan"], "vv_temp is a positive number, got nan"),
        (["selection", "--budget=4", "--tensorrt", "--target=9.9"], "no engines for compute capability 9.9"),
        (["selection", "--budget=4", "--plugin=a.so"], "--plugin is for an engine: add --tensorrt"),
        (["selection", "--budget=4", "--output=empty.onnx"], "empty.onnx is there already"),
        (["selection", "--budget=4", "--output=empty.onnx/a.onnx"], "empty.onnx is no folder: choose another --output"),
        (["selection", "--budget=4", "--output=nowhere/a.onnx"], "nowhere is no folder: choose another --output"),
    ],
)
def test_wrong_inputs_and_options_are_told_before_libraries_are_imported(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "model").mkdir()
    vision = {"patch_size": 14, "spatial_merge_size": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vision_config": vision}))
    (tmp_path / "llava").mkdir()
    config = {"model_type": "llava", "vision_config": {"image_size": 336}}
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    program = (
        "import sys; from mmtok_deploy.cli import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "export", *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["2", "False"]
    assert re.search(message, ended.stderr)


def test_a_folder_that_takes_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert export("selection", *SMALL, "--output=/proc/a.onnx") == 2
    assert re.search(r"no file (can|may) be written in /proc\b.*: choose another --output", capsys.readouterr().err)


def test_a_file_of_another_exporter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "a.onnx")
    assert export("check", f"{tmp_path}/a.onnx") == 2
    assert "The graph was not exported by mmtok; `mmtok export attach` adds a selection" in capsys.readouterr().err


def test_too_little_memory_for_the_libraries(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmtok_deploy", "export", "selection", *SMALL, f"--output={tmp_path}/a.onnx"]
    ended = subprocess.run(
        ["bash", "-c", f"ulimit -v 1500000; exec {shlex.join(command)}"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert re.fullmatch(r"mmtok export: a library cannot be loaded, often for lack of memory.*\n", ended.stderr)
