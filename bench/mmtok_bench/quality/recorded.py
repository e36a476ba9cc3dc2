"""What the pocket models reached at one budget, committed: `make test` asks a part of it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmtok_bench.families import Family
from mmtok_bench.quality.rows import ALL_SEEDS
from mmtok_bench.results import ResultRow

__all__ = ["RECORDED", "RECORDED_BUDGET", "RECORDED_METHOD", "Recorded", "read_recorded", "record"]

RECORDED = Path(__file__).resolve().with_name("recorded.json")
RECORDED_METHOD, RECORDED_BUDGET = "mmtok", "25%"


@dataclass(frozen=True, slots=True)
class Recorded:
    """The scores to hold, with where they come from.

    Args:
        accuracy: Of each kind.
        num_questions: Of each kind.
        question_set: `fingerprint` of the questions, of all seeds.
        commit: What was measured.
        time: When, ISO 8601, UTC.
    """

    accuracy: Mapping[str, float]
    num_questions: Mapping[str, int]
    question_set: str
    commit: str
    time: str


def record(rows: Sequence[ResultRow], family: Family, path: Path) -> None:
    """Writes a family's scores of MMTok at 25%, of all seeds; other families' stay.

    Raises:
        ValueError: The rows have none.
    """
    chosen = [
        row
        for row in rows
        if (row.case["method"], row.case["budget"], row.case["seed"]) == (RECORDED_METHOD, RECORDED_BUDGET, ALL_SEEDS)
    ]
    if not chosen:
        raise ValueError(f"nothing to record: expected {RECORDED_METHOD} at {RECORDED_BUDGET} over several seeds")
    recorded = Recorded(
        accuracy={str(row.case["kind"]): round(row.metrics["accuracy"], 4) for row in chosen},
        num_questions={str(row.case["kind"]): row.num_runs for row in chosen},
        question_set=str(chosen[0].case["question_set"]),
        commit=chosen[0].commit,
        time=chosen[0].time,
    )
    families = {**read_recorded(path), family: recorded}
    text = json.dumps({name: asdict(families[name]) for name in sorted(families)}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def read_recorded(path: Path = RECORDED) -> dict[Family, Recorded]:
    """Returns what was recorded of each family; nothing before anything was."""
    if not path.exists():
        return {}
    return {family: Recorded(**fields) for family, fields in json.loads(path.read_text(encoding="utf-8")).items()}
