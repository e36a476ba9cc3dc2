from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.arg_groups.model_overrides import qwen3_vl
from sglang.srt.model_executor.cuda_graph_config import Backend
from transformers import LlavaConfig, PixtralVisionConfig, Qwen3VLMoeConfig

from mmtok_bench.families import FamilyName
from mmtok_sglang import compatibility, server_args
from mmtok_sglang.compatibility import (
    UnsupportedServerError,
    _problems,
    check_adapters,
    check_server,
    family_of_server,
)
from mmtok_sglang.families import FAMILIES
from mmtok_sglang.refused_models import REFUSED_MODELS
from mmtok_sglang.server_args import MMTokServerArgs
from mmtok_sglang.settings import Settings
from tests.runtime.stand_ins import make_settings, tiny_checkpoint, unchanged_environment

SUPPORTED: dict[str, Any] = {
    "encoder_only": False,
    "language_only": False,
    "enable_adaptive_dispatch_to_encoder": False,
    "language_model_only": False,
    "disaggregation_mode": "null",
    "disaggregation_transfer_backend": "mooncake",
    "disaggregation_decode_allocation_policy": "early",
    "enable_pd_role_switch": False,
    "speculative_algorithm": None,
    "enable_streaming_session": False,
    "mm_enable_dp_encoder": False,
    "attn_dp_size": 1,
    "skip_tokenizer_init": False,
    "rl_on_policy_target": None,
    "enable_mm_global_cache": False,
    "hicache_storage_backend": None,
    "enable_lmcache": False,
    "enable_flexkv": False,
    "mm_feature_transport": "cpu",
    "cuda_graph_config": None,
    "smg_grpc_mode": False,
    "grpc_mode": False,
    "grpc_port": None,
}


def prefill_graphs(backend: Backend) -> Any:
    return SimpleNamespace(prefill=SimpleNamespace(backend=backend))


REFUSED = [
    ("encoder_only", True, "--encoder-only"),
    ("language_only", True, "--language-only"),
    ("enable_adaptive_dispatch_to_encoder", True, "encoder disaggregation"),
    ("language_model_only", True, "--language-model-only"),
    ("mm_enable_dp_encoder", True, "--mm-enable-dp-encoder"),
    ("attn_dp_size", 2, "--enable-dp-attention"),
    ("skip_tokenizer_init", True, "--skip-tokenizer-init"),
    ("rl_on_policy_target", "fsdp", "--rl-on-policy-target fsdp"),
    ("enable_mm_global_cache", True, "--enable-mm-global-cache"),
    (
        "hicache_storage_backend",
        "file",
        "--hicache-storage-backend: it keeps keys and values",
    ),
    ("enable_lmcache", True, "--enable-lmcache"),
    ("enable_flexkv", True, "--enable-flexkv"),
    ("mm_feature_transport", "cuda_ipc", "--mm-feature-transport cuda_ipc (or SGLANG_USE_CUDA_IPC_TRANSPORT=1)"),
    ("mm_feature_transport", "cuda_vmm", "--mm-feature-transport cuda_vmm"),
    ("cuda_graph_config", prefill_graphs(Backend.FULL), "--cuda-graph-backend-prefill full"),
    ("smg_grpc_mode", True, "--smg-grpc-mode"),
    ("grpc_mode", True, "--grpc-mode"),
    ("grpc_port", 0, "--grpc-port"),
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SGLANG_VIT_ENABLE_CUDA_GRAPH", "SGLANG_RUST_SERVER"):
        monkeypatch.delenv(name, raising=False)
    with unchanged_environment():
        yield


@pytest.mark.parametrize(("field", "value", "named"), REFUSED)
def test_a_refused_configuration_is_named(field: str, value: Any, named: str) -> None:
    (problem,) = _problems(SimpleNamespace(**SUPPORTED | {field: value}))
    assert named in problem


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("disaggregation_transfer_backend", "mori", "--disaggregation-transfer-backend mori: not verified"),
        ("disaggregation_decode_allocation_policy", "prefill_complete", "policy prefill_complete: not verified"),
        ("enable_pd_role_switch", True, "--enable-pd-role-switch: not verified"),
        ("speculative_algorithm", "NGRAM", "--disaggregation-mode with --speculative-algorithm NGRAM: not verified"),
    ],
)
def test_refused_of_two_servers_alone(field: str, value: Any, named: str) -> None:
    assert list(_problems(SimpleNamespace(**SUPPORTED | {field: value}))) == []
    for mode in ("prefill", "decode"):
        (problem,) = _problems(SimpleNamespace(**SUPPORTED | {"disaggregation_mode": mode, field: value}))
        assert named in problem


