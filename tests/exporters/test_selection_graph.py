from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from mmtok_deploy import Selection, SelectionConfig
from mmtok_deploy.config import Coverage
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.problem import SelectionProblem
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import FORMS, Form
from tests.exporters.graphs import all_nodes, batch_of, run, session_of, spec_for
from tests.mmtok_deploy.problems import GOLDEN_NAMES, Problem, assert_greedy, golden, mask_of, random_problem

COVERAGES: tuple[Coverage, ...] = get_args(Coverage)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    chosen: Form = request.param
    return chosen


def assert_answer(
    outputs: dict[str, torch.Tensor], row: int, problem: SelectionProblem, config: SelectionConfig = SelectionConfig()
) -> None:
    order, kept, coverage = (outputs[name][row, : problem.num_picks] for name in ("order", "kept", "coverage"))
    selection = Selection(order, kept, coverage, outputs["total"][row])
    assert_greedy(selection, problem, config)
    assert (outputs["order"][row, problem.num_picks :] == -1).all()
    assert (outputs["kept"][row, problem.num_picks :] == -1).all()
    assert torch.equal(outputs["visual_tokens"][row, : problem.num_picks], problem.vision[selection.kept])


class TestGolden:
    @pytest.mark.parametrize("name", GOLDEN_NAMES)
    @pytest.mark.parametrize("sizes", ["static", "dynamic"])
    def test_one_image_and_three_with_different_padding(self, form: Form, sizes: str, name: str) -> None:
        case = golden(name)
        num_words, num_tokens = len(case.problem.text) + 5, len(case.problem)
        backwards = torch.arange(num_tokens - 1, -1, -1)
        images = [
            case.problem,
            replace(case.problem, text=case.problem.text.flip(0)),
            case.problem.take(backwards),
        ]
        orders = [case.order, case.order, backwards[case.order].tolist()]
        words, tokens = DimRange.fixed(num_words), DimRange.fixed(num_tokens)
        dynamic = spec_for(
            case.problem,
            case.budget,
            form,
            config=case.config,
            num_tokens=DimRange(case.budget, num_tokens, num_tokens + 9),
            num_words=DimRange(1, num_words, num_words + 9),
            batch=DimRange(1, 2, 4),
        )
        if sizes == "dynamic":
            sessions = dict.fromkeys((1, 3), session_of(dynamic))
        else:
            sessions = {
                batch: session_of(replace(dynamic, num_tokens=tokens, num_words=words, batch=DimRange.fixed(batch)))
                for batch in (1, 3)
            }
        for batch, session in sessions.items():
            inputs = batch_of(images[:batch], num_words, in_front=batch == 1)
            for row in range(1, batch):  # each image has its padding elsewhere
                for name in ("text", "text_mask"):
                    inputs[name][row] = inputs[name][row].roll(2 * row, dims=0)
            outputs = run(session, inputs)
            assert outputs["order"].tolist() == orders[:batch]
            assert outputs["kept"].tolist() == [sorted(order) for order in orders[:batch]]
            for image, visual_tokens, kept in zip(images, outputs["visual_tokens"], outputs["kept"], strict=False):
                assert torch.equal(visual_tokens, image.vision[kept])


