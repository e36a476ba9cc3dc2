from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmtok_bench.client import openai_client
from mmtok_bench.results import read_rows
from mmtok_bench.serve import second_question
from mmtok_deploy.cli import main
from tests.bench.quality.stand_in import completion, question_of, serving


def test_each_question_of_each_cache_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked.append(question_of(body))
        return 200, completion("a cup", 64)

    with serving(reply) as url:
        server = SimpleNamespace(client=lambda: openai_client(url))
        monkeypatch.setattr(second_question, "make_tiny_checkpoint", lambda *arguments, **options: tmp_path)
        monkeypatch.setattr(second_question, "make_server", lambda *arguments, **options: server)
        monkeypatch.setattr(second_question, "running", lambda *servers: contextlib.nullcontext())
        assert main(["bench", "second-question", f"--output={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    rows = read_rows(path)
    cases = [(row.case["feature_cache_mb"], row.case["question"]) for row in rows]
    assert sorted(cases) == [(0, 1), (0, 2), (256, 1), (256, 2)]
    # Ten photographs, the two servers in turns, a warm-up each.
    assert all(row.num_runs == 10 and row.metrics["latency_p50_ms"] > 0 for row in rows)
    assert len(asked) == 2 + 10 * 2 * 2
    assert "Second question" in capsys.readouterr().out
