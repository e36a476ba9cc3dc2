"""The archives that users install hold everything that they need, and constraints.txt names all of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


# Each package and the folder that holds it.
PACKAGES = {"mmtok_deploy": "", "mmtok_export": "exporters", "mmtok_sglang": "runtime", "mmtok_bench": "bench"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the source archive, and in `site` the wheel that is built from it, unpacked."""
    folder = tmp_path_factory.mktemp("built")
    # Only what Git has: what else lies in this checkout is not in anyone else's.
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "checkout" / name)
    hatchling = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run([*hatchling, "-t", "sdist"], cwd=folder / "checkout", check=True, timeout=300)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder)
    sources = folder / sdist.name.removesuffix(".tar.gz")
    subprocess.run([*hatchling, "-t", "wheel"], cwd=sources, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder


@pytest.fixture(scope="module")
def site(built: Path) -> Path:
    return built / "site"


@pytest.mark.slow
def test_the_source_archive_holds_what_the_tests_need(built: Path) -> None:
    (sources,) = (path.parent for path in built.glob("*/PKG-INFO"))
    examples = ("examples/cpp/encode_image.cpp", "examples/edge_llm/mmtok_pruner.cpp")
    for name in ("Makefile", "constraints.txt", "tests/conftest.py", "docs/reliability.md", "LICENSE", *examples):
        assert (sources / name).is_file()
    assert (sources / "tests" / "data" / "golden").is_dir()


def test_the_checkout_holds_no_symbolic_links() -> None:
    # Git on Windows and unpacked archives leave text files in their place.
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert [line for line in listed.splitlines() if line.startswith("120000")] == []


def test_the_wheel_holds_every_module_and_nothing_else(site: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder / package).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # Other tests run the wheel: what Python compiles there is none of it.
    files = (path for path in site.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    found = {path.relative_to(site).as_posix() for path in files}
    assert {name for name in found if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_wheel_runs_from_another_folder(site: Path, tmp_path: Path) -> None:
    program = (
        "import mmtok_deploy, mmtok_export, mmtok_sglang, mmtok_bench\n"
        "from importlib.metadata import distributions\n"
        f"(dist,) = distributions(name='mmtok-deploy', path=[{str(site)!r}])\n"
        "print(mmtok_deploy.__file__)\n"
        "print(sorted(f'{e.group} {e.name}' for e in dist.entry_points if callable(e.load())))\n"
    )
    run = in_other_folder(["-c", program], site, tmp_path)
    assert run.returncode == 0, run.stderr
    place, entry_points = run.stdout.splitlines()
    assert Path(place).is_relative_to(site)
    assert entry_points == "['console_scripts mmtok', 'sglang.srt.platforms torch_cpu', 'sglang.srt.plugins mmtok']"


@pytest.mark.slow
def test_the_command_line_of_the_wheel_finds_its_plugin(site: Path, tmp_path: Path) -> None:
    run = in_other_folder(["-m", "mmtok_deploy", "doctor", "--json"], site, tmp_path)
    assert run.returncode in (0, 1), run.stderr
    checks = {check["name"]: check for check in json.loads(run.stdout)["checks"]}
    assert checks["plugin mmtok"]["status"] == checks["platform torch_cpu"]["status"] == "ok"


def in_other_folder(arguments: list[str], site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def pinned() -> list[tuple[Requirement, list[str]]]:
    """Returns what constraints.txt holds: requirements with their hashes."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    entries = [line.split("--hash=sha256:") for line in text.splitlines() if line and not line.startswith("#")]
    return [(Requirement(requirement), [each.strip() for each in hashes]) for requirement, *hashes in entries]


def test_constraints_name_one_version_and_its_hashes_and_no_place() -> None:
    for requirement, hashes in pinned():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert hashes
        assert all(re.fullmatch("[0-9a-f]{64}", each) for each in hashes)
        assert requirement.url is None
    # No index, no folder of the machine that wrote it.
    assert "/" not in "".join(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )


def test_constraints_are_complete() -> None:
    """Nothing that the project or a package of it needs is left to be resolved: pip is told to install no more."""
    here = [each for each, _ in pinned() if each.marker is None or each.marker.evaluate()]
    found = {canonicalize_name(each.name): each for each in here}
    assert len(found) == len(here)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in ("sglang", "bench", "export", "tensorrt-rtx", "dev"):
        needed += [each for each in extras[extra] if not each.startswith("mmtok-deploy[")]
    for name in found:
        with contextlib.suppress(PackageNotFoundError):
            needed += [each for each in requires(name) or [] if "extra ==" not in each]
    for each in map(Requirement, needed):
        if each.marker is None or each.marker.evaluate():
            (specifier,) = found[canonicalize_name(each.name)].specifier
            assert each.specifier.contains(specifier.version, prereleases=True), each
