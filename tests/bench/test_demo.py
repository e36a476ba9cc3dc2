from __future__ import annotations

from pathlib import Path

import pytest

from mmtok_bench import demo
from mmtok_bench.demo import run_demo
from mmtok_bench.server import ServerError


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
    assert run_demo(folder=tmp_path) == code
    printed = capsys.readouterr().out
    assert ("port [red]taken[/]" in printed) == (code == 1)
    assert ("Stopped" in printed) == (code == 130)


def test_a_budget_that_is_not_understood_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget 'ten' is not understood"):
        run_demo(budget="ten", folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()
