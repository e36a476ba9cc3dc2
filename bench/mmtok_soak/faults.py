"""The rows of the fault table: each fault, how it is injected, what must hold, and the function that runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmtok_bench.process_tree import running_process
from mmtok_bench.server import SglangServer
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_soak.agent import TIMEOUT_MS, Agent, abuse_the_agent, agent_itself
from mmtok_soak.event_loop import block_the_event_loop
from mmtok_soak.fuzz import fuzz, judge_failed
from mmtok_soak.images import send_odd_images
from mmtok_soak.injected import features_that_are_not_numbers, hooks_that_raise, out_of_memory
from mmtok_soak.killing import kill_processes
from mmtok_soak.storm import STORM_ENVIRONMENT, STORM_FLAGS, leak, storm
from mmtok_soak.trial import Trial
from mmtok_soak.weights import update_weights

__all__ = ["ROWS", "Row"]

_SERVED = ("--mmtok-budget=10%", "--enable-metrics")
# The property test of the keys, which draws 10,000 pairs: its files, and a part of its name.
_KEY_TESTS, _KEY_PAIRS = "tests/runtime/test_*key*.py", "never_share_a_key"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of fault.

    Args:
        name: Name on the command line.
        fault: What is done to the server, for the table.
        injected: How it is done.
        holds: What must hold afterwards, besides the checks after every row.
        minutes: Weight of the row in the time of a run, for one family.
        run: Runs the row.
        is_of_one_family: Whether one family is enough, since the fault does not depend on the model.
    """

    name: str
    fault: str
    injected: str
    holds: str
    minutes: float
    run: Callable[[Trial], None]
    is_of_one_family: bool = False


def _fuzz(trial: Trial) -> None:
    with trial.served(*_SERVED) as server:
        failed = fuzz(trial, server, trial.scaled(6000, at_least=200))
    if failed:
        # The 5xx answers are compared with those of a server without the plugin, which replaces the other one.
        with trial.served("--enable-metrics") as plain:
            judge_failed(trial, plain, failed)


def _on_a_server(
    fault: Callable[[Trial, SglangServer, int], None], full: int, at_least: int = 1
) -> Callable[[Trial], None]:
    """Returns a function that runs a fault on a server with a budget, `full` times in a run of 30 minutes."""

    def run(trial: Trial) -> None:
        with trial.served(*_SERVED) as server:
            fault(trial, server, trial.scaled(full, at_least=at_least))

    return run


def _storm(trial: Trial) -> None:
    with trial.served(*STORM_FLAGS, **STORM_ENVIRONMENT) as server:
        storm(trial, server, trial.scaled(8000, at_least=300))


def _agent(trial: Trial) -> None:
    with Agent() as agent:
        flags = (f"--mmtok-agent-url={agent.url}", f"--mmtok-agent-timeout-ms={TIMEOUT_MS}")
        with trial.served(*_SERVED, *flags) as server:
            abuse_the_agent(trial, server, agent, trial.scaled(10, at_least=2))
    agent_itself(trial, *_SERVED)


def _artifacts(trial: Trial) -> None:
    checkpoint = make_tiny_checkpoint(trial.family, trial.folder / "checkpoints" / f"{trial.family}-0")
    folder = trial.folder / "artifacts" / trial.family
    command = [
        *(sys.executable, "-m", "mmtok_soak.artifacts", trial.family, str(checkpoint), str(folder)),
        *(str(trial.scaled(500, at_least=20)), str(trial.seed)),
    ]
    outcomes: Counter[str] = Counter()
    last = "the start"
    for line in _lines(trial, command, "artifacts", stops=True):
        result = json.loads(line)
        last = result["what"]
        trial.count("flips" if last.startswith("flip") else "changed_manifests")
        if result["in_order"]:
            trial.count(result["outcome"].replace(" ", "_"))
        else:
            kind = result["outcome"].partition(":")[0]
            outcomes[kind] += 1
            trial.fail(f"a changed file: {kind}", f"{last}: {result['outcome']}")
    if trial.counts["returncode"]:
        trial.fail("a changed file ends the process that reads it", f"after {last}: exit {trial.counts['returncode']}")
    del trial.counts["returncode"]


def _drift(trial: Trial) -> None:
    command = [sys.executable, "-m", "mmtok_soak.drift", trial.family]
    lines = list(_lines(trial, command, "drift"))
    if trial.counts.pop("returncode") or not lines:
        trial.fail("the signatures could not be looked at", f"see {trial.folder}/logs")
        return
    result = json.loads(lines[-1])
    trial.count("changed_signatures", result["num_tried"])
    trial.count("hooks", result["num_hooks"])
    for failure in result["failures"]:
        trial.fail("a changed signature is not found", failure)


