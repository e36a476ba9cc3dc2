"""How many tokens are kept, told when the graph runs."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtok_deploy import Selection, SelectionConfig
from mmtok_deploy.cli import main
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines import EngineError, open_engine
from mmtok_deploy.executors import make_executor
from mmtok_deploy.manifest import Manifest
from mmtok_export.encoder import build_joined_encoder
from mmtok_export.spec import Form
from tests.exporters.encoder_cases import checkpoint
from tests.exporters.graphs import batch_of, run, session_of, spec_for
from tests.mmtok_deploy.problems import assert_greedy, random_problem

CPU = torch.device("cpu")
LARGEST = 24
TOLD: tuple[Form, ...] = ("lazy", "loop")


@pytest.fixture(scope="module", params=TOLD)
def session(request: pytest.FixtureRequest) -> Any:
    spec = spec_for(
        random_problem(40),
        LARGEST,
        request.param,
        num_tokens=DimRange(4, 40, 60),
        num_words=DimRange(1, 3, 9),
        batch=DimRange(1, 1, 4),
    )
    return session_of(replace(spec, takes_budget=True))


@pytest.mark.parametrize("budget", [1, 2, 7, 23, 24])
def test_a_smaller_budget_is_the_first_picks_sorted_anew(session: Any, budget: int) -> None:
    problem = random_problem(40)
    inputs = batch_of([problem])
    largest = run(session, inputs | {"budget": torch.tensor([LARGEST])})
    outputs = run(session, inputs | {"budget": torch.tensor([budget])})
    order = largest["order"][0, :budget]
    assert torch.equal(outputs["order"][0], order)
    assert torch.equal(outputs["coverage"][0], largest["coverage"][0, :budget])
    assert torch.equal(outputs["kept"][0], order.sort().values)
    assert torch.equal(outputs["visual_tokens"][0], problem.vision[order.sort().values])
    assert torch.equal(outputs["total"], largest["total"])


def test_each_image_of_a_batch_has_its_own(session: Any) -> None:
    images = [random_problem(40, seed=seed) for seed in range(3)]
    budgets = [5, 17, 1]
    outputs = run(session, batch_of(images) | {"budget": torch.tensor(budgets)})
    assert outputs["kept"].shape == (3, 17)
    for row, (problem, budget) in enumerate(zip(images, budgets, strict=True)):
        alone = run(session, batch_of([problem]) | {"budget": torch.tensor([budget])})
        for name in ("order", "kept", "visual_tokens"):
            assert torch.equal(outputs[name][row, :budget], alone[name][0])
        assert (outputs["kept"][row, budget:] == -1).all()
        assert (outputs["order"][row, budget:] == -1).all()
        assert not outputs["visual_tokens"][row, budget:].any()
        assert (outputs["coverage"][row, budget:] == outputs["coverage"][row, budget - 1]).all()


def test_a_budget_above_the_number_of_tokens_keeps_them_all(session: Any) -> None:
    problem = random_problem(9)
    outputs = run(session, batch_of([problem]) | {"budget": torch.tensor([20])})
    assert outputs["kept"][0].tolist() == [*range(9), *[-1] * 11]
    assert sorted(outputs["order"][0, :9].tolist()) == list(range(9))


@pytest.mark.parametrize(("asked", "kept"), [(0, 1), (-3, 1), (99, LARGEST)])
def test_outside_its_range_it_is_the_nearest(session: Any, asked: int, kept: int) -> None:
    outputs = run(session, batch_of([random_problem(40)]) | {"budget": torch.tensor([asked])})
    assert outputs["kept"].shape == (1, kept)


@pytest.mark.parametrize("form", ["lazy", "loop", "unrolled"])
def test_a_fixed_budget_above_the_number_of_tokens(form: Form) -> None:
    spec = spec_for(random_problem(9), 12, form, num_tokens=DimRange(4, 9, 20))
    outputs = run(session_of(spec), batch_of([random_problem(9)]))
    assert outputs["kept"][0].tolist() == [*range(9), -1, -1, -1]


@pytest.mark.parametrize("form", TOLD)
@pytest.mark.parametrize("num_tokens", [3, 10, 29, 60])
def test_a_share_of_any_number_of_tokens(form: Form, num_tokens: int) -> None:
    spec = spec_for(random_problem(40), 17, form, num_tokens=DimRange(3, 40, 60))
    session = session_of(replace(spec, share=Fraction(29, 100)))
    problem = random_problem(num_tokens)
    outputs = run(session, batch_of([problem]))
    num_kept = max(1, num_tokens * 29 // 100)
    assert outputs["kept"].shape == (1, num_kept)
    answer = {name: outputs[name][0] for name in ("order", "kept", "coverage", "total")}
    assert_greedy(Selection(**answer), problem.picking(num_kept), SelectionConfig())


def test_the_unrolled_form_refuses() -> None:
    for told in ({"takes_budget": True}, {"share": Fraction(1, 10)}):
        with pytest.raises(ValueError, match="unrolled form writes out a fixed number of picks: choose --form lazy"):
            replace(spec_for(random_problem(40), 4, "unrolled"), **told)


@pytest.mark.parametrize("name", ["text", "text_mask", "excluded", "keys", "budget"])
def test_another_shape_is_refused_and_not_repeated(session: Any, name: str) -> None:
    inputs = batch_of([random_problem(40), random_problem(40)]) | {"budget": torch.tensor([4, 4])}
    with pytest.raises(Exception, match=r"Concat|Expand|broadcast|Invalid|match"):
        run(session, inputs | {name: inputs[name][:1]})
    if name not in ("budget", "keys"):
        with pytest.raises(Exception, match=r"Concat|Expand|broadcast|Invalid|match"):
            run(session, inputs | {name: inputs[name][:, :1]})


SMALL = ["--tokens=8:16:40", "--text-tokens=1:3:8", "--vision-width=8", "--keys-width=6", "--dtype=float32"]


def export(path: Path, *arguments: str) -> int:
    return main(["export", "selection", *SMALL, f"--output={path}", *arguments])


def test_a_file_by_the_command_and_in_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.onnx"
    assert export(path, "--budget=12", "--budget-input", "--batch=1:4") == 0
    assert "keeps up to 12 tokens, lazy; B 1:4, N 8:16:40, M 1:3:8\n  check passed" in capsys.readouterr().out
    engine = open_engine(path, CPU)
    problem = random_problem(20)
    inputs = batch_of([problem, problem]) | {"budget": torch.tensor([3, 6])}
    assert engine.run(inputs)["kept"].shape == (2, 6)
    with pytest.raises(EngineError, match=r"budget is 1 to 12 of each image, got \[3, 13\]"):
        engine.run(inputs | {"budget": torch.tensor([3, 13])})
    executor = make_executor("auto", CPU, SelectionConfig(), path)
    problems = [problem.picking(4), random_problem(20, seed=1).picking(9)]
    for each, selection in zip(problems, executor.select(problems), strict=True):
        assert_greedy(selection, each, SelectionConfig())


def test_a_share_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.onnx"
    assert export(path, "--budget=25%") == 0
    assert "keeps 25%, lazy" in capsys.readouterr().out
    manifest = Manifest.load(path)
    assert (manifest.share, manifest.budget) == ("25%", 10)
    assert open_engine(path, CPU).run(batch_of([random_problem(21)]))["kept"].shape == (1, 5)
    with pytest.raises(EngineError, match="keeps 25% by itself, a server asks for a number"):
        make_executor("auto", CPU, SelectionConfig(), path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget=12", "--budget-input", "--form=unrolled"], "the unrolled form writes out a fixed number"),
        (["--budget=12", "--budget-input", "--tensorrt", "--target=8.6"], "an engine makes a fixed number of picks"),
        (["--budget=25%", "--tensorrt", "--target=8.6"], "an engine makes a fixed number of picks"),
    ],
)
def test_what_cannot_be_told_at_run_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert export(tmp_path / "a.onnx", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_with_an_encoder_and_its_unpruned_tokens(tmp_path: Path) -> None:
    from mmtok_export.artifact import export_model

    joined = build_joined_encoder(
        checkpoint("qwen2.5-vl"),
        (112, 84),
        6,
        takes_budget=True,
        is_unpruned_given=True,
        num_words=DimRange.fixed(3),
        dtype="float32",
        form="lazy",
    )
    path = tmp_path / "a.onnx"
    manifest = export_model(joined.model, path, "encoder", joined.spec, details=joined.details, encoder=joined.encoder)
    assert manifest.check.status == "passed"
    pixels = torch.randn(48, 1176, generator=torch.Generator().manual_seed(0))
    width = joined.spec.vision_width
    inputs = {
        "pixels": pixels,
        "text": torch.randn(1, 3, width),
        "text_mask": torch.ones(1, 3, dtype=torch.bool),
        "excluded": torch.zeros(1, 12, dtype=torch.bool),
        "budget": torch.tensor([4]),
    }
    outputs = open_engine(path, CPU).run(inputs)
    assert outputs["unpruned_tokens"].shape == (1, 12, width)
    assert torch.equal(outputs["visual_tokens"][0], outputs["unpruned_tokens"][0, outputs["kept"][0]])
    assert outputs["positions"].shape == (1, 3, 4)
