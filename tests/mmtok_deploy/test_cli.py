from __future__ import annotations

import pytest

from mmtok_deploy import __version__
from mmtok_deploy.cli import main


def exit_code(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_the_commands(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([flag]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: mmtok")
    assert "doctor" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"mmtok-deploy {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["--no-such-flag"], ["doctor", "--no-such-flag"], ["bench"]])
def test_usage_errors_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: mmtok")
