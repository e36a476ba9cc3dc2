"""The settings of `mmtok quality` on the pocket tasks, and the file of all answers beside the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmtok_bench.families import FAMILY_TRAITS, FamilyName
from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.pocket.questions import KINDS, PAGE_KINDS, AskedScene, Kind, check_kinds
from mmtok_bench.quality.scoring import is_right
from mmtok_deploy.config import KeySource
from mmtok_deploy.methods import IMAGE_METHODS, MethodName, check_method, needs_frames, reads_keys

__all__ = [
    "METHODS_INSIDE",
    "UNPRUNED",
    "WITH_AGENT",
    "WITH_OUTPUT_KEYS",
    "QualityPlan",
    "ScoredAnswer",
    "Setting",
    "answers_beside",
    "append_answers",
    "method_by_input",
    "read_answers",
    "replace_answers",
    "split_method",
]

UNPRUNED = "unpruned"
"""The name of the method at the budgets "all", "all@0.5" and "all~8", where no tokens are selected."""
WITH_AGENT = "mmtok+agent"
"""MMTok on a second server, which adds an agent's answer to the guidance."""
METHODS_INSIDE = ("fastv", "sparsevlm")
"""Methods that drop tokens inside the language model; only `mmtok pocket answers` can run them."""
WITH_OUTPUT_KEYS = "+output"
"""Suffix of a method that compares image tokens by the projector's output: `mmtok+output`."""


def split_method(name: str) -> tuple[MethodName, KeySource]:
    """Returns the method and the source of its keys for a name such as `mmtok` or `mmtok+output`.

    Raises:
        ValueError: The method is unknown, or compares no tokens by keys.
    """
    bare = name.removesuffix(WITH_OUTPUT_KEYS)
    method = check_method(bare)
    if bare == name:
        return method, "input"
    if not reads_keys(method):
        raise ValueError(f"{name}: {method} reads no keys of image tokens, drop {WITH_OUTPUT_KEYS}")
    return method, "output"


def method_by_input(name: str) -> str | None:
    """Returns `mmtok` for `mmtok+output`: the method with keys from the projector's input; None for other names."""
    return name.removesuffix(WITH_OUTPUT_KEYS) if name.endswith(WITH_OUTPUT_KEYS) else None


@dataclass(frozen=True, slots=True)
class Setting:
    """A method, a budget and a seed; all questions of the seed are asked with this method and budget."""

    method: str
    budget: str
    seed: int


@dataclass(frozen=True, slots=True)
class QualityPlan:
    """The settings and questions of one run.

    Args:
        methods: Methods of selecting tokens, as `split_method` reads them; `WITH_AGENT` is one.
        budgets: Budgets as `MixedBudget.parse` reads them. "all" and "all@0.5" are asked first, and once for all
            methods. At "auto", the server chooses for each question.
        seeds: Seeds of the held-out scenes, and of the method `random`.
        kinds: Kinds of questions.
        num_questions: Questions of each kind and seed.

    Raises:
        ValueError: A field is empty or has a value twice, a method, a budget or a kind is unknown, or a method is for
            videos.
    """

    methods: tuple[str, ...] = IMAGE_METHODS
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
            if method not in (WITH_AGENT, *METHODS_INSIDE) and needs_frames(split_method(method)[0]):
                raise ValueError(
                    f"{method} goes by the frames of a video, and the tasks ask about images: expected some of "
                    f"{', '.join(IMAGE_METHODS)}"
                )
        for budget in self.budgets:
            MixedBudget.parse(budget)
        if any(not 0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"a seed is between 0 and 2**32 - 1, got {self.seeds}")
        check_kinds(self.kinds)
        if self.num_questions < 1:
            raise ValueError(f"expected at least 1 question of each kind, got {self.num_questions}")

    def check_family(self, family: FamilyName) -> None:
        """Raises ValueError for a method that models of the family cannot run."""
        impossible = FAMILY_TRAITS[family].impossible_methods
        for method in self.methods:
            if method in impossible:
                raise ValueError(
                    f"{family} does not run {method}: expected some of "
                    f"{', '.join(name for name in IMAGE_METHODS if name not in impossible)}"
                )

    def pairs(self) -> list[tuple[str, str]]:
        """Returns methods and budgets in the order in which they are asked.

        `downsample` runs on whole images alone, and not at the budget auto.
        """
        parsed = {budget: MixedBudget.parse(budget) for budget in self.budgets}
        whole = sorted((each for each in parsed if parsed[each].is_all), key=lambda each: parsed[each].encodes_less)
        pruned = [
            (method, budget)
            for budget in self.budgets
            if budget not in whole
            for method in self.methods
            if method != "downsample" or not (parsed[budget].encodes_less or parsed[budget].is_auto)
        ]
        return [*((UNPRUNED, budget) for budget in whole), *pruned]

    def settings(self) -> Iterator[Setting]:
        """Yields the settings in the order in which they are asked."""
        for method, budget in self.pairs():
            yield from (Setting(method, budget, seed) for seed in self.seeds)

    @property
    def is_about_pages(self) -> bool:
        """Whether the questions are about pages, not about scenes."""
        return self.kinds[0] in PAGE_KINDS

    @property
    def num_requests(self) -> int:
        """Questions of all settings together."""
        return len(self.pairs()) * len(self.seeds) * len(self.kinds) * self.num_questions


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One answer, and whether it is right.

    Args:
        method: Method of the answer's setting.
        budget: Budget of the setting, as on the command line.
        seed: Seed of the setting.
        scene: Number of the scene in the seed's set.
        kind: The question's kind.
        setting: POPE's setting of a question about existence; otherwise "".
        question: Text of the question.
        expected: The right answer.
        said: The model's answer.
        is_right: Whether both answers are equal after normalisation.
        num_prompt_tokens: Tokens of the request's prompt.
        num_image_tokens: Image tokens that were kept; None if the server does not count them.
        latency_ms: Latency of the request, while other requests run.
        cell_s: Seconds that all questions of the setting took.
        question_set: `fingerprint` of the setting's questions.
        coverage: Share of the coverage that the kept tokens reach, as the server reports it; None for a method that
            does not maximise coverage, and in older files.
        coverage_bound: Upper bound of the coverage of any set of as many tokens.
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

    @classmethod
    def to_question(cls, setting: Setting, asked: AskedScene, number: int, said: str, **measured: Any) -> ScoredAnswer:
        """Returns the scored answer to question `number` about a scene; `measured` has the fields after `is_right`."""
        question = asked.questions[number]
        return cls(
            *(setting.method, setting.budget, setting.seed, asked.index, question.kind, asked.settings[number]),
            *(question.text, question.answer, said, is_right(question, said)),
            **measured,
        )

    @property
    def of(self) -> Setting:
        """The setting of the answer."""
        return Setting(self.method, self.budget, self.seed)


def answers_beside(rows: Path) -> Path:
    """Returns the file of answers beside a file of rows; `mmtok bench report` would read a .jsonl file as rows."""
    return rows.with_suffix(".answers")


def append_answers(path: Path, answers: Iterable[ScoredAnswer]) -> None:
    """Appends a finished setting's answers, one JSON object per line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(answers))


def replace_answers(path: Path, answers: Iterable[ScoredAnswer]) -> None:
    """Replaces all answers of a file; the old ones stay until the new ones are written completely."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(_lines(answers), encoding="utf-8")
    partial.replace(path)


def read_answers(path: Path) -> dict[Setting, list[ScoredAnswer]]:
    """Returns the answers by setting, in the order of the file; empty if there is no file.

    Raises:
        ValueError: A line is no answer; the message has its number.
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
