"""`mmtok doctor`: what is installed, what works on this machine, and what to do about the rest."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mmtok_deploy import __version__, select_tokens
from mmtok_deploy.environment import sglang_platform, sglang_plugins, use_cpu_engine, without_sglang_choices
from mmtok_deploy.presets import PRESETS

__all__ = ["Check", "Status", "run_doctor"]

Status = Literal["ok", "warning", "optional", "failed"]

_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "optional": "cyan", "failed": "bold red"}
_PLUGIN = "mmtok"
_PLATFORM = "torch_cpu"
_GROUPS = {_PLUGIN: "sglang.srt.plugins", _PLATFORM: "sglang.srt.platforms"}
_EXTRAS = {
    "bench": "for mmtok demo and the benchmarks",
    "export": "for mmtok export, and ONNX files in a server",
    "tensorrt-rtx": "for engines of RTX GPUs",
    "tensorrt": "for engines of datacenter GPUs",
}
_REINSTALL = "install mmtok-deploy again; in a checkout: pip install -e ."
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_PROBE_LIMIT_S = 180

# Loads and calls the entry points as a server does, but keeps the errors, which SGLang only logs.
_PROBE = """
import json, sys
from importlib.metadata import entry_points
errors = {}
for name, group in json.loads(sys.argv[1]).items():
    for point in entry_points(group=group, name=name):
        try:
            point.load()()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
print(json.dumps(errors))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Args:
        name: What was checked; unique.
        status: "failed" prevents serving with a budget; "optional" is not installed, and not needed to serve.
        found: What was found.
        fix: What to do about it; empty if nothing.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def run_doctor(*, json_output: bool = False) -> int:
    """Returns 0 if SGLang can serve with a budget here, 1 if a check failed; prints what was found and what to do.

    Args:
        json_output: Print one JSON object instead of the table; a later version may add fields, not change these:
            `schema`: 1.
            `serving`: bool, no check failed.
            `families`: list of str, the model families supported.
            `checks`: list of objects with a `section` and the fields of Check, all of them strings: `name`, `status`
            ("ok", "warning", "optional", "failed"), `found`, `fix`. The names: "Python", "mmtok-deploy", "PyTorch",
            "SGLang", "plugin mmtok", "platform torch_cpu", "SGLANG_PLUGINS", "SGLANG_PLATFORM",
            "SGLANG_USE_CPU_ENGINE", "extra bench", "extra export", "extra tensorrt-rtx", "extra tensorrt"; a device
            is "cuda:0", ... (or "cpu", if there is none), and the selection tried on it "reference on cpu",
            "reference on cuda:0", ...
    """
    with Console(stderr=True).status("Looking at this machine; loading the plugin takes a while"):
        sections = _run_checks()
    failed = [check.name for checks in sections.values() for check in checks if check.status == "failed"]
    if json_output:
        rows = [{"section": section, **asdict(check)} for section, checks in sections.items() for check in checks]
        print(json.dumps({"schema": 1, "serving": not failed, "families": list(PRESETS), "checks": rows}, indent=2))
    else:
        _print_table(sections, failed)
    return 1 if failed else 0


def _run_checks() -> dict[str, list[Check]]:
    sglang = _check_sglang()
    devices = [torch.device("cpu"), *(torch.device("cuda", idx) for idx in range(_num_cuda_devices()))]
    return {
        "Installed": [_check_python(), _check_mmtok_deploy(), _check_torch()],
        "Devices": _check_devices(),
        "SGLang": [sglang, *_check_entry_points(sglang.status == "ok")],
        "Environment": [_check_plugins_variable(), _check_platform_variable(), _check_cpu_engine_variable()],
        "Selection": [_check_reference(device) for device in devices],
        "Optional": [_check_extra(extra, purpose) for extra, purpose in _EXTRAS.items()],
    }


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _check_python() -> Check:
    version = platform.python_version()
    if tuple(map(int, version.split(".")[:2])) < (3, 11):
        return Check("Python", "failed", version, "make a new environment with Python 3.11 or newer")
    return Check("Python", "ok", version)


