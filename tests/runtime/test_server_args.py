from __future__ import annotations

import argparse
import multiprocessing
import pickle
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any
from unittest import mock

import msgspec
import pytest
from sglang.srt.managers.data_parallel_controller import run_data_parallel_controller_process
from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.server_args import ServerArgs

from mmtok_deploy import Budget, SelectionConfig
from mmtok_deploy.auto_budget import AutoBudget
from mmtok_deploy.methods import MethodName, coverage_of
from mmtok_sglang import install, server_args
from mmtok_sglang.compatibility import UnsupportedServerError
from mmtok_sglang.install import Hook, HookError
from mmtok_sglang.limits import Limits
from mmtok_sglang.server_args import MMTokServerArgs
from mmtok_sglang.settings import Settings
from mmtok_sglang.start_errors import FlagError, warn_of_environment
from tests.conftest import RunPython
from tests.runtime.stand_ins import tiny_checkpoint, unchanged_environment

FLAGS = [
    "--mmtok-budget",
    "--mmtok-min-tokens",
    "--mmtok-min-tokens-in",
    "--mmtok-auto-min",
    "--mmtok-auto-max",
    "--mmtok-tv-temp",
    "--mmtok-vv-temp",
    "--mmtok-alpha",
    "--mmtok-guidance",
    "--mmtok-method",
    "--mmtok-encoder-scale",
    "--mmtok-skip-repeats",
    "--mmtok-share-tiles",
    "--mmtok-keys",
    "--mmtok-video-budget",
    "--mmtok-seed",
    "--mmtok-agent-url",
    "--mmtok-agent-model",
    "--mmtok-agent-timeout-ms",
    "--mmtok-backend",
    "--mmtok-engine",
    "--mmtok-engine-sha256",
    "--mmtok-onnxruntime-provider",
    "--mmtok-feature-cache-mb",
    "--mmtok-max-images",
    "--mmtok-max-image-pixels",
    "--mmtok-max-video-frames",
    "--mmtok-max-video-pixels",
    "--mmtok-max-aspect-ratio",
    "--mmtok-max-guidance-tokens",
    "--mmtok-max-selection-cost",
    "--mmtok-trust-image-hashes",
]


def parsed(*flags: str, server_args_class: Any = MMTokServerArgs) -> Any:
    parser = argparse.ArgumentParser()
    # SGLang's method reads the fields of what its module calls ServerArgs, which the plugin replaces.
    with mock.patch("sglang.srt.server_args.ServerArgs", server_args_class):
        server_args_class.add_cli_args(parser)
    return server_args_class.from_cli_args(parser.parse_args(["--model-path", "model", *flags]))


@pytest.mark.slow
def test_the_servers_help_lists_the_flags(run_python: RunPython) -> None:
    result = run_python("-m", "sglang.launch_server", "--help", variables={"COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert [flag for flag in FLAGS if not re.search(rf"{flag}\s", result.stdout)] == []
    assert "a share (10% or 0.1)" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        *((["--mmtok-budget", value], "or 'all' for no pruning") for value in ("0", "-3", "1.5", "150%", "ten", "")),
        (["--mmtok-budget", "64", "--mmtok-guidance", "words"], "keywords"),
        (["--mmtok-budget", "64", "--mmtok-method", "fastv"], "divprune"),
        (["--mmtok-budget", "64", "--mmtok-backend", "openvino"], "onnxruntime"),
        (["--mmtok-budget", "64", "--mmtok-onnxruntime-provider", "cpu"], "CPUExecutionProvider"),
        (["--mmtok-budget", "64", "--mmtok-alpha", "half"], "--mmtok-alpha"),
        (["--mmtok-budget", "64", "--mmtok-min-tokens", "1.5"], "--mmtok-min-tokens"),
        # What argparse cannot tell.
        (["--mmtok-budget", "64", "--mmtok-min-tokens", "0"], "is a whole number of at least 1 token, got 0"),
        (["--mmtok-budget", "64", "--mmtok-tv-temp", "-1"], "--mmtok-tv-temp is a positive number"),
        (["--mmtok-budget", "64", "--mmtok-feature-cache-mb", "-1"], "is at least 0, got -1"),
        (["--mmtok-budget", "64", "--mmtok-encoder-scale", "50%"], "invalid float"),
        (["--mmtok-budget", "64", "--mmtok-encoder-scale", "nan"], "is a number above 0 and at most 1, got nan"),
        (["--mmtok-budget", "64", "--mmtok-skip-repeats", "0.5"], "invalid int"),
        (["--mmtok-budget", "64", "--mmtok-skip-repeats", "256"], "is a whole number from -1 (off) to 255, got 256"),
        (["--mmtok-budget", "64", "--mmtok-agent-url", "agent"], "is an address like http://host:30000/v1"),
        (["--mmtok-backend", "torch", "--mmtok-budget", "64", "--mmtok-engine", "/a.onnx"], "runs no exported file"),
        (["--mmtok-alpha", "1"], "has no effect without --mmtok-budget"),
        (["--mmtok-budgets", "64"], "unrecognized arguments"),
        (["--mmtok-a", "64"], "could match"),
        (["--page-size", "4", "--mmtok-budget"], "expected one argument"),
    ],
)
def test_a_bad_value_on_the_command_line_ends_it_with_what_is_accepted(
    capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        parsed(*flags)
    assert exit_status.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert named in message
    assert any(flag in message for flag in flags if flag.startswith("--mmtok"))


def test_sglangs_own_usage_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--page-size", "four")
    assert len(capsys.readouterr().err.splitlines()) > 100


def test_an_error_of_sglangs_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = mock.patch.object(ServerArgs, "__post_init__", side_effect=ValueError("theirs"))
    with theirs, pytest.raises(ValueError, match=r"^theirs$"):
        parsed("--mmtok-budget", "64")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["MMTOK_BUDGET", "MMTOK_FEATURE_CACHE_MB"])
