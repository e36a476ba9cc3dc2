"""The wheel, installed elsewhere, holds everything that its entry points name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A build leaves folders beside the sources: not in this checkout.
    ignored = shutil.ignore_patterns(".*", "artifacts", "build", "tests", "*.egg-info", "__pycache__")
    sources = shutil.copytree(ROOT, folder / "sources", symlinks=True, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(sources)], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_every_module(site: Path) -> None:
    tops = {"mmtok_deploy": ROOT / "mmtok_deploy"}
    tops |= {f"mmtok_deploy/{name}": ROOT / name for name in ("exporters", "runtime", "bench")}
    for place, folder in tops.items():
        for source in folder.rglob("*.py"):
            assert (site / place / source.relative_to(folder)).is_file()
    assert (site / "mmtok_deploy" / "py.typed").is_file()
    for name in ("page.css", "page.html.jinja"):
        assert (site / "mmtok_deploy" / "bench" / "report" / name).is_file()


def test_wheel_runs_from_another_folder(site: Path, tmp_path: Path) -> None:
    program = (
        "import mmtok_deploy, mmtok_deploy.bench, mmtok_deploy.exporters\n"
        "from importlib.metadata import distributions\n"
        f"(dist,) = distributions(name='mmtok-deploy', path=[{str(site)!r}])\n"
        "print(mmtok_deploy.__file__)\n"
        "print(sorted(f'{e.group} {e.name}' for e in dist.entry_points if callable(e.load())))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    place, entry_points = run.stdout.splitlines()
    assert Path(place).is_relative_to(site)
    assert entry_points == "['console_scripts mmtok', 'sglang.srt.platforms torch_cpu', 'sglang.srt.plugins mmtok']"