def _check_mmtok_deploy() -> Check:
    installed = _installed_version("mmtok-deploy")
    if installed is None:
        found = f"{__version__}, not installed: SGLang cannot find its plugin"
        return Check("mmtok-deploy", "failed", found, _REINSTALL)
    if installed != __version__:
        return Check("mmtok-deploy", "warning", f"{__version__}, installed as {installed}", _REINSTALL)
    return Check("mmtok-deploy", "ok", __version__)


def _check_torch() -> Check:
    build = "built without CUDA"
    if torch.version.cuda:
        build = f"built for CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"built for ROCm {torch.version.hip}"
    return Check("PyTorch", "ok", f"{torch.__version__}, {build}")


def _num_cuda_devices() -> int:
    with warnings.catch_warnings():
        # PyTorch warns about a driver that is too old; _check_devices reports that.
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_devices() -> list[Check]:
    checks = []
    for idx in range(_num_cuda_devices()):
        gpu = torch.cuda.get_device_properties(idx)
        found = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"
        checks.append(Check(f"cuda:{idx}", "ok", found))
    if checks:
        return checks
    if torch.accelerator.is_available():
        found = f"{torch.accelerator.current_accelerator()}, which MMTok has not been tried on"
        return [Check("cpu", "warning", found, f"to serve on the CPU: export SGLANG_PLATFORM={_PLATFORM}")]
    found = f"no GPU: SGLang runs on the CPU through the {_PLATFORM} platform"
    if _NVIDIA_DRIVER.exists():
        fix = "an NVIDIA driver is here: is it too old for this PyTorch, or CUDA_VISIBLE_DEVICES empty?"
        return [Check("cpu", "warning", found, fix)]
    return [Check("cpu", "ok", found)]


def _check_sglang() -> Check:
    from mmtok_sglang.plugin import SUPPORTED_SGLANG

    version = _installed_version("sglang")
    if version is None:
        return Check("SGLang", "failed", "not installed", "pip install 'mmtok-deploy[sglang]'")
    if version != SUPPORTED_SGLANG:
        found = f"{version}, but the plugin supports {SUPPORTED_SGLANG}"
        return Check("SGLang", "failed", found, f"pip install 'sglang=={SUPPORTED_SGLANG}'")
    return Check("SGLang", "ok", version)


def _check_entry_points(sglang_ok: bool) -> list[Check]:
    errors = _probe_entry_points() if sglang_ok else {}
    checks = []
    for entry_point, group in _GROUPS.items():
        name = f"{group.rpartition('.')[2].removesuffix('s')} {entry_point}"
        if not metadata.entry_points(group=group, name=entry_point):
            checks.append(Check(name, "failed", f"not in {group}: SGLang does not find it", _REINSTALL))
        elif not sglang_ok:
            checks.append(Check(name, "warning", "registered; not tried, for want of SGLang", "see SGLang above"))
        elif entry_point in errors:
            first_line = errors[entry_point].partition("\n")[0]
            checks.append(Check(name, "failed", f"registered, does not load: {first_line}", _REINSTALL))
        else:
            checks.append(Check(name, "ok", "registered, loads"))
    return checks


