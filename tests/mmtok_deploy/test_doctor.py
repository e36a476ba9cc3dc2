from __future__ import annotations

import contextlib
import io
import json
from importlib import metadata
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtok_bench.server import cpu_environment
from mmtok_deploy import __version__, doctor
from mmtok_deploy.cli import main
from mmtok_deploy.presets import PRESETS
from mmtok_sglang.plugin import SUPPORTED_SGLANG
from tests.preloaded_server import Templates

VARIABLES = ("SGLANG_PLUGINS", "SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE")
NO_ACCELERATOR = pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without an accelerator")


def run(*flags: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["doctor", *flags])
    return code, printed.getvalue()


def checks_of(printed: str) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(printed)["checks"]}


def run_checks() -> tuple[int, dict[str, dict[str, str]]]:
    code, printed = run("--json")
    return code, checks_of(printed)


@pytest.fixture(scope="module")
def real(templates: Templates | None) -> tuple[int, str]:
    """One run that loads the plugin in a process of its own; the other tests are about the rest."""

    def run_preloaded(command: list[str], *, env: dict[str, str], **_: Any) -> CompletedProcess[str]:
        assert templates is not None
        return templates.of(cpu_environment()).run(command[1:], env)

    with pytest.MonkeyPatch.context() as monkeypatch:
        if templates is not None:
            monkeypatch.setattr("mmtok_deploy.doctor.subprocess.run", run_preloaded)
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        return run("--json")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which both entry points load and no variable is set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_probe_entry_points", dict)
    monkeypatch.setattr(doctor, "_NVIDIA_DRIVER", Path("/no/driver"))
    monkeypatch.setenv("COLUMNS", "100")
    return monkeypatch


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real_version = doctor._installed_version

    def installed_version(distribution: str) -> str | None:
        name = distribution.replace("-", "_")
        return versions[name] if name in versions else real_version(distribution)

    monkeypatch.setattr(doctor, "_installed_version", installed_version)


@pytest.mark.slow
def test_this_machine_serves(real: tuple[int, str]) -> None:
    code, printed = real
    assert [check for check in checks_of(printed).values() if check["status"] == "failed"] == []
    assert code == 0


@pytest.mark.slow
def test_json_schema(real: tuple[int, str]) -> None:
    report: dict[str, Any] = json.loads(real[1])
    assert list(report) == ["schema", "serving", "families", "checks"]
    assert report["schema"] == 1
    assert report["serving"] is True
    assert report["families"] == list(PRESETS)
    for check in report["checks"]:
        assert list(check) == ["section", "name", "status", "found", "fix"]
        assert check["status"] in ("ok", "warning", "optional", "failed")
        assert check["found"]
        assert bool(check["fix"]) is (check["status"] != "ok")
    names = [check["name"] for check in report["checks"]]
    assert len(set(names)) == len(names)
    assert {
        "Python", "mmtok-deploy", "PyTorch", "SGLang", "plugin mmtok", "platform torch_cpu",
        *VARIABLES, "reference on cpu", "extra bench", "extra export", "extra tensorrt-rtx",
        "extra tensorrt",
    } < set(names)  # fmt: skip


@pytest.mark.slow
def test_what_is_found(real: tuple[int, str]) -> None:
    checks = checks_of(real[1])
    assert checks["mmtok-deploy"]["found"] == __version__
    assert checks["PyTorch"]["found"].startswith(torch.__version__)
    assert checks["SGLang"]["found"] == SUPPORTED_SGLANG
    assert checks["plugin mmtok"]["found"] == "registered, loads"
    assert checks["platform torch_cpu"]["found"] == "registered, loads"
    assert checks["reference on cpu"]["found"] == "picks [3, 0, 1] of 6 tokens, as it should"


@NO_ACCELERATOR
def test_the_cpu_is_named_where_it_serves(quick: pytest.MonkeyPatch) -> None:
    cpu = run_checks()[1]["cpu"]
    assert (cpu["status"], "torch_cpu" in cpu["found"]) == ("ok", True)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_reference_runs_on_each_cuda_device(real: tuple[int, str]) -> None:
    checks = checks_of(real[1])
    for idx in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(idx) in checks[f"cuda:{idx}"]["found"]
        assert checks[f"reference on cuda:{idx}"]["status"] == "ok"


