from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mmtok_deploy import Budget, SelectionConfig, select_tokens
from mmtok_deploy.cli import main
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import Manifest
from mmtok_export.artifact import export_model
from mmtok_export.attach import Attachment, attach_selection
from mmtok_export.foreign_graph import open_dimensions

NUM_TOKENS, GROUP, WIDTH, BUDGET = 24, 4, 10, 6


class WindowedEncoder(nn.Module):
    """Like Qwen2.5-VL's: merges groups of features, in another order than it answers in."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(12, WIDTH)
        self.merger = nn.Linear(GROUP * WIDTH, 16)

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.block(pixels)
        return features

    def forward(self, pixels: Tensor, reverse_window_index: Tensor) -> Tensor:
        merged: Tensor = self.merger(self.features(pixels).reshape(-1, GROUP * WIDTH))
        return merged[reverse_window_index]


@pytest.fixture(scope="module")
def encoder() -> WindowedEncoder:
    torch.manual_seed(0)
    return WindowedEncoder().eval()


def export_encoder(encoder: nn.Module, path: Path, *, dynamic: bool = False, half: bool = False) -> Path:
    pixels = torch.randn(NUM_TOKENS * GROUP, 12)
    if half:
        encoder, pixels = encoder.half(), pixels.half()
    tokens = torch.export.Dim("tokens", min=BUDGET, max=512)
    shapes = {"pixels": {0: GROUP * tokens}, "reverse_window_index": {0: tokens}}
    torch.onnx.export(
        encoder,
        (pixels, torch.arange(NUM_TOKENS)),
        path,
        input_names=["input", "reverse_window_index"],
        output_names=["output"],
        dynamic_shapes=shapes if dynamic else None,
        dynamo=True,
        verbose=False,
    )
    return path


@pytest.fixture(scope="module")
def onnx_file(encoder: WindowedEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(encoder, tmp_path_factory.mktemp("attach") / "visual.onnx")


@pytest.fixture(scope="module")
def open_file(encoder: WindowedEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for any number of tokens."""
    return export_encoder(encoder, tmp_path_factory.mktemp("open") / "visual.onnx", dynamic=True)


def attachment(**change: Any) -> Attachment:
    values: dict[str, Any] = {
        "vision": "output",
        "keys": "linear",
        "keys_per_token": GROUP,
        "keys_index": "reverse_window_index",
        "budget": Budget(tokens=BUDGET),
        "num_tokens": None,
        "num_words": DimRange(1, 3, 8),
        "config": SelectionConfig(),
        "form": "lazy",
        "grid_width": 6,
    }
    return Attachment(**values | change)


def export_attached(onnx_file: Path, path: Path, what: Attachment) -> Manifest:
    attached = attach_selection(onnx_file, what)
    return export_model(
        attached.model, path, "attached", attached.spec, details=attached.details, encoder=attached.encoder
    )


