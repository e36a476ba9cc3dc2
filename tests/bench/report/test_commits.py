from __future__ import annotations

import pandas as pd
import pytest

from mmtok_bench.report.commits import compare_commits
from mmtok_bench.report.frame import frame_of
from tests.bench.report.rows import CPU, GPU, NEW, OLD, selector_rows, serve_rows


def measured() -> pd.DataFrame:
    old = [*selector_rows(GPU, OLD), *selector_rows(CPU, OLD)[:2]]
    new = [*selector_rows(GPU, NEW, speed=2)[:-1], *serve_rows(CPU)[:1]]
    return frame_of([*old, *new])


def test_cases_of_both_commits_on_one_machine() -> None:
    together, alone = compare_commits(measured(), OLD, NEW).tables
    assert together.columns == ("machine", "bench", "case", "metric", OLD, NEW, f"{NEW} is")
    assert len(together.rows) == len(selector_rows()) - 1
    assert together.rows[0] == (
        *("Made-up GPU", "selector", "dense, num tokens 2880, num picks 160"),
        *("latency p50, ms", "469", "234", "2.00x faster"),
    )
    assert [(each[0], each[1], each[3]) for each in alone.rows] == [
        (GPU, "selector", OLD),
        (f"{CPU}, 2 threads", "selector", OLD),
        (f"{CPU}, 2 threads", "selector", OLD),
        (f"{CPU}, 2 threads", "serve", NEW),
    ]


def test_the_order_tells_the_direction() -> None:
    assert compare_commits(measured(), NEW, OLD).tables[0].rows[0][-1] == "2.00x slower"


def test_nothing_in_common_is_said() -> None:
    rows = frame_of([*selector_rows(CPU, OLD), *selector_rows(GPU, NEW)])
    part = compare_commits(rows, OLD, NEW)
    assert part.sentences == (f"No case was measured at both {OLD} and {NEW} on the same machine.",)
    assert [table.title for table in part.tables] == ["In one commit alone"]


@pytest.mark.parametrize("given", [OLD, OLD[:4], OLD + "a" * 33])
def test_a_commit_is_known_by_fewer_or_more_digits(given: str) -> None:
    assert compare_commits(measured(), given, NEW).title == f"{NEW} against {OLD}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ccc", NEW, f"'ccc' names 0 commits of these rows, expected one; there are: {OLD}, {NEW}"),
        (OLD + "+", NEW, "names 0 commits"),
        (OLD, OLD, "expected two commits to compare, got aaaaaaa twice"),
    ],
)
def test_commits_that_are_not_there(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        compare_commits(measured(), old, new)