@pytest.mark.parametrize("name", ["SGLANG_VIT_ENABLE_CUDA_GRAPH", "SGLANG_RUST_SERVER"])
def test_a_refused_environment_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    (problem,) = _problems(SimpleNamespace(**SUPPORTED))
    assert problem.startswith(name)


@pytest.mark.parametrize("graphs", [None, prefill_graphs(Backend.BREAKABLE), prefill_graphs(Backend.DISABLED)])
def test_other_configurations_pass(graphs: Any) -> None:
    assert list(_problems(SimpleNamespace(**SUPPORTED | {"cuda_graph_config": graphs}))) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("algorithm", ["NGRAM", "EAGLE3", "EAGLE", "STANDALONE"])
def test_drafts(family: str, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "resolving_view", lambda arguments: arguments)
    drafting = SimpleNamespace(
        **SUPPORTED | {"speculative_algorithm": algorithm, "speculative_eagle_topk": 1, "pp_size": 1}
    )
    assert list(_problems(drafting)) == []
    settings = make_settings(family=family)
    compatibility.check_speculation(SimpleNamespace(**SUPPORTED), settings)
    verified = ["NGRAM", "EAGLE3"] if family in ("qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe") else ["NGRAM"]
    if algorithm in (["EAGLE"] if family.startswith("qwen3.5") else verified):
        compatibility.check_speculation(drafting, settings)
        return
    with pytest.raises(UnsupportedServerError, match=rf"{algorithm} on {family}: not verified with a budget"):
        compatibility.check_speculation(drafting, settings)


def test_trees_of_drafts_of_linear_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "resolving_view", lambda arguments: arguments)
    told = {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 4, "pp_size": 1}
    with pytest.raises(UnsupportedServerError, match=r"--speculative-eagle-topk 4 on qwen3\.5: .* Set it to 1"):
        compatibility.check_speculation(SimpleNamespace(**SUPPORTED | told), make_settings(family="qwen3.5"))


def test_drafts_in_streaming_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "resolving_view", lambda arguments: arguments)
    drafting = SimpleNamespace(**SUPPORTED | {"speculative_algorithm": "NGRAM", "enable_streaming_session": True})
    with pytest.raises(UnsupportedServerError, match=r"NGRAM with --enable-streaming-session: .* answered wrongly"):
        compatibility.check_speculation(drafting, make_settings(family="llava-1.5"))


def test_a_draft_model_behind_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "resolving_view", lambda arguments: arguments)
    drafting = SimpleNamespace(**SUPPORTED | {"speculative_algorithm": "EAGLE3", "pp_size": 2})
    with pytest.raises(UnsupportedServerError, match="the draft model runs on the last stage"):
        compatibility.check_speculation(drafting, make_settings(family="qwen2.5-vl"))


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "resolving_view", lambda arguments: arguments)
    check_server(SimpleNamespace(**SUPPORTED))
    two = SUPPORTED | {"skip_tokenizer_init": True, "mm_enable_dp_encoder": True}
    with pytest.raises(UnsupportedServerError, match=r"--mm-enable-dp-encoder.*; nor with --skip-tokenizer-init"):
        check_server(SimpleNamespace(**two))


@pytest.mark.parametrize(
    ("family", "lora", "named"),
    [
        ("qwen2.5-vl", {"enable_lora": None}, None),
        ("qwen2.5-vl", {"enable_lora": True}, None),
        ("qwen2.5-vl", {"enable_lora": True, "lora_target_modules": {"q_proj", "down_proj"}}, None),
        (
            "qwen2.5-vl",
            {"enable_lora": True, "lora_target_modules": {"embed_tokens", "q_proj"}},
            "modules embed_tokens",
        ),
        ("qwen2.5-vl", {"enable_lora": True, "lora_target_modules": {"all"}}, "--lora-target-modules all"),
        ("llava-1.5", {"enable_lora": True}, "on llava-1.5: SGLang does not keep them out of its vision encoder"),
        ("llava-next", {"enable_lora": True}, "on llava-next: SGLang does not keep them out"),
        ("internvl3", {"enable_lora": True}, "on internvl3: SGLang does not keep them out"),
        ("glm-4.5v", {"enable_lora": True}, "on glm-4.5v: SGLang does not keep them out"),
        ("llava-1.5", {"enable_lora": False}, None),
    ],
)
def test_adapters_that_change_what_images_are_selected_by_are_refused(
    monkeypatch: pytest.MonkeyPatch, family: str, lora: dict[str, Any], named: str | None
) -> None:
    monkeypatch.setattr(compatibility, "resolving_view", lambda arguments: arguments)
    arguments = SimpleNamespace(**{"lora_target_modules": None} | lora)
    if named is None:
        check_adapters(arguments, make_settings(5, family))
        return
    with pytest.raises(UnsupportedServerError, match=named):
        check_adapters(arguments, make_settings(5, family))


