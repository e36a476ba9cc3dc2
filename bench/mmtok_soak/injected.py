"""Faults inside the scheduler process: no memory, features that are not numbers, hooks that raise."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from mmtok_bench.server import ServerError, SglangServer
from mmtok_soak import fault_plugin
from mmtok_soak.fault_plugin import CONTROL
from mmtok_soak.fixed_chats import (
    TOLERANCE,
    Account,
    ask_for_logprobs,
    chat_body,
    largest_difference,
    small_image,
)
from mmtok_soak.second_plugin import plugin_environment
from mmtok_soak.trial import Reply, Trial, send

__all__ = ["fault_environment", "features_that_are_not_numbers", "hooks_that_raise", "out_of_memory"]

_HOOKS = ("get_image_feature", "from_processor_output", "write_positions")
_VALUES = tuple((value, where) for value in ("nan", "inf", "-inf") for where in ("one", "some", "all"))
_TIMEOUT_S = 40.0
_MAX_ENDS = 3


@dataclass(frozen=True, slots=True)
class _Fault:
    """One fault: a description that no other fault has, its kind for messages, and the fields of `fault.json`."""

    what: str
    kind: str
    fields: dict[str, Any]


class _Faults:
    """Sends the next fault to the plugin in the server, and reads whether it happened."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._id = 0

    def next(self, **fault: Any) -> None:
        self._id += 1
        (self._folder / "met.json").unlink(missing_ok=True)
        written = self._folder / ".fault.json"
        written.write_text(json.dumps({"id": self._id, **fault}), encoding="utf-8")
        written.replace(self._folder / "fault.json")

    def met(self) -> dict[str, Any] | None:
        """Returns `num_seen` and `met`, whether the fault happened; None if the hook was not called."""
        (self._folder / "fault.json").unlink(missing_ok=True)
        try:
            values: dict[str, Any] = json.loads((self._folder / "met.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return values if values["id"] == self._id else None


def fault_environment(folder: Path) -> dict[str, str]:
    """Writes the fault plugin's entry point; returns the environment of a server that loads it."""
    control = folder.absolute() / "faults"
    control.mkdir(parents=True, exist_ok=True)
    return {CONTROL: str(control)} | plugin_environment(
        folder, "mmtok_soak_faults", f"{fault_plugin.__name__}:register"
    )


def out_of_memory(trial: Trial, num_points: int, *flags: str) -> None:
    """Makes each allocation of each hook fail once; at most `num_points` allocations, evenly spread."""
    for hook in _HOOKS:

        def points(server: SglangServer, faults: _Faults, hook: str = hook) -> Iterator[_Fault]:
            points = _points_of(trial, server, faults, hook, max(1, num_points // len(_HOOKS)))
            trial.counts[f"allocations_{hook}"] = max(points, default=0)
            for point in points:
                fields = {"hook": hook, "kind": "memory", "at": point}
                yield _Fault(f"family {trial.family} hook {hook} allocation {point}", "memory", fields)

        _inject_all(trial, flags, points)


def features_that_are_not_numbers(trial: Trial, num_faults: int, *flags: str) -> None:
    """Replaces one, some or all of an image's features by NaN or infinity, after the encoder."""
    faults = []
    for value, where in itertools.islice(itertools.cycle(_VALUES), num_faults):
        fields = {"hook": "get_image_feature", "kind": "values", "value": value, "where": where}
        faults.append(_Fault(f"family {trial.family} features {value} ({where})", value, fields))
    _inject_all(trial, flags, lambda *_: faults)


def hooks_that_raise(trial: Trial, *flags: str) -> None:
    """Makes each hook of the scheduler raise once."""
    faults = [
        _Fault(
            f"family {trial.family} hook {hook} raises RuntimeError",
            f"an error in {hook}",
            {"hook": hook, "kind": "raise"},
        )
        for hook in _HOOKS
    ]
    _inject_all(trial, flags, lambda *_: faults)


def _inject_all(
    trial: Trial, flags: tuple[str, ...], list_faults: Callable[[SglangServer, _Faults], Iterable[_Fault]]
) -> None:
    """Injects faults one after another; a server that ended is replaced, and after three ends the row stops.

    Args:
        trial: Counts and reports.
        flags: The servers' flags.
        list_faults: Returns the faults, once the first server is ready.
    """
    left: list[_Fault] | None = None
    num_ends = 0
    while left != [] and num_ends < _MAX_ENDS and not trial.is_over():
        num_before = _num_ended(trial)
        try:
            with _served(trial, flags) as (server, faults):
                left = list(list_faults(server, faults)) if left is None else left
                while left and server.is_alive() and not trial.is_over():
                    _one(trial, server, faults, left.pop(0))
        except ServerError as error:
            trial.fail("a server does not start", str(error)[-600:])
            num_ends = _MAX_ENDS
        num_ends += _num_ended(trial) > num_before
    if num_ends >= _MAX_ENDS:
        trial.count("stopped_after_three_ends")


def _num_ended(trial: Trial) -> int:
    return sum("the server ended" in failure.what for failure in trial.failures)


def _points_of(trial: Trial, server: SglangServer, faults: _Faults, hook: str, most: int) -> list[int]:
    """Returns the numbers of the allocations that fail: all of the hook's, or `most` of them, evenly spread."""
    faults.next(hook=hook, kind="memory", at=10**9)
    _ask(server, _body(trial, f"count {hook}"))
    met = faults.met()
    if met is None:
        # A hook of another family, or of another process.
        trial.count(f"hooks_not_called_{hook}")
        return []
    num_seen = met["num_seen"]
    if num_seen <= most:
        return list(range(1, num_seen + 1))
    return sorted({1 + round(step * (num_seen - 1) / max(1, most - 1)) for step in range(most)})


def _one(trial: Trial, server: SglangServer, faults: _Faults, fault: _Fault) -> None:
    """Asks with one fault, then without: both must be answered, and the second answer must be exact."""
    what, kind = fault.what, fault.kind
    body = _body(trial, what)
    # Otherwise the image's features come from the cache, and the encoder is not called.
    send(server, "/flush_cache?timeout=30", b"")
    faults.next(**fault.fields)
    reply = _ask(server, body)
    met = faults.met()
    trial.count("faults")
    if met is None or not met["met"]:
        trial.count("faults_not_met")
        if fault.fields["kind"] != "memory":
            trial.fail(f"the fault did not happen: {kind}", what)
    if not server.is_alive():
        trial.fail(f"the server ended: {kind}", f"{what}: {_error_line(server)}")
        return
    plain = _ask(server, chat_body([], "Hello?", {}, max_tokens=1))
    if plain.status != 200:
        said = f"{what}: {plain.status} {plain.text[:200]}"
        trial.fail(f"a request without an image fails afterwards: {kind}", said)
        return
    if reply.status == 0:
        trial.fail(f"a request was not answered: {kind}", f"{what}: {reply.text[:200]}")
    trial.count_answer(reply)
    again = _logprobs(trial, server, body, f"{what}, the same again")
    flushed = send(server, "/flush_cache?timeout=30", b"")
    if flushed.status != 200:
        trial.fail(f"requests are left in the server: {kind}", f"{what}: {flushed.text[:200]}")
    exact = _logprobs(trial, server, body, f"{what}, after a flush")
    if again is not None and exact is not None:
        difference = largest_difference([exact], [again])
        if not difference <= TOLERANCE:
            said = f"{what}: logprobs differ by {difference:.3g}"
            trial.fail(f"the next identical request is not exact: {kind}", said)


def _body(trial: Trial, what: str) -> dict[str, Any]:
    return chat_body([small_image("astronaut", 168, 168)], f"What is at {what}, seed {trial.seed}?", {})


def _ask(server: SglangServer, body: dict[str, Any]) -> Reply:
    return send(server, "/v1/chat/completions", body, timeout_s=_TIMEOUT_S)


def _logprobs(trial: Trial, server: SglangServer, body: dict[str, Any], what: str) -> Account | None:
    try:
        return ask_for_logprobs(server, body, timeout_s=_TIMEOUT_S)
    except openai.OpenAIError as error:
        trial.fail("a request without a fault fails after one with a fault", f"{what}: {error}"[:400])
        return None


def _error_line(server: SglangServer) -> str:
    lines = [line for line in server.log_text().splitlines() if "Error" in line]
    return (lines or server.log_end().splitlines())[-1][:300]


@contextlib.contextmanager
def _served(trial: Trial, flags: tuple[str, ...]) -> Iterator[tuple[SglangServer, _Faults]]:
    environment = fault_environment(trial.folder)
    folder = Path(environment[CONTROL])
    (folder / "fault.json").unlink(missing_ok=True)
    with trial.served(*flags, **environment) as server:
        yield server, _Faults(folder)
