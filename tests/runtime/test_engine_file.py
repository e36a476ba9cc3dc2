from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtok_bench.families import FamilyName
from mmtok_deploy import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines import EngineError
from mmtok_deploy.executors import check_selection
from mmtok_deploy.manifest import ArtifactError, Kind, Manifest, TensorInfo
from mmtok_deploy.synthetic import synthetic_features
from mmtok_sglang import server_args
from mmtok_sglang.engine_file import EngineMismatchError
from mmtok_sglang.metrics import SelectionMetrics
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.selection import ImageTokens, TokenSelector
from mmtok_sglang.server_args import MMTokServerArgs
from mmtok_sglang.settings import Settings
from tests.runtime.engine_files import export_for
from tests.runtime.stand_ins import image_names, tiny_checkpoint


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Settings | None]:
    """The settings that hooks were to be installed for; none are."""
    settings: list[Settings | None] = []
    monkeypatch.setattr(server_args, "_install", settings.append)
    return settings


@pytest.fixture(scope="module")
def llava_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_for("llava-1.5", tmp_path_factory.mktemp("llava") / "selection.onnx", 64)


@pytest.fixture(scope="module")
def qwen_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_for("qwen2.5-vl", tmp_path_factory.mktemp("qwen") / "selection.onnx", 64)


def resolve(paths: pytest.TempPathFactory, family: FamilyName, engine: Path, budget: str, **flags: Any) -> None:
    values = {"dtype": "float32", "mmtok_budget": budget, "mmtok_engine": str(engine)} | flags
    MMTokServerArgs(model_path=tiny_checkpoint(paths, family), **values).resolve_once()


@pytest.mark.parametrize("budget", ["64", "all", "12.5%", "3%"])
@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_a_file_that_fits(
    installed: list[Settings | None],
    tmp_path_factory: pytest.TempPathFactory,
    qwen_file: Path,
    budget: str,
    backend: str,
) -> None:
    resolve(tmp_path_factory, "qwen2.5-vl", qwen_file, budget, mmtok_backend=backend)
    (settings,) = installed
    assert settings is not None
    assert settings.engine == qwen_file
    shown = {name: value for name, value in settings.flags().items() if name in ("mmtok_backend", "mmtok_engine")}
    assert shown == {"mmtok_backend": backend, "mmtok_engine": str(qwen_file)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_of_the_projectors_output(
    installed: list[Settings | None], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, dtype: str
) -> None:
    """Keys are tokens: of a Qwen in the model's dtype, not in float32 as the merger's input."""
    file = export_for("qwen2.5-vl", tmp_path / "a.onnx", 64, keys="output", dtype=dtype, keys_dtype=dtype)
    resolve(tmp_path_factory, "qwen2.5-vl", file, "64", dtype=dtype, mmtok_keys="output")
    assert len(installed) == 1


def test_a_tile_of_llava_next(
    installed: list[Settings | None], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    resolve(tmp_path_factory, "llava-next", export_for("llava-next", tmp_path / "a.onnx", 32), "160")
    assert len(installed) == 1


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"budget": 32}, {}, r"keeps 32 tokens, --mmtok-budget 64 keeps 64 of 576"),
        ({"vision_width": 128}, {}, r"takes vision of width 128, the model's have 256"),
        ({"keys_width": 32}, {}, r"takes keys of width 32, the model's have 64"),
        ({"num_tokens": DimRange.fixed(575)}, {}, r"selects from 575 tokens, the model has 576"),
        ({"config": SelectionConfig(alpha=2)}, {}, r"was exported with .*alpha=2.*, the server has .*alpha=0\.5"),
        ({"dtype": "float16"}, {}, r"takes vision in float16, the server computes them in float32"),
        ({}, {"mmtok_alpha": 0.25}, r"alpha=0\.5.*, the server has .*alpha=0\.25"),
        ({"keys": "output"}, {}, r"takes keys of width 256.*exported with --keys output, .* the projector's input"),
        # As wide as the vision tokens, and so told apart by the manifest alone.
        (
            {"keys_width": 256},
            {"mmtok_keys": "output"},
            r"onnx was exported with --keys input, .* the projector's output",
        ),
    ],
)
def test_a_file_for_another_server(
    installed: list[Settings | None],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    change: dict[str, Any],
    flags: dict[str, Any],
    message: str,
) -> None:
    file = export_for("llava-1.5", tmp_path / "a.onnx", **{"budget": 64} | change)
    with pytest.raises(EngineMismatchError, match=rf"(?s)--mmtok-engine .*{message}.*Export one that fits"):
        resolve(tmp_path_factory, "llava-1.5", file, "64", **flags)
    assert installed == []


@pytest.mark.parametrize("kind", ["encoder", "attached"])
def test_a_file_with_an_encoder(
    installed: list[Settings | None], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, kind: Kind
) -> None:
    file = export_for("llava-1.5", tmp_path / "a.onnx", 64)
    manifest = Manifest.load(file)
    # Pixels in place of vision and keys, as such a file has.
    _, _, *others = manifest.inputs
    described = replace(manifest, kind=kind, inputs=(TensorInfo("pixels", "float32", (1, 3, 336, 336)), *others))
    Manifest.path_of(file).write_text(described.to_json())
    with pytest.raises(EngineMismatchError, match="holds an encoder as well, the server has its own: mmtok export sel"):
        resolve(tmp_path_factory, "llava-1.5", file, "64")
    assert installed == []