def _keys(trial: Trial) -> None:
    root = Path(__file__).resolve().parents[3]
    files = sorted(map(str, root.glob(_KEY_TESTS)))
    if not files:
        trial.fail("the property test of keys is not here: run in a checkout", str(root / _KEY_TESTS))
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", _KEY_PAIRS]
    last = ""
    for line in _lines(trial, [*command, "-m", "not slow", "--rootdir", str(root)], "keys"):
        last = line.strip() or last
    status = trial.counts.pop("returncode")
    if status == 5:
        trial.fail("there is no property test of keys", f"pytest {_KEY_TESTS} -k {_KEY_PAIRS}: {last}")
    elif status:
        trial.fail("the property test of keys fails", last)
    else:
        trial.count("pairs", 10_000)


def _lines(trial: Trial, command: list[str], name: str, *, stops: bool = False) -> Iterator[str]:
    """Yields the lines that a program prints; its exit status is then the count `returncode`.

    Args:
        trial: Has the row's folder and time.
        command: The program.
        name: Name of its log.
        stops: End the program, without an exit status, when the row's time is over; otherwise it ends by itself.
    """
    log = trial.folder / "logs" / f"{name}-{trial.family}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as errors,
        running_process(
            command, grace_s=1.0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            yield line
            if stops and trial.is_over():
                break
        else:
            trial.counts["returncode"] = process.wait()


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            "fuzz",
            "Fuzzed bodies on `/v1/chat/completions`, `/generate`, `/v1/completions`, `/v1/messages`",
            "drawn from a seed: our fields, texts with placeholders and role marks, any node of the body, its bytes",
            "each is answered within 60 s; 5xx only where SGLang without a budget gives one",
            5,
            _fuzz,
        ),
        Row(
            "images",
            "Images cut off, changed, of odd modes and sizes, or that expand to gigabytes",
            "files made by Pillow or by hand, with a budget, `all`, `auto` and `downsample`",
            "2xx or 4xx within 60 s, and under 2 GB more memory",
            1.5,
            _on_a_server(send_odd_images, 400, 20),
        ),
        Row(
            "events",
            "32 addresses that hang, 10 MB of guidance, and both",
            "a local server that accepts connections and sends nothing; chats with 10 MB of text",
            "`/health` answers within 250 ms",
            1,
            _on_a_server(block_the_event_loop, 6),
        ),
        Row(
            "weights",
            "Updates of the weights",
            "`/update_weights_from_disk` to another checkpoint and back, with and without `flush_cache`, half of them "
            "while chats are retracted by `/pause_generation`",
            "answers are those of the loaded weights, or the update is refused; retracted chats are answered",
            1,
            _on_a_server(update_weights, 50, 4),
        ),
        Row(
            "leak",
            "Requests that are all different, with a budget of one token",
            "a new guidance each, one after another",
            "resident memory grows by under 1 MB per 1,000; no threads or files are left",
            2,
            _on_a_server(leak, 4000, 200),
        ),
        Row(
            "storm",
            "64 clients, mixed budgets and methods; a fifth disconnect",
            "2,560 tokens of KV, chunks of 64, forced retraction, 1 MB for features and for embeddings",
            "each answer equals the one before the storm; memory grows by under 1 MB per 1,000",
            8,
            _storm,
        ),
        Row(
            "memory",
            "Out of memory at each allocation of the scheduler's hooks",
            "a second plugin raises in place of an operation's result",
            "the request is answered, the next identical one is exact",
            2,
            # In 30 minutes, this covers all allocations: no hook has more than a third of this number.
            lambda trial: out_of_memory(trial, trial.scaled(4000, at_least=30), *_SERVED),
        ),
        Row(
            "values",
            "NaN and infinite features",
            "a second plugin writes them after the encoder: one, some, all",
            "the request is answered, the next identical one is exact",
            1,
            lambda trial: features_that_are_not_numbers(trial, trial.scaled(54, at_least=9), *_SERVED),
        ),
        Row(
            "hooks",
            "Each hook of the scheduler raises",
            "a second plugin raises in its place",
            "the request ends, the server lives",
            0.5,
            lambda trial: hooks_that_raise(trial, *_SERVED),
        ),
        Row(
            "agent",
            "An agent that redirects, answers endlessly, with gzip bombs or nested JSON, is slow, resets, or is the "
            "server itself",
            "a local endpoint of each kind, a time limit of 2 s",
            "requests are answered in time; redirects are not followed, endless answers are not read",
            1.5,
            _agent,
            True,
        ),
        Row(
            "kill",
            "SIGKILL of one process of a server with requests",
            "a process drawn from a seed",
            "all processes end within 10 s, no orphan is left",
            4,
            lambda trial: kill_processes(trial, trial.scaled(20), *_SERVED),
            True,
        ),
        Row(
            "artifacts",
            "Exported files changed",
            "each field of the manifest: another value, another type, null, missing; single bits of manifest and graph",
            "refused, or the same selection",
            1,
            _artifacts,
        ),
        Row(
            "drift",
            "A changed signature of each hooked function",
            "a parameter added, removed or renamed; the function missing",
            "the error names the function before any hook is installed",
            0.3,
            _drift,
        ),
        Row(
            "keys",
            "Pairs of cache keys that differ in one field",
            "the property test of the keys",
            "values that differ never share a key",
            0.5,
            _keys,
            True,
        ),
    )
}
"""In the order in which they run; rows that use the same server follow one another."""
