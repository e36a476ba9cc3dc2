"""The kernels in Triton's interpreter, on the CPU: every answer that a GPU would give, slowly (see conftest.py)."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtok_deploy import Selection, SelectionConfig, SelectionError, select_tokens
from mmtok_deploy.config import Coverage
from mmtok_deploy.greedy_replay import replay_greedy
from mmtok_deploy.problem import SelectionProblem
from tests.mmtok_deploy.naive import naive_greedy, naive_matrix
from tests.mmtok_deploy.problems import (
    GOLDEN_NAMES,
    Problem,
    assert_greedy,
    golden,
    mask_of,
    problems,
    random_problem,
)

pytest.importorskip("triton")
from triton.runtime import interpreter

from mmtok_deploy.backends import triton as backend
from mmtok_deploy.backends import triton_kernels, triton_plan
from mmtok_deploy.backends.triton_layout import flattened
from mmtok_deploy.backends.triton_plan import Team

DEFAULT = SelectionConfig()
COVERAGES: tuple[Coverage, ...] = get_args(Coverage)
LARGE = {name for name in GOLDEN_NAMES if len(golden(name).problem) > 300}
QUICK = {"llava_n576_k4", "padding_n576_k64"}
# The lead, relative to f of all tokens, below which float32 may order two tokens either way.
SMALLEST_LEAD = 1e-4

few_examples = settings(max_examples=15)


@pytest.fixture(autouse=True)
def patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that a kernel calls patches Triton's language for 2 ms, a third of all: a module's first suffices."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(function)

    def launch_anew(*arguments: Any, **named: Any) -> Any:
        # What a launch patched, it takes back.
        patched.clear()
        return launch(*arguments, **named)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small tile as for a large one."""
    monkeypatch.setattr(triton_plan, "SMALL_TILE", 256)
    monkeypatch.setattr(triton_plan, "COLUMNS_TILE", (256, 256))
    for name in ("LONE_PICK_TILE", "TEAM_PICK_TILE"):
        monkeypatch.setattr(triton_plan, name, 2**16)


def assert_all_greedy(problems: Sequence[SelectionProblem], config: SelectionConfig = DEFAULT) -> None:
    for selection, problem in zip(backend.select(problems, config), problems, strict=True):
        assert_greedy(selection, problem, config)


class TestGolden:
    @pytest.mark.parametrize("name", [name for name in GOLDEN_NAMES if name not in LARGE])
    def test_small(self, name: str) -> None:
        self._check(name)

    @pytest.mark.usefixtures("large_tiles")
    @pytest.mark.parametrize(
        "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(LARGE)]
    )
    def test_large(self, name: str) -> None:
        self._check(name)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", ["llava_n100_k20", "qwen_n64_k8"])
    def test_half_precision(self, name: str, dtype: torch.dtype) -> None:
        case = golden(name)
        assert_all_greedy([case.problem.to(dtype).picking(case.budget)], case.config)

    def _check(self, name: str) -> None:
        case = golden(name)
        (selection,) = backend.select([case.given()], case.config)
        assert selection.order.tolist() == case.order
        assert selection.kept.tolist() == case.kept