def test_a_variable_that_looks_like_a_flag_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    fields = (*MMTokServerArgs.__struct_fields__, name)
    monkeypatch.setenv(name, "64")
    for _ in range(2):
        warn_of_environment(fields)
    flag = "--" + name.lower().replace("_", "-")
    assert caplog.messages == [f"MMTok: the environment variable {name} is not read: use {flag}"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"mmtok_budget": "ten"}, "--mmtok-budget 'ten' is not understood"),
        ({"mmtok_budget": 0}, "--mmtok-budget 0 is not understood"),
        ({"mmtok_tv_temp": 0.0}, "--mmtok-tv-temp is a positive number"),
        ({"mmtok_vv_temp": float("nan")}, "--mmtok-vv-temp is a positive number"),
        ({"mmtok_alpha": -1.0}, "--mmtok-alpha is a number of at least 0"),
        ({"mmtok_guidance": "words"}, "--mmtok-guidance is one of keywords, question, got 'words'"),
        ({"mmtok_min_tokens": 0}, "--mmtok-min-tokens is a whole number"),
        ({"mmtok_keys": "outputs"}, "--mmtok-keys is one of input, output, got 'outputs'"),
        ({"mmtok_method": "fastv"}, "--mmtok-method is one of mmtok, text-coverage, .* got 'fastv'"),
        *(
            ({"mmtok_encoder_scale": value}, "--mmtok-encoder-scale is a number above 0 and at most 1, got ")
            for value in (0, -0.5, 1.5, 2, float("inf"), "0.5", True)
        ),
        (
            {"mmtok_method": "downsample", "mmtok_encoder_scale": 0.5},
            "--mmtok-encoder-scale 0.5 does not go with the method downsample",
        ),
        *(
            ({"mmtok_skip_repeats": value}, r"--mmtok-skip-repeats is a whole number from -1 \(off\) to 255, got ")
            for value in (-2, 256, 1.0, "8", True)
        ),
        (
            {"mmtok_method": "downsample", "mmtok_skip_repeats": 0},
            "--mmtok-skip-repeats 0 does not go with the method downsample",
        ),
        (
            {"mmtok_budget": "auto", "mmtok_method": "downsample"},
            "--mmtok-budget auto does not go with the method downsample",
        ),
        *(
            ({f"mmtok_auto_{name}": "64"}, f"--mmtok-auto-{name} is a share of an image's tokens .*, got '64'")
            for name in ("min", "max")
        ),
        (
            {"mmtok_auto_min": "30%", "mmtok_auto_max": "20%"},
            "--mmtok-auto-min is at most auto_max, got 30% and 20%",
        ),
        ({"mmtok_seed": -1}, "--mmtok-seed is from 0 to 9223372036854775807, got -1"),
        (
            {"mmtok_method": "even", "mmtok_backend": "triton"},
            "triton runs the method mmtok alone, not even: start the server with --mmtok-backend torch",
        ),
        (
            {"mmtok_method": "divprune", "mmtok_engine": "/a/selection.onnx"},
            "selection.onnx runs the method mmtok alone, not divprune",
        ),
        *(
            ({"mmtok_agent_url": url}, "--mmtok-agent-url is an address like http://host:30000/v1, got ")
            for url in ("", "agent:30000", "http://", "file:///agent")
        ),
        ({"mmtok_agent_timeout_ms": 0}, "--mmtok-agent-timeout-ms is above 0, got 0"),
        (
            {"mmtok_agent_url": "http://agent/v1", "mmtok_engine": "/a/selection.onnx"},
            "longer than an exported file may take",
        ),
        ({"mmtok_engine_sha256": "0" * 64}, "--mmtok-engine-sha256 is for an exported file"),
        (
            {"mmtok_engine": "/a/selection.onnx", "mmtok_engine_sha256": "0" * 63},
            "--mmtok-engine-sha256 is 64 hexadecimal digits",
        ),
        ({"mmtok_min_tokens_in": -1}, "--mmtok-min-tokens-in is at least 0, got -1"),
        ({"mmtok_feature_cache_mb": -1}, "--mmtok-feature-cache-mb is at least 0, got -1"),
    ],
)
def test_a_bad_value_is_refused_before_anything_starts(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MMTokServerArgs(**{"model_path": "model", "mmtok_budget": "64", **flags})


def test_the_agents_credentials_are_in_nothing_that_sglang_shows(installed: list[list[Hook]], model_path: str) -> None:
    url = "http://me:s3cret-word@127.0.0.1:9/v1?key=t0ken-abc"
    arguments = MMTokServerArgs(model_path=model_path, mmtok_budget="64", mmtok_agent_url=url)
    arguments._launch_command = f"python -m sglang.launch_server --mmtok-agent-url '{url}' --port 30000"
    shown = [repr(arguments), str(arguments.resolved_dict()), str(arguments.launch_command)]
    arguments.resolve_once()
    received = pickle.loads(pickle.dumps(arguments))
    for each in (arguments, received):
        assert each._mmtok_settings.agent_url == url
        # One for all processes: a flush that reaches one of them is one of the server.
        assert each._mmtok_settings.flush_count == arguments._mmtok_flush_count
        shown += [repr(each), str(each.resolved_dict()), str(each.launch_command), repr(each._mmtok_settings)]
    assert "--mmtok-agent-url 'http://***@127.0.0.1:9/v1?***' --port 30000" in shown[2]
    assert received.resolved_dict()["mmtok_agent_url"] == "http://***@127.0.0.1:9/v1?***"
    for text in shown:
        assert "s3cret" not in text
        assert "t0ken" not in text


def test_a_server_that_would_be_its_own_agent_does_not_start(installed: list[list[Hook]], model_path: str) -> None:
    url = "http://me:s3cret@localhost:30007/v1"
    arguments = MMTokServerArgs(model_path=model_path, mmtok_budget="64", mmtok_agent_url=url, port=30007)
    with pytest.raises(UnsupportedServerError, match=r"http://\*\*\*@localhost:30007/v1 is this server itself"):
        arguments.resolve_once()
    assert installed == []


@pytest.mark.parametrize(
    "flag",
    [
        ("--mmtok-alpha", "1"),
        ("--mmtok-min-tokens", "4"),
        ("--mmtok-min-tokens-in", "0"),
        ("--mmtok-auto-max", "20%"),
        ("--mmtok-method", "text-coverage"),
        ("--mmtok-agent-url", "http://agent/v1"),
        ("--mmtok-feature-cache-mb", "0"),
    ],
)
def test_a_flag_without_a_budget_is_refused(flag: tuple[str, str]) -> None:
    field = flag[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ValueError, match=f"^{flag[0]} has no effect without --mmtok-budget"):
        MMTokServerArgs(**{"model_path": "model", field: flag[1]})


def test_without_flags_the_arguments_are_sglangs() -> None:
    theirs = msgspec.structs.asdict(parsed("--page-size", "4", server_args_class=ServerArgs))
    ours = msgspec.structs.asdict(parsed("--page-size", "4"))
    added = {name: ours.pop(name) for name in list(ours) if name.startswith("mmtok_")}
    # Drawn anew for each server.
    for values in (ours, theirs):
        values.pop("random_seed", None)
    assert ours == theirs
    assert added == dict.fromkeys(flag.removeprefix("--").replace("-", "_") for flag in FLAGS)


@pytest.mark.parametrize(
    ("flags", "family", "expected"),
    [
        (
            {"mmtok_budget": "64"},
            "llava-1.5",
            Settings("llava-1.5", Budget(tokens=64), SelectionConfig(0.02, 0.2, 0.5), "keywords"),
        ),
        (
            {"mmtok_budget": "10%", "mmtok_min_tokens": 8},
            "qwen2.5-vl",
            Settings("qwen2.5-vl", Budget.parse("10%", minimum=8), SelectionConfig(0.01, 0.2, 0.5), "question"),
        ),
        (
            {
                "mmtok_budget": 64,
                "mmtok_tv_temp": 0.5,
                "mmtok_vv_temp": 0.25,
                "mmtok_alpha": 0.0,
                "mmtok_guidance": "keywords",
                "mmtok_feature_cache_mb": 0,
            },
            "qwen2.5-vl",
            Settings("qwen2.5-vl", Budget(tokens=64), SelectionConfig(0.5, 0.25, 0.0), "keywords", feature_cache_mb=0),
        ),
        (
            {"mmtok_budget": "all", "mmtok_min_tokens_in": 300, "mmtok_method": "random", "mmtok_seed": 7},
            "llava-next",
            Settings(
                *("llava-next", Budget(), SelectionConfig(0.02, 0.2, 0.5), "keywords"),
                min_tokens_in=300,
                method="random",
                seed=7,
            ),
        ),
        (
            {"mmtok_budget": "auto", "mmtok_auto_max": "0.2", "mmtok_min_tokens": 8},
            "qwen2.5-vl",
            Settings(
                *("qwen2.5-vl", AutoBudget(8, None, Fraction(1, 5)), SelectionConfig(0.01, 0.2, 0.5), "question"),
                auto=AutoBudget(auto_max=Fraction(1, 5)),
            ),
        ),
        (
            {"mmtok_budget": "10%", "mmtok_encoder_scale": 0.5},
            "qwen2.5-vl",
            Settings(
                *("qwen2.5-vl", Budget.parse("10%"), SelectionConfig(0.01, 0.2, 0.5), "question"), encoder_scale=0.5
            ),
        ),
        (
            {"mmtok_budget": "all", "mmtok_method": "text-coverage"},
            "llava-1.5",
            Settings("llava-1.5", Budget(), SelectionConfig(0.02, 0.2, 0.5), "keywords", method="text-coverage"),
        ),
    ],
)
def test_flags_go_before_the_familys_preset(flags: dict[str, Any], family: str, expected: Settings) -> None:
    given = MMTokServerArgs(model_path="model", **flags)._mmtok_given
    assert Settings.of(family, given, Limits()) == expected


@pytest.mark.parametrize("method", ["mmtok", "text-coverage", "vision-coverage"])
def test_a_backend_of_one_coverage_runs_the_servers_own(method: MethodName) -> None:
    given = {"budget": Budget(), "backend": "triton", "method": method}
    settings = Settings.of("llava-1.5", given, Limits())
    assert settings.executor_config.coverage == coverage_of(method)
    assert settings.check_method(method) == method
    for other in {"mmtok", "text-coverage", "even"} - {method}:
        with pytest.raises(ValueError, match=f"triton runs the method {method} alone, not {other}: start the server"):
            settings.check_method(other)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Hook]]]:
    """The hooks that were to be installed; none are."""
    lists: list[list[Hook]] = []
    monkeypatch.setattr(install, "install", lambda hooks, *classes: lists.append(hooks))
    monkeypatch.setattr(server_args, "_served", [])
    with unchanged_environment():
        yield lists