def test_a_share_that_needs_more_than_the_file_keeps(tmp_path_factory: pytest.TempPathFactory, qwen_file: Path) -> None:
    with pytest.raises(EngineMismatchError, match="keeps 64 tokens, --mmtok-budget 20% keeps 102 of 512"):
        resolve(tmp_path_factory, "qwen2.5-vl", qwen_file, "20%")


def test_auto_needs_a_file_of_any_number_of_picks(
    installed: list[Settings | None], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, qwen_file: Path
) -> None:
    with pytest.raises(EngineMismatchError, match=r"makes 64 picks always, --mmtok-budget auto .* --budget-input"):
        resolve(tmp_path_factory, "qwen2.5-vl", qwen_file, "auto")
    file = export_for("qwen2.5-vl", tmp_path / "a.onnx", 64, takes_budget=True)
    with pytest.raises(EngineMismatchError, match="keeps 64 tokens, --mmtok-budget 50% keeps 256 of 512"):
        resolve(tmp_path_factory, "qwen2.5-vl", file, "auto")
    assert installed == []
    resolve(tmp_path_factory, "qwen2.5-vl", file, "auto", mmtok_auto_max="12.5%")
    assert len(installed) == 1


def test_a_file_that_is_not_there(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^--mmtok-engine: /.*none\.onnx does not exist$"):
        resolve(tmp_path_factory, "llava-1.5", tmp_path / "none.onnx", "64")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mmtok_backend": "onnxruntime"}, "--mmtok-backend onnxruntime runs an exported file: add --mmtok-engine"),
        ({"mmtok_backend": "tensorrt"}, "--mmtok-backend tensorrt runs an exported file: add --mmtok-engine"),
        ({"mmtok_backend": "torch", "mmtok_engine": "a.onnx"}, "torch runs no exported file: drop"),
        ({"mmtok_onnxruntime_provider": "CPUExecutionProvider"}, "is for an exported file: add --mmtok-engine"),
    ],
)
def test_flags_that_do_not_belong_together(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMTokServerArgs(model_path="model", mmtok_budget="64", **flags)


def test_requests_that_the_file_cannot_hold(qwen_file: Path) -> None:
    manifest = Manifest.load(qwen_file)
    check_selection(manifest, num_tokens=512, num_kept=64, num_words=64)
    check_selection(manifest, num_tokens=64, num_kept=1, num_words=0)
    for num_tokens, num_kept, num_words, message in (
        (513, 64, 3, "takes images of 64:128:512 tokens, this has 513"),
        (63, 6, 3, "takes images of 64:128:512 tokens, this has 63"),
        (512, 65, 3, "keeps at most 64 tokens, asked for were 65"),
        (512, 64, 65, "takes 1:16:64 tokens of guidance, this image has 65"),
    ):
        with pytest.raises(ValueError, match=message):
            check_selection(manifest, num_tokens, num_kept, num_words)


def settings_with(file: Path, **fields: Any) -> Settings:
    from mmtok_deploy import Budget

    return Settings("llava-1.5", Budget(tokens=64), SelectionConfig(), "keywords", engine=file, **fields)


def test_a_selector_starts_with_the_file(llava_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    TokenSelector(settings_with(llava_file), SelectionMetrics()).start(torch.device("cpu"))
    assert "MMTok: tokens are selected by selection.onnx by onnxruntime 1." in caplog.text


def test_a_file_says_what_its_tokens_cover(llava_file: Path) -> None:
    vision, keys, text = synthetic_features(576, 5, 256, 64)
    # Fewer than the file's 64: the first picks.
    image = ImageTokens(image_names(1), ImagePlan(576, 20, guidance=[0, 1, 2, 3, 4]), vision, keys, 20)
    told = []
    for settings in (settings_with(llava_file), replace(settings_with(llava_file), engine=None)):
        selector = TokenSelector(settings, SelectionMetrics())
        selector.start(torch.device("cpu"))
        selector.select([image], lambda ids: text[ids])
        outcome = selector.outcome(image.names.selection or b"")
        assert outcome is not None
        assert outcome.coverage is not None
        assert outcome.coverage_bound is not None
        told.append((outcome.coverage, outcome.coverage_bound))
    assert 0 < told[0][0] < told[0][1] < 1
    assert told[0] == pytest.approx(told[1], rel=1e-4)


def test_a_selector_does_not_start_with_a_file_that_cannot_run(llava_file: Path) -> None:
    selector = TokenSelector(
        settings_with(llava_file, onnxruntime_provider="CUDAExecutionProvider"), SelectionMetrics()
    )
    with pytest.raises(EngineError, match="CUDAExecutionProvider works on cuda tensors, these are on cpu"):
        selector.start(torch.device("cpu"))