def test_another_model_is_refused_with_those_that_are_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["InternS1ForConditionalGeneration"]))
    monkeypatch.setattr(compatibility, "model_config_of", lambda arguments: config)
    with pytest.raises(UnsupportedServerError, match=r"not support InternS1ForConditionalGeneration\. Supp") as error:
        family_of_server(None)
    for name, family in FAMILIES.items():
        assert f"{family.architecture} ({name})" in str(error.value)


@pytest.mark.parametrize("architecture", REFUSED_MODELS)
def test_a_model_that_people_serve_is_refused_with_its_reason(
    installed: list[Settings | None], tmp_path: Path, architecture: str
) -> None:
    """Also where Transformers could not read its configuration without the checkpoint's own code."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "theirs"}))
    arguments = MMTokServerArgs(model_path=str(tmp_path), mmtok_budget="64")
    with pytest.raises(UnsupportedServerError) as error:
        arguments.resolve_once()
    assert f"not support {architecture}: {REFUSED_MODELS[architecture]}. Supported: " in str(error.value)
    assert installed == []
    assert f"`{architecture}`" in (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_no_family_is_among_the_refused_models() -> None:
    assert not REFUSED_MODELS.keys() & {family.architecture for family in FAMILIES.values()}


def test_a_llava_of_another_vision_encoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixtral has the architecture of LLaVA-1.5, and tokens between its rows of patches."""
    config = LlavaConfig(vision_config=PixtralVisionConfig().to_dict(), architectures=["LlavaForConditionalGeneration"])
    model_config = SimpleNamespace(hf_config=config)
    monkeypatch.setattr(compatibility, "model_config_of", lambda arguments: model_config)
    with pytest.raises(UnsupportedServerError, match=r"this LlavaFor.*: its vision encoder is pixtral"):
        family_of_server(None)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Settings | None]:
    """The settings that hooks were to be installed for; none are."""
    settings: list[Settings | None] = []
    monkeypatch.setattr(server_args, "_install", settings.append)
    return settings


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2-vl", {}),
        ("qwen2.5-vl", {}),
        ("qwen2.5-vl", {"mmtok_method": "downsample"}),
        ("qwen3-vl", {}),
        ("qwen3-vl", {"mmtok_method": "downsample"}),
        ("qwen3-vl-moe", {"mmtok_encoder_scale": 0.5}),
        ("qwen3.5", {}),
        ("qwen3.5", {"mmtok_method": "downsample", "pp_size": 2}),
        ("qwen3.5-moe", {"mmtok_encoder_scale": 0.5, "mmtok_skip_repeats": 8}),
        ("llava-1.5", {"mmtok_encoder_scale": 1.0, "mmtok_skip_repeats": -1}),
        ("llava-1.5", {"model_impl": "transformers", "mmtok_method": "downsample"}),
        ("llava-next", {}),
        ("llava-next", {"model_impl": "transformers"}),
        ("llava-next", {"mmtok_share_tiles": True}),
        ("llava-next", {"mmtok_method": "visionzip"}),
        ("internvl3", {}),
    ],
)
def test_real_arguments_of_each_family_pass(
    installed: list[Settings | None],
    tmp_path_factory: pytest.TempPathFactory,
    family: FamilyName,
    options: dict[str, Any],
) -> None:
    path = tiny_checkpoint(tmp_path_factory, family)
    MMTokServerArgs(model_path=path, mmtok_budget="64", **options).resolve_once()
    (settings,) = installed
    assert settings is not None
    assert settings.family == family


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llava-1.5", {"model_impl": "mindspore"}, "LlavaForCond.* got mindspore: drop --model-impl$"),
        ("qwen2.5-vl", {"model_impl": "transformers"}, "Qwen2_5_VL.* got transformers: drop --model-impl$"),
        ("qwen2.5-vl", {"mm_enable_dp_encoder": True}, "cannot be combined with --mm-enable-dp-encoder"),
        ("qwen2.5-vl", {"mmtok_method": "visionzip"}, "--mmtok-method visionzip does not run on this model: .*class"),
        ("qwen3-vl", {"mmtok_method": "visionzip"}, "--mmtok-method visionzip does not run on this model: .*class"),
        (
            "qwen3-vl",
            {"pp_size": 2},
            "--pp-size 2 .* to its first 3 layers, and the first stage would have 2 of 4",
        ),
        ("qwen3-vl-moe", {"pp_size": 2}, "--pp-size 2 does not run on this model: DeepStack adds .* 2 of 4"),
        ("qwen3.5", {"mmtok_method": "visionzip"}, "--mmtok-method visionzip does not run on this model: .*class"),
        ("llava-next", {"mmtok_method": "downsample"}, "--mmtok-method downsample does not run on this .* tiles"),
        ("llava-1.5", {"mmtok_encoder_scale": 0.5}, "--mmtok-encoder-scale 0.5 does not run on llava-1.5: .* one size"),
        ("llava-next", {"mmtok_encoder_scale": 0.5}, "--mmtok-encoder-scale 0.5 does not run on llava-next: .* size"),
        ("llava-next", {"mmtok_skip_repeats": 0}, "--mmtok-skip-repeats 0 does not run on llava-next: .* whole images"),
        ("llava-1.5", {"mmtok_share_tiles": True}, "--mmtok-share-tiles does not run on llava-1.5: .* in one piece"),
        ("internvl3", {"mmtok_share_tiles": True}, "--mmtok-share-tiles does not run on internvl3: .* already"),
        ("internvl3", {"mmtok_method": "downsample"}, "--mmtok-method downsample does not run on this .* tiles"),
        ("internvl3", {"mmtok_method": "visionzip"}, "--mmtok-method visionzip does not run on this .* 2 x 2 patches"),
        ("qwen2-vl", {"pp_size": 2}, "--pp-size 2 does not run on this model: SGLang 0.5.23 has no pipeline stages"),
        ("internvl3", {"pp_size": 2}, "--pp-size 2 does not run on this model: SGLang 0.5.23 has no pipeline stages"),
        ("internvl3", {"is_embedding": True}, "--is-embedding does not run on internvl3: SGLang's class"),
        ("internvl3", {"model_impl": "transformers"}, "InternVLChatModel.* got transformers: drop --model-impl$"),
        ("qwen2.5-vl", {"mmtok_backend": "triton"}, "--mmtok-backend triton does not run here: .*cpu"),
    ],
)
def test_real_arguments_that_would_go_around_the_hooks_are_refused(
    installed: list[Settings | None],
    tmp_path_factory: pytest.TempPathFactory,
    family: FamilyName,
    options: dict[str, Any],
    message: str,
) -> None:
    path = tiny_checkpoint(tmp_path_factory, family)
    with pytest.raises(UnsupportedServerError, match=message):
        MMTokServerArgs(model_path=path, mmtok_budget="64", **options).resolve_once()
    assert installed == []


