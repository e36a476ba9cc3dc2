"""Every method at every budget, seed by seed: what `mmtok quality` runs on the pocket tasks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmtok_bench.chat import image_url
from mmtok_bench.pocket.questions import AskedScene, fingerprint, make_scenes, picture_of
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_bench.quality.answers import (
    Answer,
    Cell,
    answers_beside,
    append_answers,
    read_answers,
    replace_answers,
)
from mmtok_bench.quality.asking import Asker, Request, Said
from mmtok_bench.quality.plan import WITH_AGENT, Plan
from mmtok_bench.quality.rows import ALL_SEEDS, POCKET, UNPRUNED, rows_of
from mmtok_bench.quality.scoring import is_right
from mmtok_bench.results import (
    CaseValue,
    ResultRow,
    UnfinishedRowWarning,
    append_row,
    drop_unfinished_line,
    read_rows,
)

__all__ = ["NotPrunedError", "Sweep"]

_Written = tuple[CaseValue, CaseValue, CaseValue, CaseValue]


class NotPrunedError(RuntimeError):
    """A server that read as many image tokens at a budget as without one."""


@dataclass(slots=True)
class Sweep:
    """One run of a plan, whose rows and answers are written as they come.

    Args:
        plan: What is asked.
        path: The file of rows; cells whose answers are beside it already are not asked again.
        model: What rows call it.
        device: Where the server runs.
        picture_px: Side of the pictures that are sent.
    """

    plan: Plan
    path: Path
    model: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    picture_px: int = SCENE_PX
    _scenes: dict[int, list[AskedScene]] = field(default_factory=dict)
    _urls: dict[tuple[int, int], str] = field(default_factory=dict)
    _answers: dict[Cell, list[Answer]] = field(default_factory=dict)

    def prepare(self) -> list[str]:
        """Makes the questions, draws the scenes, and takes up the answers that are there.

        Returns:
            A sentence on each thing that an earlier run was killed over, and that is dropped.

        Raises:
            ValueError: The rows that are there are of another model or other seeds, or the answers to other questions.
        """
        for seed in self.plan.seeds:
            self._scenes[seed] = make_scenes(seed, self.plan.num_questions, self.plan.kinds)
            for asked in self._scenes[seed]:
                self._urls[seed, asked.index] = image_url(picture_of(asked.scene, self.picture_px))
        beside = answers_beside(self.path)
        self._check_rows()
        notes = [
            f"the last line of {path} was cut off and is dropped"
            for path in (self.path, beside)
            if path.exists() and drop_unfinished_line(path)
        ]
        self._answers = read_answers(beside)
        for cell, answers in self._answers.items():
            expected = fingerprint(self._scenes.get(cell.seed, []))
            if answers[0].question_set != expected:
                raise ValueError(
                    f"{beside} holds answers to other questions (set {answers[0].question_set}, here {expected}): "
                    "go on with the same seeds, kinds, questions, NumPy and Pillow, or start anew"
                )
        return notes + self._drop_unfinished_cells()

    @property
    def num_done(self) -> int:
        """Requests of this plan that were answered in an earlier run."""
        return sum(len(self._answers.get(cell, ())) for cell in self._cells())

    async def run(
        self,
        asker: Asker,
        on_answer: Callable[[], None],
        on_cell: Callable[[Cell], None],
        *,
        agent_asker: Asker | None = None,
        check_agent: Callable[[], None] = lambda: None,
    ) -> None:
        """Asks what is left of the plan.

        Args:
            asker: Of the server.
            on_answer: Called after each answer.
            on_cell: Called before the first question of a cell.
            agent_asker: Of the server with an agent, for the method `WITH_AGENT`.
            check_agent: Called before the answers of a cell of `WITH_AGENT` are kept; raises where they are not an
                agent's.

        Raises:
            ValueError: The plan has `WITH_AGENT`, and there is no such server.
            RequestError: A request failed; what was finished before it is kept.
            NotPrunedError: The server does not prune.
        """
        if WITH_AGENT in self.plan.methods and agent_asker is None:
            raise ValueError(f"{WITH_AGENT} is asked of a server with --mmtok-agent-url, and there is none")
        written = {_written(row) for row in read_rows(self.path)}
        for method, budget in self.plan.settings():
            for seed in self.plan.seeds:
                cell = Cell(method, budget, seed)
                if cell not in self._answers:
                    on_cell(cell)
                    of_agent = agent_asker if method == WITH_AGENT else None
                    answers = await self._ask(of_agent or asker, cell, on_answer)
                    self._check_pruned(cell, answers)
                    if of_agent is not None:
                        check_agent()
                    append_answers(answers_beside(self.path), answers)
                    self._answers[cell] = answers
                self._write([cell], seed, written)
            if len(self.plan.seeds) > 1:
                self._write([Cell(method, budget, seed) for seed in self.plan.seeds], ALL_SEEDS, written)

    def rows(self) -> list[ResultRow]:
        """Returns the rows of every setting that is finished: all seeds together, or the one that there is."""
        pooled = ALL_SEEDS if len(self.plan.seeds) > 1 else str(self.plan.seeds[0])
        settings = self.plan.settings()
        return [
            row
            for row in read_rows(self.path)
            if row.case["seed"] == pooled and (row.case["method"], row.case["budget"]) in settings
        ]

    def _check_rows(self) -> None:
        with warnings.catch_warnings():
            # A row that was cut off is told when it is dropped.
            warnings.simplefilter("ignore", UnfinishedRowWarning)
            rows = read_rows(self.path)
        pooled = fingerprint([asked for seed in self.plan.seeds for asked in self._scenes[seed]])
        for row in rows:
            found = row.case.get("task", row.bench), row.case.get("model", "no model")
            if found != (POCKET, self.model):
                raise ValueError(
                    f"{self.path} holds rows of {found[0]} tasks on {found[1]}, here are {POCKET} tasks on "
                    f"{self.model}: go on with the model that it was begun with, or start anew"
                )
            # Rows of all seeds together are not written again.
            if row.case["seed"] == ALL_SEEDS and row.case["question_set"] != pooled:
                seeds = ", ".join(map(str, self.plan.seeds))
                raise ValueError(
                    f"{self.path} holds scores over other seeds or questions than those of {seeds}: go on with the "
                    "same --seeds in the same order, or start anew"
                )

    def _drop_unfinished_cells(self) -> list[str]:
        unfinished = [cell for cell in self._answers if len(self._answers[cell]) != self._num_questions(cell.seed)]
        for cell in unfinished:
            del self._answers[cell]
        if unfinished:
            kept = (answer for answers in self._answers.values() for answer in answers)
            replace_answers(answers_beside(self.path), kept)
        return [
            f"not all answers of {cell.method} at {cell.budget}, seed {cell.seed}, were written: it is asked again"
            for cell in unfinished
        ]

    def _num_questions(self, seed: int) -> int:
        return sum(len(asked.questions) for asked in self._scenes[seed])

    def _cells(self) -> Iterator[Cell]:
        for method, budget in self.plan.settings():
            yield from (Cell(method, budget, seed) for seed in self.plan.seeds)

    async def _ask(self, asker: Asker, cell: Cell, on_answer: Callable[[], None]) -> list[Answer]:
        scenes = self._scenes[cell.seed]
        places = [(asked, number) for asked in scenes for number in range(len(asked.questions))]
        requests = [
            Request(self._urls[cell.seed, asked.index], asked.questions[number], _fields(cell))
            for asked, number in places
        ]
        started_s = time.perf_counter()
        said = await asker.ask_all(requests, on_answer)
        cell_s = time.perf_counter() - started_s
        question_set = fingerprint(scenes)
        return [
            _answer(cell, asked, number, answer, cell_s, question_set)
            for (asked, number), answer in zip(places, said, strict=True)
        ]

    def _check_pruned(self, cell: Cell, answers: Sequence[Answer]) -> None:
        unpruned = self._answers.get(Cell(UNPRUNED, "all", cell.seed))
        if cell.method == UNPRUNED or unpruned is None:
            return
        longer = [
            pruned.question
            for pruned, full in zip(answers, unpruned, strict=True)
            if pruned.num_prompt_tokens >= full.num_prompt_tokens
        ]
        if longer:
            raise NotPrunedError(
                f"with {cell.method} at {cell.budget}, {longer[0]!r} took as many prompt tokens as unpruned: is the "
                "server started with --mmtok-budget, and without --mmtok-min-tokens-in?"
            )

    def _write(self, cells: Sequence[Cell], seed: int | str, written: Set[_Written]) -> None:
        """Writes the cells' rows, a kind each, but for those that an earlier run wrote."""
        method, budget = cells[0].method, cells[0].budget
        if all((method, budget, str(seed), kind) in written for kind in self.plan.kinds):
            return
        answers = [answer for cell in cells for answer in self._answers[cell]]
        unpruned = [answer for cell in cells for answer in self._answers.get(Cell(UNPRUNED, "all", cell.seed), ())]
        question_set = fingerprint([asked for cell in cells for asked in self._scenes[cell.seed]])
        for row in rows_of(
            answers, unpruned, model=self.model, seed=seed, question_set=question_set, device=self.device
        ):
            if _written(row) not in written:
                append_row(self.path, row)


def _written(row: ResultRow) -> _Written:
    return row.case["method"], row.case["budget"], row.case["seed"], row.case["kind"]


def _fields(cell: Cell) -> dict[str, str | int]:
    if cell.method == UNPRUNED:
        return {"mmtok_budget": "all"}
    method = "mmtok" if cell.method == WITH_AGENT else cell.method
    return {"mmtok_budget": cell.budget, "mmtok_method": method, "mmtok_seed": cell.seed}


def _answer(cell: Cell, asked: AskedScene, number: int, said: Said, cell_s: float, question_set: str) -> Answer:
    question = asked.questions[number]
    return Answer(
        method=cell.method,
        budget=cell.budget,
        seed=cell.seed,
        scene=asked.index,
        kind=question.kind,
        setting=asked.settings[number],
        question=question.text,
        expected=question.answer,
        said=said.text,
        is_right=is_right(question, said.text),
        num_prompt_tokens=said.num_prompt_tokens,
        num_image_tokens=said.num_image_tokens,
        latency_ms=round(said.latency_ms, 1),
        cell_s=round(cell_s, 2),
        question_set=question_set,
    )
