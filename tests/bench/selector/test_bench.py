from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok_bench.results import LATENCIES, read_rows
from mmtok_bench.selector import bench
from mmtok_bench.selector.contestants import BASELINES, contestants
from mmtok_bench.selector.timing import make_problem, measure_floors_ms, time_in_turns
from mmtok_deploy import SelectionConfig
from mmtok_deploy.cli import main
from mmtok_deploy.greedy_replay import replay_greedy
from mmtok_deploy.problem import SelectionProblem

CPU = torch.device("cpu")
SMALL = ["bench", "selector", "--device=cpu", "--shapes=24x3,40x5", "--runs=2"]


def run(*arguments: str, folder: Path) -> int:
    return main([*SMALL, f"--output={folder}", *arguments])


class TestBench:
    def test_rows_and_table(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--batch=1,2", folder=tmp_path) == 0
        printed = capsys.readouterr().out
        (path,) = tmp_path.glob("*.jsonl")
        rows = read_rows(path)
        measured = [(row.case["num_tokens"], row.case["num_picks"], row.case["batch"], row.backend) for row in rows]
        shapes_and_batches = [(24, 3, 1), (24, 3, 2), (40, 5, 1), (40, 5, 2)]
        backends = ["dense", "torchscript", "lazy"]
        assert measured == [(*case, backend) for case in shapes_and_batches for backend in backends]
        latencies_ms = [[row.metrics[name] for name in LATENCIES] for row in rows]
        assert all(0 < p20_ms <= p50_ms <= p80_ms for p20_ms, p50_ms, p80_ms in latencies_ms)
        assert all(row.metrics[name] > 0 for row in rows for name in ("bandwidth_floor_ms", "chain_floor_ms"))
        assert all(word in printed for word in (*backends, "24 → 3", "bandwidth floor"))

    def test_json_prints_the_rows_and_nothing_else(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--json", "--backends=lazy,reference", folder=tmp_path) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["backend"] for row in rows] == ["lazy", "reference"] * 2

    def test_a_second_run_leaves_the_first_ones_rows(self, tmp_path: Path) -> None:
        for _ in range(2):
            assert run("--backends=lazy", folder=tmp_path) == 0
        assert [len(read_rows(path)) for path in tmp_path.glob("*.jsonl")] == [2, 2]

    def test_wrong_picks_are_not_timed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def first_tokens(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Tensor]:
            return [torch.arange(problem.num_picks) for problem in problems]

        monkeypatch.setitem(BASELINES, "dense", first_tokens)
        assert run(folder=tmp_path) == 1
        assert "dense is wrong at 24 -> 3: pick 0 is token 0" in capsys.readouterr().out
        assert [read_rows(path) for path in tmp_path.glob("*.jsonl")] == [[]]

    def test_ctrl_c_keeps_finished_cases(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def problem_of_24(num_tokens: int, *rest: Any) -> SelectionProblem:
            if num_tokens == 40:
                raise KeyboardInterrupt
            return make_problem(num_tokens, *rest)

        monkeypatch.setattr(bench, "make_problem", problem_of_24)
        assert run("--backends=lazy", folder=tmp_path) == 130
        assert f"Stopped; the rows of finished cases are kept in {tmp_path}" in capsys.readouterr().err
        (path,) = tmp_path.glob("*.jsonl")
        assert [row.case["num_tokens"] for row in read_rows(path)] == [24]
        monkeypatch.undo()
        assert run("--backends=lazy", f"--resume={path}", folder=tmp_path) == 0
        assert [row.case["num_tokens"] for row in read_rows(path)] == [24, 40]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--backends=fast"], "a backend to time is one of dense, torchscript, "),
            (["--backends=auto"], "got 'auto'"),
            (["--shapes=24"], "expected tokens x picks, such as 2880x160"),
            (["--shapes=24x25"], "no more picks: got '24x25'"),
            (["--shapes=24xthree"], "got 'three'"),
            (["--batch=0"], "expected a whole number of at least 1, got '0'"),
            (["--runs=1"], "expected a whole number of at least 2, got '1'"),
            (["--threads=-2"], "got '-2'"),
        ],
    )
    def test_usage(
        self, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        try:
            code: object = run(*arguments, folder=tmp_path / "new")
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    def test_every_backend_of_a_cpu_but_the_reference(self) -> None:
        assert list(contestants([], CPU)) == ["dense", "torchscript", "lazy"]


# With the names and arguments of the authors' class; the selection in it is this repository's reference.
SELECTOR = """
import torch
from mmtok_deploy import SelectionConfig, select_tokens

class SemanticTokenSelector:
    def __init__(self, target_vision_tokens, alpha):
        self.budget, self.alpha = target_vision_tokens, alpha

    def mm_coverage_selection(self, text, vision, keys, tv_temp, vv_temp, padding_patch_indices=None):
        config = SelectionConfig(tv_temp=tv_temp, vv_temp=vv_temp, alpha=self.alpha)
        kept = select_tokens(vision, keys, text, self.budget, config=config, backend="reference").kept
        return {kept}.tolist(), vision[kept]
"""


class TestAuthors:
    def test_is_timed_beside_the_others(self, tmp_path: Path) -> None:
        file = tmp_path / "semantic_selector.py"
        file.write_text(SELECTOR.replace("{kept}", "kept"))
        assert run("--backends=lazy", f"--authors={file}", folder=tmp_path) == 0
        (path,) = tmp_path.glob("*.jsonl")
        assert [row.backend for row in read_rows(path)] == ["authors", "lazy"] * 2

    def test_other_tokens_are_not_timed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "semantic_selector.py"
        file.write_text(SELECTOR.replace("{kept}", "((kept + 1) % len(vision))"))
        assert run(f"--authors={file}", folder=tmp_path) == 1
        assert "authors is wrong at 24 -> 3: it or the reference keeps token" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "cannot be imported: FileNotFoundError"),
            ("import no_such_package", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
            ("x = 1", "has no SemanticTokenSelector.mm_coverage_selection"),
        ],
    )
    def test_another_file(
        self, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "selector.py"
        if text is not None:
            file.write_text(text)
        assert run(f"--authors={file}", folder=tmp_path / "new") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


class TestPublishedLoop:
    @pytest.mark.parametrize("name", BASELINES)
    @pytest.mark.parametrize(("num_tokens", "num_picks"), [(1, 1), (30, 30), (200, 20)])
    def test_is_greedy(self, name: str, num_tokens: int, num_picks: int) -> None:
        problems = [make_problem(num_tokens, num_picks, seed, CPU) for seed in range(2)]
        for problem, order in zip(problems, BASELINES[name](problems, SelectionConfig()), strict=True):
            replay_greedy(problem, SelectionConfig(), order.tolist())


def test_floors_follow_from_bytes_and_picks() -> None:
    few, many = (measure_floors_ms(64, picks, batch, 1e9, CPU) for picks, batch in ((1, 1), (50, 2)))
    # 64 tokens of 5120 float32 features, and a matrix of 88 x 64 written and read, at 1 GB a second.
    assert few["bandwidth_floor_ms"] == pytest.approx((64 * 5120 * 4 + 2 * 88 * 64 * 4) / 1e6)
    assert many["bandwidth_floor_ms"] == pytest.approx(2 * few["bandwidth_floor_ms"])
    assert 0 < few["chain_floor_ms"] < many["chain_floor_ms"]


def test_calls_take_turns_in_alternating_order() -> None:
    called: list[str] = []
    times_ms = time_in_turns({name: partial(called.append, name) for name in "ab"}, 3, CPU)
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"
    assert [len(times) for times in times_ms.values()] == [3, 3]
