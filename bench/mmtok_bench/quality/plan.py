"""What `mmtok quality` asks on the pocket tasks, and every single answer, kept beside the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.pocket.questions import KINDS, Kind
from mmtok_deploy.methods import IMAGE_METHODS, MethodName, check_method

__all__ = [
    "METHODS",
    "UNPRUNED",
    "WITH_AGENT",
    "QualityPlan",
    "ScoredAnswer",
    "Setting",
    "answers_beside",
    "append_answers",
    "read_answers",
    "replace_answers",
]

METHODS: tuple[MethodName, ...] = IMAGE_METHODS
UNPRUNED = "unpruned"
"""The method of budget "all", and of "all@0.5": nothing is chosen."""
WITH_AGENT = "mmtok+agent"
"""MMTok on another server, whose guidance an agent's answer joins."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked in one go: all questions of one seed, with one method and one budget."""

    method: str
    budget: str
    seed: int


@dataclass(frozen=True, slots=True)
class QualityPlan:
    """What is asked.

    Args:
        methods: Methods of choosing the tokens; `WITH_AGENT` is one.
        budgets: As `MixedBudget.parse` reads them; "all", and "all@0.5" of a smaller image, are asked once, whatever
            the methods, and first. "auto" is the server's choice for each question.
        seeds: Seeds of the held-out scenes, and of the method `random`.
        kinds: Kinds of questions.
        num_questions: Questions of each kind and seed.

    Raises:
        ValueError: Nothing to ask, something twice, or a method, a budget or a kind that is not there.
    """

    methods: tuple[str, ...] = METHODS
    budgets: tuple[str, ...] = ("all", "50%", "25%", "11%", "5%", "4")
    seeds: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[Kind, ...] = KINDS
    num_questions: int = 170

    def __post_init__(self) -> None:
        for name in ("methods", "budgets", "seeds", "kinds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"expected at least one of {name}, each once, got {values or 'none'}")
        for method in self.methods:
            if method != WITH_AGENT:
                check_method(method)
        for budget in self.budgets:
            MixedBudget.parse(budget)
        if any(not 0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"a seed is between 0 and 2**32 - 1, got {self.seeds}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or self.num_questions < 1:
            got = unknown or self.num_questions
            raise ValueError(f"expected kinds of {', '.join(KINDS)} and at least 1 question, got {got}")

    def pairs(self) -> list[tuple[str, str]]:
        """Returns methods and budgets in the order in which they are asked.

        `downsample` takes no smaller image, and no budget that is chosen by the question.
        """
        parsed = {budget: MixedBudget.parse(budget) for budget in self.budgets}
        whole = sorted((each for each in parsed if parsed[each].is_all), key=lambda each: parsed[each].is_scaled)
        pruned = [
            (method, budget)
            for budget in self.budgets
            if budget not in whole
            for method in self.methods
            if method != "downsample" or not (parsed[budget].is_scaled or parsed[budget].is_auto)
        ]
        return [*((UNPRUNED, budget) for budget in whole), *pruned]

    def settings(self) -> Iterator[Setting]:
        """Gives what is asked in one go, in order."""
        for method, budget in self.pairs():
            yield from (Setting(method, budget, seed) for seed in self.seeds)

    @property
    def num_requests(self) -> int:
        """Questions of all settings together."""
        return len(self.pairs()) * len(self.seeds) * len(self.kinds) * self.num_questions


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One answer.

    Args:
        method: With its budget and seed, the setting that it belongs to.
        budget: As on the command line.
        seed: Seed of the scenes.
        scene: Number of the scene in the seed's set.
        kind: The question's kind.
        setting: POPE's, for existence; else "".
        question: Asked.
        expected: What is right.
        said: What came.
        is_right: After normalisation.
        num_prompt_tokens: Tokens of the request's prompt.
        num_image_tokens: Kept of the image; None where the server does not count them.
        latency_ms: Latency of the request, others running beside it.
        cell_s: How long all questions of the setting took.
        question_set: `fingerprint` of the setting's questions.
        coverage: Share of the coverage that the kept tokens reach, as the server tells it; None for a method that does
            not go by coverage, and in files from before it was asked for.
        coverage_bound: No set of as many tokens reaches a larger one.
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
    coverage: float | None = None
    coverage_bound: float | None = None

    @property
    def of(self) -> Setting:
        """The setting that it belongs to."""
        return Setting(self.method, self.budget, self.seed)


def answers_beside(rows: Path) -> Path:
    """Returns where the answers of a file of rows are: not a .jsonl, which `mmtok bench report` would read as rows."""
    return rows.with_suffix(".answers")


def append_answers(path: Path, answers: Iterable[ScoredAnswer]) -> None:
    """Writes a finished setting's answers, a JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(answers))


def replace_answers(path: Path, answers: Iterable[ScoredAnswer]) -> None:
    """Writes the answers in place of those that are there, which stay as they are until all are written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(_lines(answers), encoding="utf-8")
    partial.replace(path)


def read_answers(path: Path) -> dict[Setting, list[ScoredAnswer]]:
    """Returns the answers by setting, in the order of the file; none for a file that is not there.

    Raises:
        ValueError: A line that is no answer; the message has its number.
    """
    settings: dict[Setting, list[ScoredAnswer]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            answer = ScoredAnswer(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no answer of mmtok quality: {error}") from error
        settings.setdefault(answer.of, []).append(answer)
    return settings


def _lines(answers: Iterable[ScoredAnswer]) -> str:
    return "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
