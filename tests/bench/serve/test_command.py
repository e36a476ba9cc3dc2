"""`mmtok bench serve` itself: its flags, what it prints without running, and a real sweep with real servers."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import psutil  # type: ignore[import-untyped]
import pytest

from mmtok_bench.results import read_rows
from mmtok_bench.server import cpu_environment
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_deploy.cli import main

CHECKPOINT = Path(__file__).parents[3] / "artifacts" / "checkpoints" / "qwen2.5-vl"


def run(*arguments: str, folder: Path) -> int:
    return main(["bench", "serve", f"--results-dir={folder}", *arguments])


class DryRun(Protocol):
    def __call__(self, *arguments: str, folder: Path = ...) -> list[list[str]]: ...


@pytest.fixture
def dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> DryRun:
    """Returns the commands that would be run, split into words."""

    def commands(*arguments: str, folder: Path = tmp_path) -> list[list[str]]:
        assert run("--dry-run", *arguments, folder=folder) == 0
        lines = capsys.readouterr().out.splitlines()
        return [shlex.split(line) for line in lines if not line.startswith("#")]

    return commands


def starting(program: str, commands: Iterable[list[str]]) -> list[list[str]]:
    """Returns the commands that run a module of SGLang's."""
    return [command for command in commands if f"sglang.{program}" in command]


def words(commands: Iterable[list[str]], start: str) -> list[str]:
    """Returns the words of commands that begin so."""
    return [word for command in commands for word in command if word.startswith(start)]