@pytest.fixture
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory, "qwen2.5-vl")


def test_resolving_installs_the_hooks_and_shows_what_holds(installed: list[list[Hook]], model_path: str) -> None:
    arguments = MMTokServerArgs(model_path=model_path, mmtok_budget="0.1", mmtok_alpha=1.0, device="cpu")
    assert installed == []
    arguments.resolve_once()
    assert "managers.scheduler.Scheduler.run_batch" in [hook.target for hook in installed[0]]
    shown = arguments.resolved_dict()
    assert {name: value for name, value in shown.items() if name.startswith("mmtok_")} == {
        "mmtok_budget": "10%",
        "mmtok_min_tokens": 1,
        "mmtok_min_tokens_in": 0,
        "mmtok_auto_min": None,
        "mmtok_auto_max": None,
        "mmtok_tv_temp": 0.01,
        "mmtok_vv_temp": 0.2,
        "mmtok_alpha": 1.0,
        "mmtok_guidance": "question",
        "mmtok_encoder_scale": 1.0,
        "mmtok_skip_repeats": -1,
        "mmtok_share_tiles": False,
        "mmtok_method": "mmtok",
        "mmtok_keys": "input",
        "mmtok_video_budget": "video",
        "mmtok_seed": 0,
        "mmtok_agent_url": None,
        "mmtok_agent_model": "default",
        "mmtok_agent_timeout_ms": 1000,
        "mmtok_backend": "auto",
        "mmtok_engine": None,
        "mmtok_engine_sha256": None,
        "mmtok_onnxruntime_provider": None,
        "mmtok_feature_cache_mb": 256,
        "mmtok_max_images": 64,
        "mmtok_max_image_pixels": 4_194_304,
        "mmtok_max_video_frames": 64,
        "mmtok_max_video_pixels": 4_194_304,
        "mmtok_max_aspect_ratio": 200.0,
        "mmtok_max_guidance_tokens": 16_384,
        "mmtok_max_selection_cost": 2e11,
        "mmtok_trust_image_hashes": False,
    }


