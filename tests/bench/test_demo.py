from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from mmtok_bench import demo
from mmtok_bench.demo import run_demo
from mmtok_bench.server import ServerError
from mmtok_deploy.cli import main


@pytest.mark.parametrize(("error", "code"), [(ServerError("port [red]taken[/]"), 1), (KeyboardInterrupt(), 130)])
def test_what_ends_the_demonstration_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(demo, "started", fail)
    assert (
        run_demo(Namespace(family="llava-1.5", budget="25%", folder=tmp_path, page=False, url=None, model_path=None))
        == code
    )
    printed = capsys.readouterr().err
    assert ("port [red]taken[/]" in printed) == (code == 1)
    assert ("Stopped" in printed) == (code == 130)


def test_a_budget_that_is_not_understood_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--budget=ten", f"--folder={tmp_path / 'new'}"])
    assert stop.value.code == 2
    assert "budget 'ten' is not understood" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--url=http://127.0.0.1:1"], 2, "--url and --model-path are for the page: add --page"),
        (["--page", "--url=http://127.0.0.1:1", "--port=0"], 1, "http://127.0.0.1:1/server_info does not answer"),
        (["--page", "--host=203.0.113.1"], 1, "the page cannot be served at 203.0.113.1, port 8600"),
    ],
)
def test_a_page_that_cannot_be_served_starts_nothing(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == code
    assert message in capsys.readouterr().err
