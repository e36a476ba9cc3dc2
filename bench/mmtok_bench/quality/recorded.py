"""Recorded scores of the pocket models at one budget, with which `make test` compares answers to some questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtok_bench.families import FamilyName
from mmtok_bench.quality.rows import ALL_SEEDS
from mmtok_bench.results import ResultRow

__all__ = ["RECORDED", "RECORDED_BUDGET", "RECORDED_METHOD", "read_recorded", "record"]

RECORDED = Path(__file__).resolve().with_name("recorded.json")
RECORDED_METHOD, RECORDED_BUDGET = "mmtok", "25%"


def record(rows: Sequence[ResultRow], family: FamilyName, path: Path) -> None:
    """Writes a family's scores of MMTok at 25%, over all seeds; scores of other families stay.

    Raises:
        ValueError: No row has this method and budget over all seeds.
    """
    wanted = {"method": RECORDED_METHOD, "budget": RECORDED_BUDGET, "seed": ALL_SEEDS}
    chosen = [row for row in rows if wanted.items() <= row.case.items()]
    if not chosen:
        raise ValueError(f"nothing to record: expected {RECORDED_METHOD} at {RECORDED_BUDGET} over several seeds")
    recorded = {
        "accuracy": {row.case["kind"]: round(row.metrics["accuracy"], 4) for row in chosen},
        "num_questions": {row.case["kind"]: row.num_runs for row in chosen},
        "question_set": chosen[0].case["question_set"],
        "commit": chosen[0].commit,
        "time": chosen[0].time,
    }
    families = dict(sorted({**read_recorded(path), family: recorded}.items()))
    path.write_text(json.dumps(families, indent=2) + "\n", encoding="utf-8")


def read_recorded(path: Path = RECORDED) -> dict[FamilyName, dict[str, Any]]:
    """Returns the recorded scores by family; empty if there is no file.

    Each has `accuracy` and `num_questions` by kind, the `question_set` of all seeds, `commit` and `time`.
    """
    families: dict[FamilyName, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return families