class TestAnswer:
    @pytest.mark.parametrize("coverage", COVERAGES)
    @few_examples
    @given(problem=problems(min_words=1, may_exclude=True), data=st.data())
    def test_equals_the_definition(self, coverage: Coverage, problem: Problem, data: st.DataObject) -> None:
        config = SelectionConfig(tv_temp=0.1, vv_temp=0.2, alpha=0.7, coverage=coverage)
        barred = [] if problem.excluded is None else problem.excluded.nonzero()[:, 0].tolist()
        num_picks = data.draw(st.integers(0, len(problem) - len(barred)))
        expected = naive_greedy(naive_matrix(problem.vision, problem.keys, problem.text, config), num_picks, barred)
        assume(expected.lead > SMALLEST_LEAD)
        (selection,) = backend.select([problem.picking(num_picks)], config)
        assert selection.order.tolist() == expected.order
        assert selection.kept.tolist() == sorted(expected.order)

    @pytest.mark.parametrize(
        "coverage", ["multimodal", *(pytest.param(each, marks=pytest.mark.slow) for each in ("text", "vision"))]
    )
    def test_every_token(self, coverage: Coverage) -> None:
        # 70 words: two tiles of them; 131 tokens: three tiles, the last one all but empty.
        problem = random_problem(131, 70).picking(131)
        (selection,) = backend.select([problem], SelectionConfig(coverage=coverage))
        assert selection.kept.tolist() == list(range(131))
        assert (selection.coverage.diff() >= 0).all()
        torch.testing.assert_close(selection.coverage[-1], selection.total)

    def test_by_name(self) -> None:
        case = random_problem(9, excluded=[2])
        some, every = (
            select_tokens(case.vision, case.keys, case.text, budget, excluded=case.excluded, backend="triton")
            for budget in (4, "all")
        )
        assert_greedy(some, case.picking(4))
        replay_greedy(case.picking(8), DEFAULT, every.order[:8].tolist())
        assert every.order[8] == 2

    @pytest.mark.parametrize("num_words", [0, 1])
    def test_one_token(self, num_words: int) -> None:
        assert_all_greedy([random_problem(1, num_words).picking(1)])

    def test_strides_and_dtypes_do_not_matter(self) -> None:
        problem = random_problem(40).picking(20)
        strided = dataclasses.replace(problem, vision=problem.vision.T.contiguous().T, keys=_every_other(problem.keys))
        assert_all_greedy([strided])
        assert_all_greedy([dataclasses.replace(problem, vision=problem.vision.half(), keys=problem.keys.bfloat16())])


class TestTies:
    """Equal gains go to the lowest index, and end."""

    @pytest.mark.parametrize("value", [0.0, 1.0])
    @pytest.mark.parametrize("num_words", [0, 3])
    def test_all_tokens_equal(self, value: float, num_words: int) -> None:
        # Unit rows of quarters and halves: every product is exact in float32.
        mask = mask_of([0, 5], 70)
        same = Problem(torch.full((70, 16), value), torch.full((70, 4), value), torch.ones(num_words, 16), mask)
        (selection,) = backend.select([same.picking(68)], DEFAULT)
        assert selection.order.tolist() == [token for token in range(70) if token not in (0, 5)]

    def test_duplicates(self) -> None:
        # Each token twice: one of each two is picked before any is picked again, for no gain but rounding.
        case = random_problem(50).take(torch.arange(100) % 50)
        (selection,) = backend.select([case.picking(100)], DEFAULT)
        assert sorted((selection.order[:50] % 50).tolist()) == list(range(50))
        assert selection.kept.tolist() == list(range(100))

    def test_covered_words_leave_nothing_to_gain(self) -> None:
        config = SelectionConfig(tv_temp=0.001, coverage="text")
        (selection,) = backend.select([random_problem(80, 2).picking(80)], config)
        assert sorted(selection.order.tolist()) == list(range(80))
        assert selection.coverage[2] == selection.coverage[-1]


class TestNotFinite:
    @pytest.mark.parametrize(
        "value", [math.nan, *(pytest.param(each, marks=pytest.mark.slow) for each in (math.inf, -math.inf))]
    )
    @pytest.mark.parametrize("name", ["vision", "keys", "text"])
    def test_ends_with_valid_indices_and_says_so(self, name: str, value: float) -> None:
        problem = random_problem(70, excluded=[4]).picking(8)
        getattr(problem, name)[1, 2] = value
        (selection,) = backend.select([problem], DEFAULT)
        assert not torch.isfinite(selection.total)
        assert selection.kept.tolist() == sorted(set(selection.order.tolist()) - {4})
        assert len(selection) == 8
        assert 0 <= selection.kept[0] <= selection.kept[-1] < 70