def run_attached(path: Path, num_tokens: int = NUM_TOKENS, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input": torch.randn(num_tokens * GROUP, 12, generator=generator).to(dtype),
        "reverse_window_index": torch.randperm(num_tokens, generator=generator),
        "text": torch.randn(1, 4, 16, generator=generator).to(dtype),
        "text_mask": torch.tensor([[True, True, True, False]]),
        "excluded": torch.zeros(1, num_tokens, dtype=torch.bool),
    }
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return inputs | {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def assert_selected(encoder: WindowedEncoder, found: dict[str, Any]) -> None:
    order = found["reverse_window_index"]
    with torch.no_grad():
        features = encoder.features(found["input"])
        vision = encoder(found["input"], order)
    keys = features.reshape(-1, GROUP, WIDTH).float().mean(dim=1)[order]
    expected = select_tokens(vision, keys, found["text"][0, :3], BUDGET)
    assert found["kept"][0].tolist() == expected.kept.tolist()
    torch.testing.assert_close(found["output"], vision, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["visual_tokens"][0], found["output"][expected.kept])
    if "positions" not in found:
        return
    grid = torch.stack([expected.kept * 0, expected.kept // 6, expected.kept % 6])
    assert torch.equal(found["positions"][0], grid)


def test_everything_of_the_encoder_and_the_selection(encoder: WindowedEncoder, onnx_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "joined.onnx"
    manifest = export_attached(onnx_file, path, attachment())
    assert manifest.check.status == "selection only"
    assert manifest.details["attached_to"] == {"onnx": "visual.onnx", "vision": "output", "keys": "linear"}
    assert [output.name for output in manifest.outputs] == [
        *("output", "kept", "order", "visual_tokens", "coverage", "total", "positions")
    ]
    # The encoder's weights came along.
    assert [file.name for file in manifest.files] == ["joined.onnx", "joined.onnx.data"]
    assert_selected(encoder, run_attached(path))


@pytest.mark.parametrize("num_tokens", [BUDGET, 18, 60])
def test_an_encoder_of_any_size(encoder: WindowedEncoder, open_file: Path, tmp_path: Path, num_tokens: int) -> None:
    what = attachment(num_tokens=DimRange(BUDGET, 24, 64), grid_width=None)
    export_attached(open_file, tmp_path / "joined.onnx", what)
    assert_selected(encoder, run_attached(tmp_path / "joined.onnx", num_tokens))


def test_float16_with_merged_keys_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = WindowedEncoder().eval()
    visual = export_encoder(encoder, tmp_path / "visual.onnx", half=True)
    manifest = export_attached(visual, tmp_path / "joined.onnx", attachment())
    assert manifest.details["edges"]["vision"]["dtype"] == "float16"
    assert manifest.details["edges"]["keys"]["dtype"] == "float32"
    found = run_attached(tmp_path / "joined.onnx", dtype=torch.float16)
    assert torch.equal(found["visual_tokens"][0], found["output"][found["kept"][0]])


def test_with_a_batch_in_front(tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 16)).eval()
    visual = tmp_path / "visual.onnx"
    torch.onnx.export(
        encoder, (torch.randn(2, 9, 12),), visual, input_names=["x"], output_names=["y"], dynamo=True, verbose=False
    )
    keys = next(
        node.outputs[0].name for node in ir.load(visual).graph if tuple(node.outputs[0].shape or ())[-1:] == (10,)
    )
    what = attachment(vision="y", keys=keys, keys_per_token=1, keys_index=None, grid_width=None)
    assert export_attached(visual, tmp_path / "joined.onnx", what).check.status == "selection only"


def test_an_encoder_with_a_plugins_operators(onnx_file: Path, tmp_path: Path) -> None:
    # TensorRT-Edge-LLM's attention is a plugin of its own domain: no ONNX library knows what it does, or its shapes.
    model = ir.load(onnx_file)
    pixels = model.graph.inputs[0]
    attention = ir.node("ViTAttentionPlugin", [pixels], domain="trt_edgellm")
    attention.outputs[0].name = "attended"
    attention.outputs[0].type, attention.outputs[0].shape = pixels.type, pixels.shape
    for node, place in list(pixels.uses()):
        if node is not attention:
            node.replace_input_with(place, attention.outputs[0])
    model.graph.insert_before(model.graph.node(0), attention)
    model.opset_imports["trt_edgellm"] = 1
    ir.save(model, tmp_path / "visual.onnx", external_data="visual.data")
    manifest = export_attached(tmp_path / "visual.onnx", tmp_path / "joined.onnx", attachment())
    assert manifest.check.status == "selection only"
    assert manifest.requires["operators of trt_edgellm"] == "1"
    assert [node.domain for node in ir.load(tmp_path / "joined.onnx").graph].count("trt_edgellm") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": "linera"}, r"no tensor 'linera'; the nearest of its \d+:\n  linear \[96, 10\]"),
        ({"vision": "out"}, r"no tensor 'out'; the nearest(.|\n)*output \[24, 16\]"),
        ({"keys_index": "window"}, "no tensor 'window'"),
        ({"keys_per_token": 1, "keys_index": None}, "one key a token is needed, got 24 and 96 tokens"),
        ({"keys_per_token": 7}, "96 rows, not a multiple of 7"),
        ({"num_tokens": DimRange(6, 12, 24)}, "makes 24 tokens, not 6:12:24"),
        ({"keys_per_token": 0}, "--keys-per-token is at least 1, got 0"),
        ({"keys_index": "linear"}, r"--keys-index is a row of integers, got linear \[96, 10\]"),
        ({"grid_width": 0}, "--grid-width is at least 1, got 0"),
        ({"grid_width": 7}, "24 tokens are no grid 7 wide"),
        ({"budget": Budget(tokens=25)}, "keeps 25 tokens needs images of at least as many"),
    ],
)
def test_refused(onnx_file: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_selection(onnx_file, attachment(**change))


def test_an_open_number_of_tokens_needs_a_range(open_file: Path) -> None:
    with pytest.raises(ValueError, match=r"give the number of tokens or its range, --tokens MIN:MAX"):
        attach_selection(open_file, attachment(grid_width=None))
    with pytest.raises(ValueError, match="--grid-width is for images of one size"):
        attach_selection(open_file, attachment(num_tokens=DimRange(BUDGET, 24, 64)))


def test_one_size_of_an_encoder_of_any_size(encoder: WindowedEncoder, open_file: Path, tmp_path: Path) -> None:
    attached = attach_selection(open_file, attachment(num_tokens=DimRange.fixed(24)))
    assert attached.dimensions == {}
    export_attached(open_file, tmp_path / "joined.onnx", attachment(num_tokens=DimRange.fixed(24)))
    found = run_attached(tmp_path / "joined.onnx", 24)
    assert_selected(encoder, found)
    assert torch.equal(found["positions"][0, 1:], torch.stack([found["kept"][0] // 6, found["kept"][0] % 6]))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run_attached(tmp_path / "joined.onnx", 18)


def test_a_share_of_the_graphs_own_number_of_tokens(
    onnx_file: Path, open_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(onnx_file, "--preset=qwen2.5-vl", "--budget=25%")) == 0
    assert Manifest.load(tmp_path / "artifacts/export/visual-k6.onnx").budget == 6
    open_size = [argument for argument in command(open_file, "--preset=qwen2.5-vl") if "grid" not in argument]
    assert main([*open_size, "--budget=25%", f"--tokens={BUDGET}:64"]) == 0
    assert Manifest.load(tmp_path / "artifacts/export/visual-k16.onnx").share == "25%"


def test_an_open_size_that_is_called_as_ours(open_file: Path, tmp_path: Path) -> None:
    model = ir.load(open_file)
    model.graph.inputs[0].shape = ir.Shape(["N", 12])
    ir.save(model, tmp_path / "named.onnx", external_data="named.data")
    what = attachment(num_tokens=DimRange(BUDGET, 24, 64), grid_width=None)
    joined = attach_selection(tmp_path / "named.onnx", what).model
    assert str((joined.graph.inputs[0].shape or [])[0]) == "encoder_N"
    assert "encoder_N" in open_dimensions(joined)


def test_names_that_are_taken(onnx_file: Path, tmp_path: Path) -> None:
    model = ir.load(onnx_file)
    model.graph.inputs[0].name = "text"
    ir.save(model, tmp_path / "visual.onnx", external_data="visual.data")
    with pytest.raises(ValueError, match="has tensors named text already: rename them"):
        attach_selection(tmp_path / "visual.onnx", attachment())


def test_not_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "visual.onnx"
    path.write_bytes(b"not a graph at all")
    with pytest.raises(ValueError, match="is not an ONNX file"):
        attach_selection(path, attachment())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        attach_selection(tmp_path / "none.onnx", attachment())
    with pytest.raises(FileNotFoundError, match="is a folder: name the file in it"):
        attach_selection(tmp_path, attachment())


def command(onnx_file: Path, *arguments: str) -> list[str]:
    where = [f"--onnx={onnx_file}", "--vision=output", "--keys=linear", f"--keys-per-token={GROUP}", "--grid-width=6"]
    index = "--keys-index=reverse_window_index"
    return ["export", "attach", *where, index, f"--budget={BUDGET}", *arguments]


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (["--preset=qwen2.5-vl"], SelectionConfig(0.01, 0.2, 0.5)),
        (["--preset=qwen2.5-vl", "--alpha=2"], SelectionConfig(0.01, 0.2, 2)),
        (["--tv-temp=0.1", "--vv-temp=0.3", "--alpha=2"], SelectionConfig(0.1, 0.3, 2)),
    ],
)
def test_constants_are_a_presets_or_the_users(
    onnx_file: Path, tmp_path: Path, arguments: list[str], config: SelectionConfig
) -> None:
    assert main(command(onnx_file, f"--output={tmp_path}/a.onnx", *arguments)) == 0
    assert Manifest.load(tmp_path / "a.onnx").constants == config


@pytest.mark.parametrize("arguments", [[], ["--tv-temp=0.1", "--vv-temp=0.3"]])
def test_constants_are_nobodys_by_themselves(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(command(onnx_file, f"--output={tmp_path}/a.onnx", *arguments)) == 2
    assert (
        "name a --preset (llava-1.5, llava-next, qwen2.5-vl, qwen2-vl, qwen3-vl, qwen3-vl-moe, qwen3.5, qwen3.5-moe, "
        "internvl3, glm-4.1v, glm-4.5v)" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["visual.onnx", "link.onnx", "weights.onnx"])
def test_the_encoder_is_never_replaced(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    visual = tmp_path / "visual.onnx"
    # Its weights have a name that another output's would have.
    ir.save(ir.load(onnx_file), visual, external_data="weights.onnx.data")
    (tmp_path / "link.onnx").symlink_to(visual)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(command(visual, f"--output={tmp_path}/{output}", "--preset=qwen2.5-vl", "--force")) == 2
    assert "is the source of the export: choose another --output" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
