"""The container file, as far as it can be looked at without building it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
KNOWN = {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}


def instructions() -> list[tuple[str, str]]:
    """Returns each instruction and what follows it, lines that go on joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def of(name: str) -> list[str]:
    return [rest for each, rest in instructions() if each == name]


def test_it_has_known_instructions_and_begins_with_its_base() -> None:
    assert {name for name, _ in instructions()} <= KNOWN
    assert instructions()[0][0] == "FROM"


def test_its_cuda_is_that_of_the_constraints() -> None:
    (base,) = of("FROM")
    image, _, tag = base.partition(":")
    assert image == "nvidia/cuda"
    major, minor = re.match(r"(\d+)\.(\d+)\.", tag).groups()  # type: ignore[union-attr]
    constrained = re.search(r"^cuda-toolkit==(\d+)\.(\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert constrained is not None
    assert (major, minor) == constrained.groups()


def test_its_python_is_supported() -> None:
    (version,) = set(re.findall(r"python(3\.\d+)", DOCKERFILE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"{version}.0" in SpecifierSet(project["requires-python"])


def test_what_it_copies_is_there_and_is_what_the_package_is_built_from() -> None:
    sources = [source for rest in of("COPY") for source in shlex.split(rest)[:-1]]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    for source in sources:
        assert any(name == source or name.startswith(f"{source}/") for name in tracked), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {project["project"]["readme"], "pyproject.toml"}
    needed |= {Path(each).parts[0] for each in [*packages, *project["project"]["license-files"]]}
    assert needed <= set(sources)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "artifacts", ".git"} <= set(ignored)
    assert not set(ignored) & set(sources)


def test_nothing_is_installed_that_the_constraints_do_not_name() -> None:
    installs = [command for rest in of("RUN") for command in rest.split("&&") if "pip install" in command]
    assert len(installs) == 2
    for command in installs:
        words = shlex.split(command)
        assert "--no-deps" in words
        assert "--require-hashes" in words or words[-2:] == ["-e", "."]


@pytest.mark.parametrize("script", of("RUN"))
def test_its_scripts_are_shell(script: str) -> None:
    subprocess.run(["sh", "-n", "-c", script], check=True)


def test_what_it_starts_can_be_started() -> None:
    (entry,) = of("ENTRYPOINT")
    program, flag, module, *arguments = json.loads(entry)
    assert (program, flag) == ("python", "-m")
    assert importlib.util.find_spec(module) is not None
    (port,) = of("EXPOSE")
    assert f"--port={port}" in arguments
    (health,) = of("HEALTHCHECK")
    command = json.loads(health.partition("CMD ")[2])
    compile(command[2], "healthcheck", "exec")
    assert f":{port}/health" in command[2]