class TestBatch:
    # 130 tokens and 40 words are several tiles of each, and columns that share a group; each pick takes the interpreter
    # 30 ms. The problem of five has all picked that may be.
    CASES = (
        random_problem(9).picking(4),
        random_problem(5, 1, [1, 2]).picking(3),
        random_problem(0, 2).picking(0),
        random_problem(130, 40, [5]).picking(20),
        random_problem(1, 1).picking(1),
        random_problem(70, 33).picking(0),
    )

    @pytest.mark.parametrize("coverage", COVERAGES)
    def test_ragged(self, coverage: Coverage) -> None:
        assert_all_greedy(self.CASES, SelectionConfig(coverage=coverage))

    def test_some_without_words(self) -> None:
        assert_all_greedy([*self.CASES, random_problem(20, 0).picking(7)])

    def test_equals_one_by_one(self) -> None:
        alone = [backend.select([case], DEFAULT)[0] for case in self.CASES]
        for selection, expected in zip(backend.select(self.CASES, DEFAULT), alone, strict=True):
            for field in dataclasses.fields(Selection):
                assert torch.equal(getattr(selection, field.name), getattr(expected, field.name)), field.name

    def test_widths_may_differ(self) -> None:
        wide = random_problem(30)
        wide = dataclasses.replace(wide, keys=torch.cat([wide.keys, wide.keys.flip(1)], dim=1))
        assert_all_greedy([self.CASES[0], wide.picking(9), self.CASES[1]])

    def test_slices_of_one_tensor(self) -> None:
        cases = [random_problem(num_tokens, seed=num_tokens) for num_tokens in (9, 40, 3)]
        names = ("vision", "keys", "text")
        flat = {name: torch.cat([getattr(case, name) for case in cases]) for name in names}
        parts = {name: flat[name].split([len(getattr(case, name)) for case in cases]) for name in names}
        assert flattened(parts["keys"]).data_ptr() == flat["keys"].data_ptr()
        sliced = [SelectionProblem(parts["vision"][i], parts["keys"][i], parts["text"][i], 3) for i in range(3)]
        assert_all_greedy(sliced)

    def test_an_empty_batch(self) -> None:
        assert backend.select([], DEFAULT) == []


class TestTeam:
    # More picks than the three slots that meetings take in turn, and than the latest meeting that a program misses.
    CASES = (random_problem(40, 5, [7]).picking(12), random_problem(23, 2, seed=1).picking(6))

    @pytest.mark.parametrize("name", ["llava_n100_k20", "qwen_n144_k143", "alpha2_n256_k16"])
    def test_of_one_meets_itself(self, name: str) -> None:
        case = golden(name)
        (selection,) = backend._select_together([case.given()], case.config, Team(1, 16, is_meeting=True))
        assert selection.order.tolist() == case.order
        assert selection.kept.tolist() == case.kept

    @pytest.mark.parametrize("team", [Team(2, 16, is_meeting=True), Team(3, 4, is_meeting=True)], ids=str)
    def test_of_several_processes(self, team: Team) -> None:
        """The interpreter runs one program after another; here each has a process, and they share the tensors."""
        case = golden("llava_n64_k8")
        for batch, config in (([case.given()], case.config), (self.CASES, DEFAULT)):
            for selection, problem in zip(_select_in_processes(batch, config, team), batch, strict=True):
                assert_greedy(selection, problem, config)

    @pytest.mark.parametrize(
        ("absent", "first_turn"),
        [(1, 0), (1, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0, 0), (2, 0), (0, 9)))],
        ids=lambda value: str(value),
    )
    def test_a_program_that_stops_is_given_up(
        self, monkeypatch: pytest.MonkeyPatch, absent: int, first_turn: int
    ) -> None:
        """One program never starts, or ends before a round: the others end, and say that there is no selection."""
        monkeypatch.setattr(triton_plan, "MAX_SPINS", 500)
        selections = _select_in_processes(self.CASES, DEFAULT, Team(3, 4, is_meeting=True), (absent, first_turn))
        for selection, problem in zip(selections, self.CASES, strict=True):
            assert selection.total.isnan()
            for indices in (selection.order, selection.kept):
                assert len(indices) == problem.num_picks
                assert 0 <= indices.min() <= indices.max() < len(problem.vision)

    def test_a_program_that_comes_late_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_plan, "MAX_SPINS", 10**9)
        team = Team(3, 4, is_meeting=True)
        for selection, problem in zip(_select_in_processes(self.CASES, DEFAULT, team, late=1), self.CASES, strict=True):
            assert_greedy(selection, problem, DEFAULT)

    def test_given_up_is_an_error_of_select_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The one program of two that the interpreter runs first waits for the other.
        monkeypatch.setattr(triton_plan, "MAX_SPINS", 50)
        monkeypatch.setattr(triton_plan, "_choose_team", lambda size, num_multiprocessors: Team(2, 4, is_meeting=True))
        case = self.CASES[1]
        with pytest.raises(SelectionError, match="programs of a Triton kernel did not run at once"):
            select_tokens(case.vision, case.keys, case.text, case.num_picks, backend="triton")