def test_arguments_without_a_budget_install_nothing(installed: list[list[Hook]], model_path: str) -> None:
    arguments = MMTokServerArgs(model_path=model_path)
    arguments.resolve_once()
    again = pickle.loads(pickle.dumps(arguments))
    assert installed == []
    assert again.resolved_dict()["mmtok_budget"] is None


def test_a_process_that_receives_the_arguments_installs_the_hooks(
    installed: list[list[Hook]], monkeypatch: pytest.MonkeyPatch, model_path: str
) -> None:
    arguments = MMTokServerArgs(model_path=model_path, mmtok_budget="64")
    arguments.resolve_once()
    sent = pickle.dumps(arguments)
    monkeypatch.setattr(server_args, "_served", [])
    received = pickle.loads(sent)
    assert type(received) is MMTokServerArgs
    assert received.resolved_dict() == arguments.resolved_dict()
    received.resolve_once()  # which every process of a server begins with: sglang's `publish`
    here, there = ([hook.target for hook in hooks] for hooks in installed)
    assert here == there


@pytest.mark.parametrize("target", [run_scheduler_process, run_data_parallel_controller_process, print, None])
def test_a_process_that_runs_anything_else_is_no_detokenizer(monkeypatch: pytest.MonkeyPatch, target: object) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_target", target, raising=False)
    assert not server_args._in_detokenizer()


