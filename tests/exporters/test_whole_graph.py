from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmtok_deploy import Budget, SelectionConfig
from mmtok_deploy.cli import main
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import Manifest
from mmtok_export.artifact import export_model
from mmtok_export.attach import Attached, Attachment, attach_selection
from mmtok_export.encoder import build_joined_encoder
from mmtok_export.picks import CheckFailedError
from mmtok_export.pixels import CLIP_SCALE, images_of, patches_of
from tests.exporters.encoder_cases import checkpoint

SIZE = (56, 42)


class SmallEncoder(nn.Module):
    """Patches of 14 pixels, a layer, a projector; tokens of the dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.patches = nn.Conv2d(3, 24, 14, 14)
        self.layer = nn.Linear(24, 24)
        self.projector = nn.Linear(24, 16)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.layer(self.patches(pixels).flatten(2).transpose(1, 2))
        return self.projector(torch.tanh(keys)).to(self.dtype), keys


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("small") / "visual.onnx", torch.float32)


def save_encoder(path: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, SIZE[1], SIZE[0])
    torch.onnx.export(
        SmallEncoder(dtype).eval(),
        (pixels,),
        path,
        input_names=["pixels"],
        output_names=["vision", "keys"],
        dynamo=True,
        verbose=False,
    )
    return path


def attachment() -> Attachment:
    return Attachment(
        vision="vision",
        keys="keys",
        keys_per_token=1,
        keys_index=None,
        budget=Budget(tokens=4),
        num_tokens=None,
        num_words=DimRange(1, 3, 8),
        config=SelectionConfig(),
        form="lazy",
    )


def export(onnx_file: Path, path: Path, change: Any = None) -> Manifest:
    attached = attach_selection(onnx_file, attachment())
    if change is not None:
        change(attached)
    return export_model(
        attached.model, path, "attached", attached.spec, details=attached.details, encoder=attached.encoder
    )


def test_the_whole_graph_runs_on_photographs(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = export(onnx_file, tmp_path / "a.onnx").check
    assert check.status == "passed"
    assert "the whole graph on photographs: 4 picks compared, all equal; features as of the encoder" in check.detail
    assert main(["export", "check", str(tmp_path / "a.onnx")]) == 0
    assert "the whole graph on photographs: 4 picks compared" in capsys.readouterr().out


def test_a_weight_that_is_not_a_number(onnx_file: Path, tmp_path: Path) -> None:
    model = ir.load(onnx_file)
    weight = model.graph.initializers["layer.bias"]
    assert weight.const_value is not None
    values = weight.const_value.numpy().copy()
    values[3] = np.nan
    weight.const_value = ir.tensor(values, name="layer.bias")
    broken = tmp_path / "broken.onnx"
    ir.save(model, broken, external_data="broken.data")
    with pytest.raises(CheckFailedError, match=r"the encoder's vision are not finite \(NaN or infinite\)"):
        export(broken, tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("edge", ["vision", "keys"])
def test_features_that_are_not_the_encoders(onnx_file: Path, tmp_path: Path, edge: str) -> None:
    def square(attached: Attached) -> None:
        model, name = attached.model, attached.details["edges"][edge]["name"]
        (node,) = (node for node in model.graph if node.outputs[0].name == name)
        value = node.inputs[0]
        assert value is not None
        squared = ir.node("Mul", [value, value])
        squared.outputs[0].name = "squared"
        squared.outputs[0].shape, squared.outputs[0].type = value.shape, value.type
        node.replace_input_with(0, squared.outputs[0])
        model.graph.insert_before(node, squared)

    with pytest.raises(CheckFailedError, match=f"{edge} are not those of the encoder alone: they differ by"):
        export(onnx_file, tmp_path / "a.onnx", square)


@pytest.mark.parametrize(("dtype", "percent"), [(torch.float32, 1), (torch.float16, 1), (torch.float16, 10)])
def test_keys_of_a_half_precision_encoder_may_differ_by_its_rounding(
    tmp_path: Path, dtype: torch.dtype, percent: int
) -> None:
    """Keys are float32 all the same: means of what the encoder has rounded."""

    def enlarge(attached: Attached) -> None:
        model, name = attached.model, attached.details["edges"]["keys"]["name"]
        (node,) = (node for node in model.graph if node.outputs[0].name == name)
        value, factor = node.inputs[0], ir.tensor(np.array(1 + percent / 100, np.float32), name="factor")
        constant = ir.node("Constant", [], {"value": factor})
        enlarged = ir.node("Mul", [value, constant.outputs[0]])
        node.replace_input_with(0, enlarged.outputs[0])
        model.graph.insert_before(node, [constant, enlarged])

    path = save_encoder(tmp_path / "visual.onnx", dtype)
    if dtype == torch.float16 and percent == 1:
        export(path, tmp_path / "a.onnx", enlarge)
    else:
        with pytest.raises(CheckFailedError, match="keys are not those of the encoder alone: they differ by"):
            export(path, tmp_path / "a.onnx", enlarge)


def test_given_inputs_of_the_whole_graph(onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(onnx_file, tmp_path / "a.onnx")
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIZE[1], SIZE[0]), dtype=np.float32)
    np.savez(tmp_path / "own.npz", pixels=pixels)
    assert main(["export", "check", str(tmp_path / "a.onnx"), f"--features={tmp_path}/own.npz"]) == 0
    assert "check passed: the whole graph on the given inputs: 4 picks" in capsys.readouterr().out
    features: dict[str, Any] = {"vision": np.ones((1, 12, 16), np.float32), "keys": np.ones((1, 12, 24), np.float32)}
    np.savez(tmp_path / "own.npz", text=features["vision"][:, :3], **features)
    assert main(["export", "check", str(tmp_path / "a.onnx"), f"--features={tmp_path}/own.npz"]) == 0
    assert "check selection only: of the given features" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.exhaustive), "float16", "bfloat16"])
def test_an_encoder_of_ours(tmp_path: Path, dtype: Any) -> None:
    joined = build_joined_encoder(
        checkpoint("qwen2.5-vl"),
        (112, 84),
        4,
        num_words=DimRange.fixed(5),
        dtype=dtype,
        form="lazy",
        batch=DimRange.fixed(2),
    )
    manifest = export_model(
        joined.model, tmp_path / "a.onnx", "encoder", joined.spec, details=joined.details, encoder=joined.encoder
    )
    dtypes = {tensor.name: tensor.dtype for tensor in (*manifest.inputs, *manifest.outputs)}
    assert (dtypes["pixels"], dtypes["text"], dtypes["visual_tokens"]) == ("float32", dtype, dtype)
    # Means over merged patches, which float16 may not hold.
    assert manifest.details["edges"]["keys"]["dtype"] == "float32"
    if dtype == "bfloat16":  # whose matrices ONNX Runtime's CPU provider does not multiply
        assert manifest.check.status == "selection only"
        assert "the whole graph did not run: ONNX Runtime" in manifest.check.detail
    else:
        assert manifest.check.status == "passed"
        assert "the whole graph on photographs: 8 picks compared" in manifest.check.detail


def test_pixels_are_the_image_processors() -> None:
    from transformers import CLIPImageProcessor, Qwen2VLImageProcessor

    images = images_of((112, 84), 2)
    plain = [Image.fromarray(each) for each in _bytes_of(images)]
    processed = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=10**6)(images=plain, return_tensors="pt")
    torch.testing.assert_close(patches_of(images, 14, 2, 2), processed["pixel_values"], rtol=0, atol=1e-5)
    square = images_of((112, 112), 1)
    (picture,) = (Image.fromarray(each) for each in _bytes_of(square))
    processed = CLIPImageProcessor(do_resize=False, do_center_crop=False)(images=[picture], return_tensors="pt")
    torch.testing.assert_close(square, processed["pixel_values"], rtol=0, atol=1e-5)


def _bytes_of(images: Tensor) -> list[Any]:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in CLIP_SCALE.values())
    scaled = ((images * std + mean) * 255).round().to(torch.uint8)
    return [each.permute(1, 2, 0).numpy() for each in scaled]
