"""Pixels in, kept tokens out: held against Hugging Face's encoder followed by the reference."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from mmtok_bench.families import FamilyName
from mmtok_deploy import Budget, select_tokens
from mmtok_deploy.cli import main
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.presets import PRESETS
from mmtok_export.encoder import build_joined_encoder, num_kept_of
from mmtok_export.spec import FORMS, Form
from tests.runtime.chats import small
from tests.runtime.conftest import checkpoint, judge_of

BUDGET = 12
OTHER_FORMS = [form for form in FORMS if form != "lazy"]


def export(path: Path, family: FamilyName, *arguments: str) -> Manifest:
    common = ["--budget", str(BUDGET), "--text-tokens=1:4:16", f"--output={path}"]
    assert main(["export", "encoder", f"--model={checkpoint(family)}", *common, *arguments]) == 0
    return Manifest.load(path)


@lru_cache(maxsize=2)
def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    session = session_of(path)
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def question(width: int = 256, num_tokens: int = 576) -> dict[str, Tensor]:
    """Returns five words and two rows of padding, and a token never to pick."""
    text = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(3))
    text[0, 5:] = float("nan")
    excluded = torch.zeros(1, num_tokens, dtype=torch.bool)
    excluded[0, 1] = True
    return {"text": text, "text_mask": torch.arange(7)[None] < 5, "excluded": excluded}


def assert_hugging_faces(
    family: FamilyName, outputs: dict[str, Tensor], asked: dict[str, Tensor], size: tuple[int, int]
) -> None:
    judge = judge_of(family)
    image = small("astronaut", *size)
    prompt = judge.prompt([{"role": "user", "content": [{"type": "image"}]}])
    inputs = judge.processor(text=[prompt], images=[image], return_tensors="pt")
    with torch.no_grad():
        ((rows, keys),), _ = judge._features(inputs, [image])
    width = asked["text"].shape[-1]
    vision = rows[:, :width]
    expected = select_tokens(
        vision, keys, asked["text"][0, :5], BUDGET, config=PRESETS[family].config, excluded=asked["excluded"][0]
    )
    assert outputs["order"][0].tolist() == expected.order.tolist()
    assert outputs["kept"][0].tolist() == expected.kept.tolist()
    torch.testing.assert_close(outputs["visual_tokens"][0], vision[expected.kept], rtol=0, atol=1e-4)
    if family.startswith("qwen3-vl"):
        planes = torch.stack(rows[expected.kept].split(width, dim=1)[1:])
        assert outputs["deepstack_tokens"].shape == (1, 3, BUDGET, width)
        torch.testing.assert_close(outputs["deepstack_tokens"][0], planes, rtol=0, atol=1e-4)
    else:
        assert "deepstack_tokens" not in outputs
    if family != "llava-1.5":
        positions, _ = judge._positions(inputs)
        image_positions = positions[:, inputs["input_ids"][0] == judge.model.config.image_token_id]
        in_image = image_positions - image_positions[:, :1]
        assert torch.equal(outputs["positions"][0], in_image[:, expected.kept])
    else:
        assert "positions" not in outputs


# A window has 4 x 4 merged patches. It is cut at both edges; in test-all also at neither, at the right, at the bottom.
@pytest.mark.parametrize(
    "size",
    [(336, 252), *(pytest.param(size, marks=pytest.mark.exhaustive) for size in ((224, 112), (252, 112), (224, 140)))],
)
def test_qwen(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "encoder.onnx"
    manifest = export(path, "qwen2.5-vl", f"--image-size={size[0]}x{size[1]}", "--dtype=float32")
    rows, columns = size[1] // 28, size[0] // 28
    assert manifest.details["grid"] == [1, rows, columns]
    assert manifest.dimensions["N"] == DimRange.fixed(rows * columns)
    assert [tensor.name for tensor in manifest.inputs] == ["pixels", "text", "text_mask", "excluded"]
    assert [tensor.name for tensor in manifest.outputs] == [
        *("kept", "order", "visual_tokens", "coverage", "total", "positions")
    ]
    judge = judge_of("qwen2.5-vl")
    pixels = judge.processor.image_processor(images=[small("astronaut", *size)], return_tensors="pt")["pixel_values"]
    asked = question(num_tokens=rows * columns)
    assert_hugging_faces("qwen2.5-vl", run(path, {"pixels": pixels, **asked}), asked, size)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "side"), [("qwen2-vl", 28), ("qwen2.5-vl", 28), ("qwen3-vl", 32), ("glm-4.1v", 28)])
def test_images_of_any_size(tmp_path: Path, family: FamilyName, side: int) -> None:
    path = tmp_path / "encoder.onnx"
    manifest = export(path, family, "--tokens=12:60:200", "--dtype=float32")
    assert manifest.check.status == "passed", manifest.check.detail
    assert manifest.dimensions["patches"] == DimRange(48, 240, 800)
    judge = judge_of(family)
    for columns, rows in ((8, 4), (9, 4), (5, 8), (12, 9)):
        size = columns * side, rows * side
        inputs = judge.processor.image_processor(images=[small("astronaut", *size)], return_tensors="pt")
        asked = question(num_tokens=rows * columns)
        pixels = {"pixels": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}
        assert_hugging_faces(family, run(path, pixels | asked), asked, size)


@pytest.mark.parametrize(
    ("family", "size", "budget", "kept"),
    [
        ("qwen2.5-vl", DimRange(12, 60, 200), "25%", (50, Fraction(1, 4))),
        ("qwen2.5-vl", DimRange(12, 60, 200), "12", (12, None)),
        ("qwen2.5-vl", (112, 112), "25%", (4, None)),
        ("llava-next", None, "160", (32, None)),
        ("llava-next", None, "10%", (57, None)),
    ],
)
def test_what_a_budget_keeps(family: FamilyName, size: Any, budget: str, kept: tuple[int, Fraction | None]) -> None:
    assert num_kept_of(checkpoint(family), size, Budget.parse(budget), batch=None, is_input=False) == kept


@pytest.mark.slow
def test_qwen3_vl_keeps_what_deepstack_adds_at_the_kept_tokens(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    manifest = export(path, "qwen3-vl", "--image-size=224x128", "--dtype=float32", "--unpruned", "--budget-input")
    assert manifest.check.status == "passed"
    assert {tensor.name: tensor.shape for tensor in manifest.outputs if "tokens" in tensor.name} == {
        "visual_tokens": (1, "K", 256),
        "deepstack_tokens": (1, 3, "K", 256),
        "unpruned_tokens": (1, 28, 256),
        "unpruned_deepstack_tokens": (1, 3, 28, 256),
    }
    judge = judge_of("qwen3-vl")
    image = small("astronaut", 224, 128)
    pixels = judge.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    asked = question(num_tokens=28)
    outputs = run(path, {"pixels": pixels, **asked, "budget": torch.tensor([BUDGET])})
    assert_hugging_faces("qwen3-vl", outputs, asked, (224, 128))
    kept = outputs["kept"][0]
    assert torch.equal(outputs["deepstack_tokens"][0], outputs["unpruned_deepstack_tokens"][0][:, kept])


@pytest.fixture(scope="module")
def llava_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava") / "encoder.onnx"
    export(path, "llava-1.5", "--dtype=float32")
    return path


@pytest.mark.parametrize("form", ["lazy", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in OTHER_FORMS)])
def test_llava(llava_file: Path, tmp_path: Path, form: Form) -> None:
    path = llava_file
    if form != "lazy":
        path = tmp_path / "encoder.onnx"
        export(path, "llava-1.5", "--dtype=float32", f"--form={form}")
    manifest = Manifest.load(path)
    assert manifest.details["image_size"] == [336, 336]
    assert manifest.check.status == "passed"
    judge = judge_of("llava-1.5")
    image = small("astronaut", 336, 252)
    pixels = judge.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    asked = question()
    assert_hugging_faces("llava-1.5", run(path, {"pixels": pixels, **asked}), asked, (336, 252))


@pytest.mark.slow
def test_a_batch_is_its_images(llava_file: Path, tmp_path: Path) -> None:
    joined = build_joined_encoder(
        checkpoint("llava-1.5"),
        None,
        BUDGET,
        num_words=DimRange.fixed(7),
        dtype="float32",
        form="lazy",
        batch=DimRange.fixed(2),
    )
    ir.save(joined.model, tmp_path / "two.onnx")
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    asked = question()
    twice = {name: torch.cat([each] * 2) for name, each in asked.items()}
    together = run(tmp_path / "two.onnx", {"pixels": pixels, **twice})
    for image in range(2):
        alone = run(llava_file, {"pixels": pixels[image : image + 1], **asked})
        assert together["kept"][image].tolist() == alone["kept"][0].tolist()


def test_a_share_of_the_images_tokens_and_random_weights_from_a_configuration_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes/config.json").write_bytes((checkpoint("qwen2.5-vl") / "config.json").read_bytes())
    arguments = ["export", "encoder", "--model=sizes", "--image-size=112x112", "--budget=25%"]
    assert main([*arguments, "--random-weights"]) == 0
    manifest = Manifest.load(tmp_path / "artifacts/export/encoder-sizes-k4.onnx")
    assert (manifest.budget, manifest.dimensions["N"]) == (4, DimRange.fixed(16))
    assert manifest.details["random_weights"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size=100x100"], "multiples of 28 px, got 100x100"),
        ([], "takes images of many sizes: name one, --image-size"),
        (["--image-size=112x112", "--tokens=4:16"], "not allowed with argument --image-size"),
        (["--tokens=4:16", "--tensorrt", "--target=8.6"], "takes images of one size: name --image-size in place"),
        (["--tokens=4:16", "--batch-size=1:2"], "takes a fixed number of images, got 1:2"),
        (["--image-size=112"], "an image size is WIDTHxHEIGHT"),
        # Known only once the encoder is exported; fast in the tests of `export selection`.
        pytest.param(
            ["--image-size=112x112", "--budget=17"],
            "keeps 17 tokens needs images of at least as many, got 16",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_usage_errors_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = ["export", "encoder", f"--model={checkpoint('qwen2.5-vl')}", "--budget=4", f"--output={tmp_path}/a.onnx"]
    try:
        assert main([*command, *arguments]) == 2
    except SystemExit as usage_error:
        assert usage_error.code == 2  # noqa: PT017
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