def test_the_supported_version_is_the_one_that_the_extra_installs() -> None:
    required = metadata.requires("mmtok-deploy") or []
    assert any(line.startswith(f"sglang=={SUPPORTED_SGLANG};") for line in required)


def test_the_table(quick: pytest.MonkeyPatch) -> None:
    code, printed = run()
    assert code == 0
    assert "What SGLang needs to serve with a budget is here, and works." in printed
    assert f"Model families: {', '.join(PRESETS)}" in " ".join(printed.split())  # which may be wrapped
    assert max(len(line) for line in printed.splitlines()) <= 100


@pytest.mark.parametrize(
    ("version", "found", "fix"),
    [
        ("0.5.20", f"0.5.20, but the plugin supports {SUPPORTED_SGLANG}", f"pip install 'sglang=={SUPPORTED_SGLANG}'"),
        (None, "not installed", "pip install 'mmtok-deploy[sglang]'"),
    ],
)
def test_sglang_is_missing_or_another_version(
    version: str | None, found: str, fix: str, quick: pytest.MonkeyPatch
) -> None:
    install(quick, sglang=version)
    code, checks = run_checks()
    assert code == 1
    assert checks["SGLang"] == {"section": "SGLang", "name": "SGLang", "status": "failed", "found": found, "fix": fix}
    assert checks["plugin mmtok"]["status"] == "warning"
    code, printed = run()
    assert code == 1
    assert f"-> {fix}" in printed
    assert "Failed: SGLang." in printed


def test_the_package_is_not_installed(quick: pytest.MonkeyPatch) -> None:
    install(quick, mmtok_deploy=None)
    code, checks = run_checks()
    assert code == 1
    assert checks["mmtok-deploy"]["status"] == "failed"
    assert "pip install -e ." in checks["mmtok-deploy"]["fix"]
    assert checks["extra export"]["status"] == "optional"


def test_the_package_was_installed_at_another_version(quick: pytest.MonkeyPatch) -> None:
    install(quick, mmtok_deploy="0.0.1")
    code, checks = run_checks()
    assert code == 0
    assert checks["mmtok-deploy"]["status"] == "warning"


def test_python_is_too_old(quick: pytest.MonkeyPatch) -> None:
    quick.setattr("platform.python_version", lambda: "3.10.14")
    code, checks = run_checks()
    assert code == 1
    assert checks["Python"]["status"] == "failed"


def test_an_extra_is_missing(quick: pytest.MonkeyPatch) -> None:
    install(quick, openai=None, plotly=None)
    code, checks = run_checks()
    assert code == 0
    assert checks["extra bench"]["status"] == "optional"
    assert checks["extra bench"]["found"].endswith("missing: openai, plotly")
    assert checks["extra bench"]["fix"] == "pip install 'mmtok-deploy[bench]'"


def test_an_extra_is_installed(quick: pytest.MonkeyPatch) -> None:
    versions = {"onnx": "1.19.0", "onnxruntime": "1.22.0", "onnxscript": "0.5.0", "scikit-image": "0.26.0"}
    versions["transformers"] = "5.10.0"
    install(quick, **versions)
    export = run_checks()[1]["extra export"]
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    assert (export["status"], export["found"]) == ("ok", found)


@pytest.mark.parametrize(
    ("variable", "value", "status", "said"),
    [
        ("SGLANG_PLUGINS", "other", "failed", "export SGLANG_PLUGINS=other,mmtok"),
        ("SGLANG_PLUGINS", ",", "failed", "export SGLANG_PLUGINS=mmtok"),
        ("SGLANG_PLUGINS", "mmtok,torch_cpu", "ok", ""),
        ("SGLANG_PLATFORM", "other", "failed", "unset SGLANG_PLATFORM"),
        ("SGLANG_USE_CPU_ENGINE", "1", "failed", "unset SGLANG_USE_CPU_ENGINE"),
    ],
)
def test_variables(variable: str, value: str, status: str, said: str, quick: pytest.MonkeyPatch) -> None:
    quick.setenv(variable, value)
    code, checks = run_checks()
    assert code == (1 if status == "failed" else 0)
    assert checks[variable]["status"] == status
    assert said in checks[variable]["fix"]
    assert [name for name in VARIABLES if checks[name]["found"] != "not set"] == [variable]