def test_a_mixture_of_experts_of_other_levels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang adds three, and would lose the fourth without a word."""
    config = Qwen3VLMoeConfig(
        vision_config={"deepstack_visual_indexes": [4, 8, 16, 24]}, architectures=["Qwen3VLMoeForConditionalGeneration"]
    )
    model_config = SimpleNamespace(hf_config=config)
    monkeypatch.setattr(compatibility, "model_config_of", lambda arguments: model_config)
    with pytest.raises(UnsupportedServerError, match="it has 4 levels of DeepStack, and SGLang adds 3"):
        family_of_server(None)


def test_pixels_go_by_memory_of_the_host_where_sglang_would_choose_cuda_ipc(
    installed: list[Settings | None], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so for Qwen3-VL on a GPU of compute capability 9.0 with 60 GB or more."""
    monkeypatch.setattr(qwen3_vl, "is_sm90_supported", lambda: True)
    monkeypatch.setattr(qwen3_vl, "get_device_memory_capacity", lambda device: 80 * 1024)
    path = tiny_checkpoint(tmp_path_factory, "qwen3-vl")
    with pytest.raises(ValueError, match="cuda_ipc requires NVIDIA CUDA"):
        MMTokServerArgs(model_path=path).resolve_once()
    arguments = MMTokServerArgs(model_path=path, mmtok_budget="64")
    arguments.resolve_once()
    assert arguments.resolved_dict()["mm_feature_transport"] == "cpu"
    assert len(installed) == 1


def test_on_the_command_line_a_server_that_cannot_run_ends_with_one_message(
    installed: list[Settings | None], tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_checkpoint(tmp_path_factory, "qwen2.5-vl")
    arguments = MMTokServerArgs(model_path=path, mmtok_budget="64", model_impl="transformers")
    arguments._mmtok_on_command_line = True
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_status:
        arguments.resolve_once()
    assert exit_status.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: --mmtok-budget prunes Qwen2_5_VLForConditionalGeneration on --model-impl auto")
    assert installed == []
