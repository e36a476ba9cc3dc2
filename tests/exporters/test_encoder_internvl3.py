from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration

from mmtok_deploy import Budget
from mmtok_deploy.cli import main
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines import open_engine
from mmtok_deploy.greedy_replay import replay_greedy
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.presets import PRESETS
from mmtok_deploy.problem import SelectionProblem
from mmtok_export.encoders import EncoderError, build_encoder, describe_encoder, export_encoder
from mmtok_export.pixels import images_of
from tests.exporters.encoder_cases import assert_equal, checkpoint, session_of

TILE = (448, 448)
TILE_TOKENS = 64


def tiles(num_tiles: int) -> Tensor:
    """Returns tiles of photographs, as InternVL's processor normalises them."""
    return images_of(TILE, num_tiles, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@torch.inference_mode()
def features_of(model: Any, pixels: Tensor) -> list[Tensor]:
    """Returns vision [1, N, D] and keys [1, N, d], float32, of Hugging Face's encoder."""
    keys: list[Tensor] = []
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0]))
    vision = model.get_image_features(pixels, -1, "default").pooler_output
    hook.remove()
    return [each.flatten(0, 1)[None].float() for each in (vision, keys[0])]


def hugging_face(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForImageTextToText.from_pretrained(checkpoint("internvl3") / "transformers", dtype=dtype).eval()


@pytest.fixture(scope="module")
def judge() -> Any:
    return hugging_face()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "a.onnx"
    arguments = ["--budget=10%", "--dtype=float32", "--text-tokens=1:4:8", "--unpruned", f"--output={path}"]
    assert main(["export", "encoder", f"--model={checkpoint('internvl3')}", *arguments]) == 0
    return path


def test_one_file_of_any_number_of_tiles(file: Path) -> None:
    manifest = Manifest.load(file)
    assert manifest.check.status == "passed", manifest.check.detail
    assert (manifest.dimensions["tiles"], manifest.dimensions["N"]) == (DimRange(1, 7, 13), DimRange(64, 448, 832))
    assert manifest.input("pixels").shape == ("tiles", 3, 448, 448)
    assert [tensor.name for tensor in manifest.outputs] == [
        *("kept", "order", "visual_tokens", "coverage", "total", "unpruned_tokens")
    ]


@pytest.mark.parametrize("num_tiles", [1, 3, 13])
def test_one_selection_of_all_tiles_as_a_server_makes_it(file: Path, judge: Any, num_tiles: int) -> None:
    pixels, num_tokens = tiles(num_tiles), num_tiles * TILE_TOKENS
    text = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(3))
    inputs = {
        "pixels": pixels,
        "text": text,
        "text_mask": torch.ones(1, 5, dtype=torch.bool),
        "excluded": torch.zeros(1, num_tokens, dtype=torch.bool),
    }
    outputs = open_engine(file, torch.device("cpu")).run(inputs)
    vision, keys = features_of(judge, pixels)
    order, kept = outputs["order"][0], outputs["kept"][0]
    assert len(order) == Budget.parse("10%").num_kept(num_tokens)
    replay_greedy(
        SelectionProblem(vision[0], keys[0], text[0], len(order)), PRESETS["internvl3"].config, order.tolist()
    )
    assert torch.equal(kept, order.sort().values)
    torch.testing.assert_close(outputs["unpruned_tokens"], vision, rtol=0, atol=1e-4)
    assert torch.equal(outputs["visual_tokens"][0], outputs["unpruned_tokens"][0][kept])


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "dtype"), [("transformers", torch.float32), (".", torch.float16)])
def test_the_graph_is_hugging_faces(folder: str, dtype: torch.dtype) -> None:
    """The format of Transformers, and the published one, whose queries, keys and values are one tensor."""
    exported = export_encoder(checkpoint("internvl3") / folder, DimRange.fixed(2 * TILE_TOKENS), dtype=dtype)
    assert exported.module.pixels_shape == (2, 3, 448, 448)
    pixels = tiles(2)
    outputs = session_of(exported).run(None, {"pixels": pixels.numpy()})
    assert_equal(outputs, features_of(hugging_face(dtype), pixels), dtype)


def test_the_larger_towers_norms(tmp_path: Path, judge: Any) -> None:
    """InternVL3-38B and -78B have RMSNorm, norms of queries and keys, and no bias."""
    config = judge.config
    config = type(config).from_dict(config.to_dict())
    for name, value in {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    model: Any = InternVLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    pixels = tiles(1)
    encoder = build_encoder(tmp_path, DimRange.fixed(TILE_TOKENS))
    assert_equal(list(encoder(pixels)), features_of(model, pixels), torch.float32)
    assert list(encoder.parameters_in("vision_model.encoder.layers.4.attn.q_norm.weight")) == [
        "vision_tower.encoder.layer.4.attention.q_norm.weight"
    ]


@pytest.mark.parametrize(
    ("size", "batch", "message"),
    [
        (TILE, DimRange.fixed(2), "takes the tiles of one image, got 2 images: leave --batch-size out"),
        ((448, 224), None, "a tile has 448x448 px, got 448x224: leave --image-size out"),
        (DimRange(64, 64, 100), None, "a tile has 64 tokens, and --tokens takes multiples of it, got 100"),
    ],
)
def test_what_no_image_is(size: Any, batch: DimRange | None, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        describe_encoder(checkpoint("internvl3"), size, batch)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ps_version": "v1"}, "ps_version of InternVL3 is 'v2', got 'v1'"),
        ({"select_layer": -4}, "vision_feature_layer of InternVL3 is -1, got -4"),
        ({"force_image_size": 896}, "force_image_size of InternVL3 is 448, got 896"),
    ],
)
def test_another_encoder_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    content = json.loads((checkpoint("internvl3") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | changed))
    with pytest.raises(EncoderError, match=message):
        describe_encoder(tmp_path, TILE)