class TestDryRun:
    def test_prints_every_command_and_does_nothing(self, tmp_path: Path, dry_run: DryRun) -> None:
        folder = tmp_path / "new"
        commands = dry_run("--preset=cpu", "--models=qwen2.5-vl-0.5b", folder=folder)
        servers = starting("launch_server", commands)
        loads = starting("benchmark.serving", commands)
        assert len(servers) + len(loads) == len(commands)
        assert len(servers) == 3
        # Off, all, a budget, a smaller image; two sizes, two loads, five rounds.
        assert len(loads) == 4 * 2 * 2 * 5
        assert not folder.exists()

    def test_qwen3_vl_is_measured_where_it_is_named(self, dry_run: DryRun) -> None:
        assert not any("qwen3-vl" in " ".join(words) for words in dry_run("--preset=cpu"))
        commands = dry_run("--preset=cpu", "--models=qwen3-vl-0.5b")
        loads = starting("benchmark.serving", commands)
        # Off, all, a budget and a smaller image; by 1 and by 4 clients; in five rounds.
        assert len(loads) == 4 * 2 * 5

    def test_servers_have_equal_flags_but_for_the_budget(self, dry_run: DryRun) -> None:
        commands = dry_run("--preset=cpu", "--models=llava-1.5-0.5b")
        servers = starting("launch_server", commands)
        budgets = [[word for word in server if word.startswith("--mmtok-budget=")] for server in servers]
        assert budgets == [[], ["--mmtok-budget=all"], ["--mmtok-budget=10%"]]
        rest = {
            tuple(word for word in server if not word.startswith(("--mmtok-budget=", "--port=", "--nccl-port=")))
            for server in servers
        }
        assert len(rest) == 1
        (words,) = map(set, rest)
        assert {"--load-format=dummy", "--disable-radix-cache", "--sleep-on-idle", "--dtype=bfloat16"} <= words
        assert words >= {f"{name}={value}" for name, value in cpu_environment().items()}

    # The last has all models of the others.
    @pytest.mark.parametrize(
        "preset", [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("a6000", "h100")), "h200"]
    )
    def test_gpu_presets_run_anywhere_dry(self, preset: str, dry_run: DryRun) -> None:
        commands = dry_run(f"--preset={preset}")
        servers = starting("launch_server", commands)
        # Qwen2.5-VL 7B and Qwen3-VL 8B have three budgets, the others one; each with the prefix cache off and on.
        assert len(servers) == 2 * (2 * 5 + (6 if preset == "h200" else 4) * 3)
        assert not any("--device=cpu" in server for server in servers)
        assert not any(server[0] == "env" for server in servers)
        assert set(words(commands, "--dataset-name=")) == {"--dataset-name=openai", "--dataset-name=image"}

    def test_flags_win_over_the_preset(self, dry_run: DryRun) -> None:
        commands = dry_run(
            *("--preset=h200", "--models=llava-1.5-7b", "--budgets=64", "--concurrency=2", "--rounds=1"),
            *("--image-px=336x336", "--image-kinds=random", "--prefix-cache=off", "--num-requests=3"),
            *("--output-tokens=5", "--server-args=--attention-backend triton"),
        )
        *servers, off, at_all, pruned, smaller = commands
        assert len(servers) == 3
        for server in servers:
            assert server[server.index("--attention-backend") + 1] == "triton"
        methods = ['"mmtok_method": "downsample"' in " ".join(load) for load in (off, at_all, pruned, smaller)]
        assert methods == [False, False, False, True]
        for load in (off, at_all, pruned, smaller):
            # Twice the concurrency, so that every client is busy twice.
            assert {"--num-prompts=4", "--max-concurrency=2", "--random-output-len=5"} <= set(load)
            assert "--image-resolution=336x336" in load

    def test_a_smaller_image_is_the_servers_and_is_sent_whole(self, dry_run: DryRun) -> None:
        commands = dry_run(
            *("--preset=h200", "--models=qwen2.5-vl-7b", "--budgets=10%@0.50", "--concurrency=1", "--rounds=1"),
            *("--image-px=1008x672", "--image-kinds=photograph", "--prefix-cache=off"),
        )
        *servers, off, at_all, scaled = commands
        assert len(servers) == 3
        assert {"--mmtok-budget=10%", "--mmtok-encoder-scale=0.5"} <= set(servers[2])
        sent = words((off, at_all, scaled), "--dataset-path=")
        assert len(sent) == 3
        assert len(set(sent)) == 1

    def test_one_server_is_asked_for_each_budget_about_other_images(self, dry_run: DryRun) -> None:
        commands = dry_run(
            *("--preset=h200", "--models=qwen2.5-vl-7b", "--budgets=10%@0.5,all@0.5", "--concurrency=1", "--rounds=1"),
            *("--image-px=1008x672", "--image-kinds=photograph,random", "--prefix-cache=off", "--one-server"),
        )
        servers = starting("launch_server", commands)
        assert [words([server], "--mmtok") for server in servers] == [[], ["--mmtok-budget=all"]]
        loads = starting("benchmark.serving", commands)
        asked = [word.partition("kwargs")[2] for word in words(loads, "--extra-request-body")]
        scaled = [
            '": {"mmtok_budget": "10%", "mmtok_encoder_scale": 0.5}}',
            '": {"mmtok_budget": "all", "mmtok_encoder_scale": 0.5}}',
        ]
        assert sorted(asked) == sorted(["", "", *scaled] * 2)
        # Features of the same images would be in the server's cache.
        for named, num_shared in (("--dataset-path=", 2), ("--seed=", 4)):
            images = words(loads, named)
            counts = sorted(Counter(images).values())
            assert counts == [*[1] * (len(images) - num_shared), num_shared]

    def test_other_methods_are_asked_about_images_of_their_own(self, dry_run: DryRun) -> None:
        commands = dry_run(
            *("--preset=h200", "--models=llava-next-7b", "--budgets=160", "--concurrency=1", "--rounds=1"),
            *("--image-px=672x672", "--image-kinds=photograph", "--prefix-cache=off", "--methods=mmtok,visionzip"),
        )
        *servers, off, smaller, at_all, pruned, other = commands
        assert len(servers) == 3
        assert ['"mmtok_method": "visionzip"' in " ".join(load) for load in (off, at_all, pruned, other, smaller)] == [
            *(False, False, False, True, False)
        ]
        sent = words((off, at_all, pruned, other), "--dataset-path=")
        assert len(sent) == 4
        assert len(set(sent[:3])) == 1
        assert sent[3] != sent[0]

    def test_questions_about_an_image_are_one_load(self, dry_run: DryRun) -> None:
        commands = dry_run(
            *("--preset=h200", "--models=qwen2.5-vl-7b", "--budgets=10%", "--concurrency=16", "--rounds=1"),
            *("--image-px=1008x672", "--image-kinds=photograph,random", "--prefix-cache=on"),
            *("--questions-per-image=1,6", "--images-in-turn=40"),
        )
        loads = starting("benchmark.serving", commands)
        assert sorted(words(loads, "--num-prompts=")) == [*["--num-prompts=240"] * 4, *["--num-prompts=32"] * 4]
        servers = starting("launch_server", commands)
        # As many fit an H200, each with a KV cache of that size.
        assert all("--max-total-tokens=60000" in server for server in servers)

    def test_a_checkpoint_is_served_with_its_weights(self, dry_run: DryRun) -> None:
        checkpoint = make_tiny_checkpoint("qwen2.5-vl", CHECKPOINT)
        commands = dry_run("--preset=cpu", f"--model-path={checkpoint}", "--family=qwen2.5-vl")
        assert f"--model-path={checkpoint}" in commands[0]
        assert not any("--load-format=dummy" in command for command in commands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=b200"], "invalid choice: 'b200'"),
        (["--budgets=10%,ten"], "budget 'ten' is not understood"),
        (["--budgets=10%,auto"], "the budget auto depends on the question, and loads have no real questions"),
        (["--concurrency=0"], "expected a whole number of at least 1, got '0'"),
        (["--image-px=1008"], "expected width x height in pixels, such as 1008x672, got '1008'"),
        (["--image-px=0x672"], "got '0'"),
        (["--image-kinds=drawing"], "expected some of photograph,document,random, got 'drawing'"),
        (["--prefix-cache=cold"], "expected some of off,on, got 'cold'"),
        (
            ["--models=gpt-2"],
            "preset cpu has qwen2.5-vl-0.5b, llava-1.5-0.5b, qwen3-vl-0.5b, qwen2.5-vl-3b; got 'gpt-2'",
        ),
        (["--family=llava-1.5"], "give it with --model-path"),
        (["--model-path=."], "--model-path needs --family, one of qwen2-vl, qwen2.5-vl, qwen3-vl, qwen3-vl-moe, "),
        (["--model-path=.", "--dummy-weights"], "not allowed with argument --model-path"),
        (["--model-path=nowhere", "--family=llava-1.5"], "--model-path nowhere holds no config.json"),
        (["--model-path=.", "--family=llava-1.5", "--models=llava-1.5-0.5b"], "give one of them"),
        (["--image-kinds=random", "--prefix-cache=on"], "no random images"),
        (["--image-kinds=random", "--questions-per-image=2"], "no random images"),
        (["--questions-per-image=1,7"], "--questions-per-image is at most 6"),
        (["--methods=mmtok,best"], "method is one of"),
        (["--methods=downsample"], "downsample is measured anyway"),
        (["--methods=evs"], "evs goes by the frames of a video"),
        (["--methods=visionzip"], "qwen2.5-vl does not run visionzip: drop it, or qwen2.5-vl-0.5b from --models"),
        (["--server-args=--mmtok-method evs"], "the one without a budget would not start with --mmtok-method"),
    ],
)
def test_usage(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = [] if arguments[0].startswith("--preset") else ["--preset=cpu"]
    try:
        code: object = run(*preset, *arguments, folder=tmp_path / "new")
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_servers(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint("qwen2.5-vl", CHECKPOINT)
    # A shell's background jobs ignore SIGINT, and hand that down.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from mmtok_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--preset=cpu", f"--model-path={checkpoint}", "--family=qwen2.5-vl", f"--results-dir={tmp_path}"]
    command = [sys.executable, "-c", program, "bench", "serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started: list[psutil.Process] = []
    while len(started) < 2:
        assert process.poll() is None
        time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped; the servers have ended." in said
    assert psutil.wait_procs(started, timeout=10)[1] == []
    assert [read_rows(path) for path in tmp_path.glob("serve-*.jsonl")] == [[]]


def kill_server_at_all(folder: Path) -> None:
    """Waits for the last row of the server without the plugin, and kills the one at `all`, which is next."""
    while not any('"method": "downsample"' in path.read_text() for path in folder.glob("serve-*.jsonl")):
        time.sleep(0.1)
    for process in servers_of(folder):
        with contextlib.suppress(psutil.Error):
            if "--mmtok-budget=all" in process.cmdline():
                process.kill()


def servers_of(folder: Path) -> list[psutil.Process]:
    """Returns the servers of a checkpoint in `folder`: other tests' servers are theirs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        # One that has just ended has no command line.
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_a_sweep_one_of_whose_servers_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_tiny_checkpoint("qwen2.5-vl", tmp_path / "qwen2.5-vl")
    killer = threading.Thread(target=kill_server_at_all, args=(tmp_path,), daemon=True)
    killer.start()
    code = run(
        *("--preset=cpu", f"--model-path={checkpoint}", "--family=qwen2.5-vl", "--budgets=10%"),
        *("--concurrency=2", "--image-px=224x224", "--num-requests=4", "--output-tokens=3", "--rounds=1", "--json"),
        "--server-args=--dtype=float32",
        folder=tmp_path,
    )
    printed = capsys.readouterr()
    assert code == 1
    said = [line for line in printed.err.splitlines() if line.startswith("qwen2.5-vl: ")]
    failures = [line for line in said if ": starting" not in line and not line.endswith("prefix cache off")]
    assert failures == ["qwen2.5-vl: no more cases of budget all: the server died."]
    assert "The end of its log:" in printed.err
    assert servers_of(tmp_path) == []

    (path,) = tmp_path.glob("serve-*.jsonl")
    rows = read_rows(path)
    assert [json.loads(line)["case"] for line in printed.out.splitlines()] == [row.case for row in rows]
    by_cell = {(row.case["method"], row.case["budget"]): row for row in rows}
    assert list(by_cell) == [("none", "off"), ("downsample", "10%"), ("mmtok", "10%")]
    for (method, _), row in by_cell.items():
        # A smaller image of this shape has 9 or 4 tokens, not 6.
        kept = {"none": 64, "mmtok": 6, "downsample": 9}[str(method)]
        assert row.num_runs == 4
        assert row.metrics["num_failed"] == 0
        assert (row.metrics["image_tokens_in"], row.metrics["image_tokens_kept"]) == (64, kept)
        # Two of the three tokens of an answer are read again.
        assert row.metrics["kv_tokens_per_request"] == pytest.approx(int(row.case["text_tokens"]) + kept + 2, abs=0.5)
        assert 0 < row.metrics["ttft_p50_ms"] <= row.metrics["e2e_p50_ms"]
        assert row.metrics["peak_memory_bytes"] > 1e8
        assert row.metrics["max_requests_at_once"] > 1
        # Only a server with the plugin knows its parts.
        for stage in ("vision_encoder_ms", "selection_ms", "language_prefill_ms"):
            assert (row.metrics.get(stage, 0) > 0) == (method == "mmtok")
    assert by_cell["mmtok", "10%"].metrics["num_fallbacks"] == 0