def test_a_detokenizer_installs_nothing(
    installed: list[list[Hook]], monkeypatch: pytest.MonkeyPatch, model_path: str
) -> None:
    arguments = MMTokServerArgs(model_path=model_path, mmtok_budget="64")
    arguments.resolve_once()
    monkeypatch.setattr(server_args, "_served", [])
    monkeypatch.setattr(multiprocessing.current_process(), "_target", run_detokenizer_process, raising=False)
    pickle.loads(pickle.dumps(arguments)).resolve_once()
    assert len(installed) == 1
    assert server_args._served == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"mmtok_budget": "64"}, {"mmtok_budget": "32"}),
        ({"mmtok_budget": "64"}, {"mmtok_budget": "64", "mmtok_alpha": 1.0}),
        ({"mmtok_budget": "64"}, {}),
        ({}, {"mmtok_budget": "64"}),
    ],
)
def test_another_server_in_the_same_process_is_refused(
    installed: list[list[Hook]], model_path: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    for _ in range(2):
        MMTokServerArgs(model_path=model_path, **first).resolve_once()
    with pytest.raises(HookError, match="a process of its own"):
        MMTokServerArgs(model_path=model_path, **second).resolve_once()


@pytest.mark.parametrize("flags", [{"mmtok_budget": "64"}, {}])
def test_a_half_hooked_process_serves_nothing(
    installed: list[list[Hook]], monkeypatch: pytest.MonkeyPatch, model_path: str, flags: dict[str, Any]
) -> None:
    monkeypatch.setattr(install, "_is_half_hooked", True)
    with pytest.raises(HookError, match="start the server in a new process"):
        MMTokServerArgs(model_path=model_path, **flags).resolve_once()
    assert installed == []


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-folder", "no/such/folder"])
def test_a_model_path_that_names_nothing(path: str) -> None:
    with pytest.raises(FlagError, match=rf"--model-path {re.escape(path)}: there is no such folder"):
        MMTokServerArgs(model_path=path, mmtok_budget="10%").resolve_once()