def _select_in_processes(
    problems: Sequence[SelectionProblem],
    config: SelectionConfig,
    team: Team,
    absent: tuple[int, int] | None = None,
    late: int | None = None,
) -> list[Selection]:
    """Returns what a team of processes selects.

    Args:
        problems: A batch.
        config: Temperatures, weight, coverage.
        team: A process each.
        absent: A rank, and the meeting that it ends before, of each problem.
        late: A rank that starts after the others.
    """
    batch = backend._plan_batch(problems, config, team)
    coverage, row_max, row_weight = backend._weighted_logits(batch, config)
    bounds = backend._finish_columns(batch, coverage, row_max, row_weight)
    picks = backend._new_picks(batch)
    launch = (batch, coverage, bounds, row_weight, picks)
    for tensor in (batch.layout.table, *_tensors(picks), coverage, bounds, row_weight):
        tensor.share_memory_()

    context = multiprocessing.get_context("fork")
    programs = [
        context.Process(
            target=_run_program,
            args=(rank, launch, absent[1] if absent and absent[0] == rank else None, 0.5 if rank == late else 0),
            daemon=True,
        )
        for rank in range(team.num_programs)
    ]
    for program in programs:
        program.start()
    for program in programs:
        program.join(timeout=60)
    hung = [program for program in programs if program.is_alive()]
    for program in hung:
        program.kill()
    assert [program.exitcode for program in programs] == [0] * team.num_programs
    return backend._split(batch.layout, picks)


def _run_program(rank: int, launch: tuple[Any, ...], last_turn: int | None, delay_s: float) -> None:
    """Runs the one program of that rank, for every problem; one with a last turn ends before that meeting."""
    time.sleep(delay_s)
    if last_turn is not None:
        _leave_before(last_turn)
    builder = interpreter.interpreter_builder
    builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", (rank, y, z))
    make = interpreter.GridExecutor.__init__

    def make_with_one_program(
        self: object, function: object, names: object, grid: Sequence[int], *rest: object
    ) -> None:
        make(self, function, names, (1, *grid[1:]), *rest)

    interpreter.GridExecutor.__init__ = make_with_one_program
    # It would copy each tensor onto itself, and with it what another program is writing.
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
    backend._launch_picks(*launch)


def _leave_before(last_turn: int) -> None:
    meet = triton_kernels._largest_of_team

    def leave(meeting: Any, key: Any, rank: Any, turn: Any, *rest: Any) -> Any:
        if int(getattr(turn, "handle", SimpleNamespace(data=turn)).data) >= last_turn:
            os._exit(0)
        return meet(meeting, key, rank, turn, *rest)

    triton_kernels._largest_of_team = leave


def _tensors(picks: object) -> Iterator[Tensor]:
    return (getattr(picks, field.name) for field in dataclasses.fields(picks))  # type: ignore[arg-type]


def _every_other(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)[::2, ::3]