def _probe_entry_points() -> dict[str, str]:
    command = [sys.executable, "-c", _PROBE, json.dumps(_GROUPS)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_LIMIT_S, env=without_sglang_choices(), check=False
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(_GROUPS, f"still loading after {_PROBE_LIMIT_S} s")
    if done.returncode:
        last_line = done.stderr.strip().rpartition("\n")[2]
        return dict.fromkeys(_GROUPS, f"exit code {done.returncode}: {last_line}")
    # Libraries may print lines above the answer when they are imported.
    errors: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return errors


def _check_plugins_variable() -> Check:
    name = "SGLANG_PLUGINS"
    plugins = sglang_plugins()
    if plugins is None:
        return Check(name, "ok", "not set")
    needed = [_PLUGIN]
    # SGLang also looks for the platform in this list, unless SGLANG_PLATFORM names one.
    if not (torch.accelerator.is_available() or sglang_platform() or use_cpu_engine()):
        needed.append(_PLATFORM)
    found = ",".join(plugins) or "names no plugin"
    missing = [entry_point for entry_point in needed if entry_point not in plugins]
    if missing:
        fix = f"unset {name}, or: export {name}={','.join([*plugins, *missing])}"
        return Check(name, "failed", f"{found}: switches {' and '.join(missing)} off", fix)
    return Check(name, "ok", found)


def _check_platform_variable() -> Check:
    name = "SGLANG_PLATFORM"
    selected = sglang_platform()
    if selected is None:
        return Check(name, "ok", "not set")
    if selected != _PLATFORM:
        # SGLang skips every plugin of a package that offers a platform which was not chosen; mmtok-deploy is one.
        return Check(name, "failed", f"{selected}: switches {_PLUGIN} and {_PLATFORM} off", f"unset {name}")
    if torch.accelerator.is_available():
        found = f"{selected}: SGLang runs on the CPU, though an accelerator is here"
        return Check(name, "warning", found, f"to use the accelerator: unset {name}")
    return Check(name, "ok", selected)


def _check_cpu_engine_variable() -> Check:
    name = "SGLANG_USE_CPU_ENGINE"
    if use_cpu_engine():
        found = "1: SGLang's own CPU engine, which its PyPI build has no kernels for"
        return Check(name, "failed", found, f"unset {name}")
    return Check(name, "ok", "not set")


def _check_reference(device: torch.device) -> Check:
    # Three kinds of tokens, and a word equal to the rarest kind: it is picked first, then one of each other kind.
    kinds, expected = [0, 1, 0, 2, 1, 0], [3, 0, 1]
    order: list[int] = []
    try:
        tokens = torch.eye(3, device=device)[kinds]
        order = select_tokens(tokens, tokens, tokens[3:4], len(expected), backend="reference").order.tolist()
        found = f"picks {order} of {len(kinds)} tokens"
    except (RuntimeError, ValueError) as error:
        found = str(error).strip().partition("\n")[0]
    if order == expected:
        return Check(f"reference on {device}", "ok", f"{found}, as it should")
    found = f"{found}, not {expected}" if order else found
    return Check(f"reference on {device}", "failed", found, "install a PyTorch build that fits this device")


def _check_extra(extra: str, purpose: str) -> Check:
    lines = (metadata.requires("mmtok-deploy") if _installed_version("mmtok-deploy") else None) or []
    required = [re.split(r"[^\w.-]", line)[0] for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    versions = {name: _installed_version(name) for name in required}
    missing = [name for name, version in versions.items() if version is None]
    if missing or not required:
        found = f"{purpose}; missing: {', '.join(missing) or 'all'}"
        return Check(f"extra {extra}", "optional", found, f"pip install 'mmtok-deploy[{extra}]'")
    return Check(f"extra {extra}", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _print_table(sections: dict[str, list[Check]], failed: list[str]) -> None:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for heading in ("Check", "Status", "Found, and -> what to do"):
        table.add_column(heading, overflow="fold")
    for section, checks in sections.items():
        table.add_row(Text(section, style="bold"))
        for idx, check in enumerate(checks):
            style = _STYLES[check.status]
            found = Text(check.found)
            if check.fix:
                found.append(f"\n-> {check.fix}", style=style)
            table.add_row(f" {check.name}", Text(check.status, style=style), found, end_section=idx == len(checks) - 1)
    families = f"Model families: {', '.join(PRESETS)}"
    verdict = Text("What SGLang needs to serve with a budget is here, and works.", style="bold green")
    if failed:
        verdict = Text(f"SGLang cannot serve with a budget here. Failed: {', '.join(failed)}.", style="bold red")
    Console(highlight=False).print(table, Padding(Group(families, verdict), (0, 1)))
