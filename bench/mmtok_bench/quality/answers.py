"""Every single answer, kept beside the rows: for comparing two methods question by question, and for going on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Answer", "Cell", "answers_beside", "append_answers", "read_answers", "replace_answers"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What is asked in one go: all questions of one seed, with one method and one budget."""

    method: str
    budget: str
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Args:
        method: With its budget and seed, the cell that it belongs to.
        scene: Number of the scene in the seed's set.
        kind: Of the question.
        setting: POPE's, for existence; else "".
        question: Asked.
        expected: What is right.
        said: What came.
        is_right: After normalisation.
        num_prompt_tokens: Of the request.
        num_image_tokens: Kept of the image; None where the server does not count them.
        latency_ms: Of the request, others running beside it.
        cell_s: How long the whole cell took.
        question_set: `fingerprint` of the cell's questions.
    """

    method: str
    budget: str
    seed: int
    scene: int
    kind: str
    setting: str
    question: str
    expected: str
    said: str
    is_right: bool
    num_prompt_tokens: int
    num_image_tokens: int | None
    latency_ms: float
    cell_s: float
    question_set: str

    @property
    def cell(self) -> Cell:
        """The cell that it belongs to."""
        return Cell(self.method, self.budget, self.seed)


def answers_beside(rows: Path) -> Path:
    """Returns where the answers of a file of rows are: not a .jsonl, which `mmtok bench report` would read as rows."""
    return rows.with_suffix(".answers")


def append_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Writes a finished cell's answers, a JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(answers))


def replace_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Writes the answers in place of those that are there, which stay as they are until all are written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(_lines(answers), encoding="utf-8")
    partial.replace(path)


def read_answers(path: Path) -> dict[Cell, list[Answer]]:
    """Returns the answers by cell, in the order of the file; none for a file that is not there.

    Raises:
        ValueError: A line that is no answer; the message has its number.
    """
    cells: dict[Cell, list[Answer]] = {}
    if not path.exists():
        return cells
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            answer = Answer(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no answer of mmtok quality: {error}") from error
        cells.setdefault(answer.cell, []).append(answer)
    return cells


def _lines(answers: Iterable[Answer]) -> str:
    return "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