@pytest.mark.parametrize("coverage", COVERAGES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
def test_every_constant(form: Form, coverage: Coverage, alpha: float) -> None:
    problem, config = random_problem(40, 4), SelectionConfig(0.05, 0.3, alpha, coverage)
    outputs = run(session_of(spec_for(problem, 12, form, config=config)), batch_of([problem]))
    assert_answer(outputs, 0, problem.picking(12), config)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_without_words_the_image_alone_is_covered(form: Form, alpha: float) -> None:
    problem, config = random_problem(30, 0), SelectionConfig(alpha=alpha)
    spec = spec_for(problem, 7, form, config=config, num_words=DimRange.fixed(3))
    outputs = run(session_of(spec), batch_of([problem], num_words=3))
    assert_answer(outputs, 0, problem.picking(7), config)


def test_whole_numbers_are_constants_too(form: Form) -> None:
    problem, config = random_problem(20, 3), SelectionConfig(1, 2, 3)
    outputs = run(session_of(spec_for(problem, 4, form, config=config)), batch_of([problem]))
    assert_answer(outputs, 0, problem.picking(4), config)


def test_exact_ties_of_what_is_left_go_to_the_lowest_index(form: Form) -> None:
    # Three kinds of tokens and a word like the rarest: that one first, one of each other kind, then nothing but ties.
    tokens = torch.eye(3)[[0, 1, 0, 2, 1, 0]]
    problem = Problem(tokens, tokens, tokens[3:4])
    assert run(session_of(spec_for(problem, 6, form)), batch_of([problem]))["order"].tolist() == [[3, 0, 1, 2, 4, 5]]


def test_exact_ties_go_to_the_lowest_index(form: Form) -> None:
    # Unit rows of halves: every product and sum is exact in float32, on any processor.
    problem = Problem(torch.ones(200, 4), torch.ones(200, 4), torch.ones(2, 4))
    outputs = run(session_of(spec_for(problem, 150, form)), batch_of([problem]))
    assert outputs["order"].tolist() == [list(range(150))]


def test_excluded_tokens_are_never_picked_and_missing_ones_are_minus_one(form: Form) -> None:
    excluded = [0, 3, 4, 5, 9]
    problem = random_problem(10, 3, excluded)
    outputs = run(session_of(spec_for(problem, 8, form)), batch_of([problem]))
    assert_answer(outputs, 0, problem.picking(8))
    assert outputs["order"][0, 5:].tolist() == [-1, -1, -1]
    assert not outputs["visual_tokens"][0, 5:].any()
    assert (outputs["coverage"][0, 5:] == outputs["coverage"][0, 4]).all()


def test_all_excluded(form: Form) -> None:
    problem = random_problem(6, 3, list(range(6)))
    outputs = run(session_of(spec_for(problem, 4, form)), batch_of([problem]))
    assert outputs["order"].tolist() == outputs["kept"].tolist() == [[-1] * 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("feature", ["vision", "keys", "text"])
def test_a_feature_that_is_not_finite_shows_in_its_own_total(form: Form, feature: str, value: float) -> None:
    problem = random_problem(20, 3)
    inputs = batch_of([problem, problem])
    inputs[feature][1, 2, 1] = value
    outputs = run(session_of(spec_for(problem, 5, form, batch=2)), inputs)
    assert_answer(outputs, 0, problem.picking(5))
    assert math.isnan(outputs["total"][1])
    assert ((outputs["order"][1] >= 0) & (outputs["order"][1] < 20)).all()


def test_float16_features_are_computed_in_float32(form: Form) -> None:
    case = golden("llava_n256_k32")
    half = case.problem.to(torch.float16)
    spec = spec_for(half, case.budget, form, config=case.config, dtype="float16")
    inputs = batch_of([case.problem])
    inputs |= {name: inputs[name].half() for name in ("vision", "keys", "text")}
    outputs = run(session_of(spec), inputs)
    assert_answer(outputs, 0, half.picking(case.budget), case.config)


@pytest.mark.parametrize("budget", [1, 9])
def test_one_token_and_every_token(form: Form, budget: int) -> None:
    problem = random_problem(9, 2)
    outputs = run(session_of(spec_for(problem, budget, form)), batch_of([problem]))
    assert_answer(outputs, 0, problem.picking(budget))


def test_a_smaller_budget_is_the_beginning_of_a_larger_one(form: Form) -> None:
    problem = random_problem(50, 3)
    small, large = (run(session_of(spec_for(problem, k, form)), batch_of([problem])) for k in (5, 20))
    assert small["order"][0].tolist() == large["order"][0, :5].tolist()


def test_no_boolean_is_scattered(form: Form) -> None:
    """TensorRT's documentation lists numbers alone for its Scatter."""
    nodes = list(all_nodes(ir.to_proto(build_selection(spec_for(random_problem(40, 3), 6, form))).graph))
    made_by = {name: node.op_type for node in nodes for name in node.output}
    scattered = [made_by[node.input[2]] for node in nodes if node.op_type.startswith("Scatter")]
    assert bool(scattered) == (form == "lazy")
    assert not {"And", "Equal", "Greater", "Less", "Not", "Or"} & set(scattered)


def test_standard_operators_alone(form: Form) -> None:
    model = ir.to_proto(build_selection(spec_for(random_problem(9), 4, form)))
    assert {node.domain for node in all_nodes(model.graph)} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]


@pytest.mark.parametrize("sizes", [{}, {"num_tokens": DimRange(4, 9, 20), "batch": DimRange(1, 1, 3)}])
def test_shapes_are_stated(form: Form, sizes: dict[str, DimRange]) -> None:
    model = build_selection(spec_for(random_problem(9), 4, form, **sizes))  # type: ignore[arg-type]
    batch, tokens = ("B", "N") if sizes else (1, 9)
    shapes = {
        value.name: [str(size) for size in value.shape or ()] for value in (*model.graph.inputs, *model.graph.outputs)
    }
    assert shapes == {
        "vision": [str(batch), str(tokens), "8"],
        "keys": [str(batch), str(tokens), "6"],
        "text": [str(batch), "3", "8"],
        "text_mask": [str(batch), "3"],
        "excluded": [str(batch), str(tokens)],
        "kept": [str(batch), "4"],
        "order": [str(batch), "4"],
        "visual_tokens": [str(batch), "4", "8"],
        "coverage": [str(batch), "4"],
        "total": [str(batch)],
    }


def test_the_lazy_form_evaluates_few_gains(tmp_path: Path) -> None:
    problem, budget = random_problem(300), 20
    model = ir.to_proto(build_selection(spec_for(problem, budget, "lazy")))
    nodes = list(all_nodes(model.graph))
    assert [node.op_type for node in nodes].count("Loop") == 2
    assert [node.op_type for node in nodes].count("TopK") == 2
    # One event in ONNX Runtime's profile is one round of the inner loop, which evaluates the columns that TopK gives.
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    run(session, batch_of([problem]))
    events = json.loads(Path(session.end_profiling()).read_text())
    rounds = [event["args"] for event in events if "evaluate/TopK" in event["name"]]
    assert len(rounds) >= budget
    # Every gain at every pick would be 6000; seen: 1472.
    assert sum(candidates["output_type_shape"][1]["int64"][1] for candidates in rounds) < len(problem) * budget / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget is at least 1, got 0"),
        ({"budget": 10}, "keeps 10 tokens needs images of at least as many, got 9"),
        ({"num_tokens": DimRange(1, 2, 3)}, "keeps 4 tokens needs images of at least as many, got 1:2:3"),
        ({"vision_width": 0}, "vision_width is at least 1"),
        ({"dtype": "int8"}, "dtype is one of float16, bfloat16, float32, got 'int8'"),
        ({"form": "scan"}, "form is one of lazy, loop, unrolled, got 'scan'"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    spec = spec_for(random_problem(9), 4)
    with pytest.raises(ValueError, match=message):
        replace(spec, **change)


def test_masks_are_read_where_they_differ_in_a_batch(form: Form) -> None:
    problem = random_problem(24, 3)
    images = [replace(problem, excluded=mask_of(tokens, 24)) for tokens in ([0, 1], [], list(range(20)))]
    outputs = run(session_of(spec_for(problem, 4, form, batch=3)), batch_of(images))
    for row, image in enumerate(images):
        assert_answer(outputs, row, image.picking(4))