@NO_ACCELERATOR
def test_the_list_of_plugins_must_name_the_platform_too_without_an_accelerator(quick: pytest.MonkeyPatch) -> None:
    quick.setenv("SGLANG_PLUGINS", "mmtok")
    code, checks = run_checks()
    assert code == 1
    assert checks["SGLANG_PLUGINS"]["found"] == "mmtok: switches torch_cpu off"
    quick.setenv("SGLANG_PLATFORM", "torch_cpu")
    assert run()[0] == 0


def test_the_platform_asked_for(quick: pytest.MonkeyPatch) -> None:
    quick.setenv("SGLANG_PLATFORM", "torch_cpu")
    quick.setattr("torch.accelerator.is_available", lambda: False)
    assert run_checks()[1]["SGLANG_PLATFORM"]["status"] == "ok"
    quick.setattr("torch.accelerator.is_available", lambda: True)
    quick.setattr("torch.cuda.is_available", lambda: False)
    code, checks = run_checks()
    assert code == 0
    assert checks["SGLANG_PLATFORM"]["status"] == "warning"
    assert checks["cpu"]["status"] == "warning"


@NO_ACCELERATOR
def test_a_driver_without_a_gpu(quick: pytest.MonkeyPatch) -> None:
    quick.setattr(doctor, "_NVIDIA_DRIVER", Path(__file__))
    code, checks = run_checks()
    assert code == 0
    assert checks["cpu"]["status"] == "warning"


@NO_ACCELERATOR
def test_a_gpu_that_does_not_compute(quick: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA RTX A6000", major=8, minor=6, total_memory=48 * 2**30)
    quick.setattr("torch.cuda.is_available", lambda: True)
    quick.setattr("torch.cuda.device_count", lambda: 1)
    quick.setattr("torch.cuda.get_device_properties", lambda idx: gpu)
    code, checks = run_checks()
    assert code == 1
    assert checks["cuda:0"]["found"] == "NVIDIA RTX A6000, compute capability 8.6, 48.0 GiB"
    assert "cpu" not in checks
    assert checks["reference on cpu"]["status"] == "ok"
    assert checks["reference on cuda:0"]["status"] == "failed"
    assert "\n" not in checks["reference on cuda:0"]["found"]


def test_a_wrong_selection(quick: pytest.MonkeyPatch) -> None:
    quick.setattr(doctor, "select_tokens", lambda *_, **__: SimpleNamespace(order=torch.tensor([0, 1, 2])))
    code, checks = run_checks()
    assert code == 1
    assert checks["reference on cpu"]["found"] == "picks [0, 1, 2] of 6 tokens, not [3, 0, 1]"


def test_an_entry_point_does_not_load(quick: pytest.MonkeyPatch) -> None:
    quick.setattr(doctor, "_probe_entry_points", lambda: {"mmtok": "ImportError: no such module"})
    code, checks = run_checks()
    assert code == 1
    assert checks["plugin mmtok"]["found"] == "registered, does not load: ImportError: no such module"
    assert checks["platform torch_cpu"]["status"] == "ok"


def test_an_entry_point_is_not_registered(quick: pytest.MonkeyPatch) -> None:
    quick.setattr(doctor, "_GROUPS", {"mmtok": "sglang.srt.no_such_group"})
    code, checks = run_checks()
    assert code == 1
    assert [check["found"] for check in checks.values() if check["status"] == "failed"] == [
        "not in sglang.srt.no_such_group: SGLang does not find it"
    ]


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("print('noise'); print('{}')", None),
        ("raise OSError('libcuda')", "exit code 1: OSError: libcuda"),
        ("import time; time.sleep(60)", "still loading after 1 s"),
    ],
)
def test_the_probe(script: str, error: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", script)
    # The limit is short for the script that never ends alone: the others may take a while to start.
    monkeypatch.setattr(doctor, "_PROBE_LIMIT_S", 1 if "sleep" in script else 60)
    assert doctor._probe_entry_points() == ({"mmtok": error, "torch_cpu": error} if error else {})


def test_the_probe_is_free_of_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "other")
    script = "import json, os; print(json.dumps({'platform': os.environ.get('SGLANG_PLATFORM', 'unset')}))"
    monkeypatch.setattr(doctor, "_PROBE", script)
    assert doctor._probe_entry_points() == {"platform": "unset"}
