from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmtok_bench.pocket.questions import KINDS, PAGE_KINDS, fingerprint, make_scenes
from mmtok_bench.quality.plan import ScoredAnswer, append_answers
from mmtok_bench.results import read_rows
from mmtok_deploy.auto_budget import SHARES, what_is_asked
from mmtok_deploy.cli import main
from pocket_training.auto_budget import ASKED, image_features, lines_of_comparison, shares_of
from tests.bench.report.rows import row

MEASURED = [
    Path(__file__).parents[3] / "docs" / "measured" / f"quality-{name}.jsonl"
    for name in ("cpu", "qwen-cpu", "pages-cpu")
]
SCENES = make_scenes(0, 40)


def test_the_shares_are_those_of_the_measured_rows() -> None:
    shares = shares_of([row for path in MEASURED for row in read_rows(path)])
    assert shares == {asked: SHARES[asked] for asked in shares}
    assert set(shares) == set(SHARES) - {"other"}


def test_each_kind_of_the_pocket_questions_is_recognised() -> None:
    asked = {(each.kind, what_is_asked(each.text)) for scene in make_scenes(3, 50) for each in scene.questions}
    assert asked == {(kind, ASKED[kind]) for kind in KINDS}


def test_questions_about_pages_keep_what_pages_need() -> None:
    """They have no word for reading, and so keep as much as the neediest of those that are recognised."""
    asked = {what_is_asked(each.text) for scene in make_scenes(3, 5, PAGE_KINDS) for each in scene.questions}
    assert asked == {"other"}
    assert SHARES["other"] == SHARES["read"] == max(SHARES.values())


def test_the_command_prints_the_shares(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pocket", "shares", *map(str, MEASURED)]) == 0
    assert capsys.readouterr().out == "where   5%\nwhether 11%\ncount   25%\nread    50%\n"


def test_no_share_that_is_enough() -> None:
    case = {"kind": "position", "method": "mmtok", "budget": "25%", "seed": "all"}
    smaller_images = row("quality", {**case, "budget": "50%@0.5"}, {"share": 1.0})
    few = [smaller_images, *(row("quality", case, {"share": share}) for share in (0.95, 0.89))]
    with pytest.raises(ValueError, match="no share keeps 90% of the right answers about position"):
        shares_of(few)


def answers(budget: str, num_image_tokens: int, wrong: str) -> list[ScoredAnswer]:
    """Returns answers of which those of one kind are wrong."""
    return [
        ScoredAnswer(
            *("mmtok", budget, 0, scene.index, asked.kind, setting, asked.text, asked.answer, ""),
            *(asked.kind != wrong, 10, num_image_tokens, 1.0, 1.0, fingerprint(SCENES)),
        )
        for scene in SCENES
        for asked, setting in zip(scene.questions, scene.settings, strict=True)
    ]


@pytest.mark.slow
def test_auto_beside_another_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pocket.answers"
    assert main(["pocket", "auto", str(path)]) == 1
    assert "has no answers of the budget auto: mmtok pocket answers" in capsys.readouterr().err
    append_answers(path, [*answers("auto", 30, ""), *answers("32", 32, "count")])
    lines = lines_of_comparison(path)
    assert lines[2:4] == [
        "| auto | 30 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |  |",
        "| 32 | 32 | 100.0 | 0.0 | 100.0 | 100.0 | 75.0 | 25.0 (25.0 to 25.0) |",
    ]
    assert [line.split(" | ")[:2] for line in lines[-len(KINDS) :]] == [["| 32", kind] for kind in KINDS]


def test_features_of_a_blank_picture_and_of_one_with_an_edge() -> None:
    blank = Image.new("RGB", (112, 112), "grey")
    assert image_features(blank) == dict.fromkeys(image_features(blank), 0.0) | {"distinct patches": 1.0}
    blank.paste("white", (0, 0, 60, 112))
    found = image_features(blank)
    # One column of 112, and the column of patches that it is in.
    assert found["edges"] == pytest.approx(112 / (2 * 111 * 112))
    assert found["busy patches"] == pytest.approx(1 / 14)
    assert found["distinct patches"] == 3
