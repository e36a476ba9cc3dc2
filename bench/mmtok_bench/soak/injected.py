"""Faults inside the scheduler process: no memory, features that are not numbers, hooks that raise."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from mmtok_bench.second_plugin import plugin_environment
from mmtok_bench.server import ServerError, SglangServer
from mmtok_bench.soak import fault_plugin
from mmtok_bench.soak.fault_plugin import CONTROL
from mmtok_bench.soak.fixed_chats import (
    TOLERANCE,
    Account,
    ask_for_logprobs,
    chat_body,
    largest_difference,
    small_image,
)
from mmtok_bench.soak.trial import Reply, Trial, send

__all__ = ["fault_environment", "features_that_are_not_numbers", "hooks_that_raise", "out_of_memory"]

_HOOKS = ("get_image_feature", "from_processor_output", "write_positions")
_VALUES = tuple((value, where) for value in ("nan", "inf", "-inf") for where in ("one", "some", "all"))
_TIMEOUT_S = 40.0
_MAX_DEATHS = 3


@dataclass(frozen=True, slots=True)
class _Met:
    """What the plugin in the server says of the last fault: how much it counted, and whether it came about."""

    num_seen: int
    met: bool


class _Faults:
    """Tells the plugin in the server what is to fail next, and reads what came of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._id = 0

    def next(self, **fault: Any) -> None:
        self._id += 1
        (self._folder / "met.json").unlink(missing_ok=True)
        written = self._folder / ".fault.json"
        written.write_text(json.dumps({"id": self._id, **fault}), encoding="utf-8")
        written.replace(self._folder / "fault.json")

    def met(self) -> _Met | None:
        """Returns what came of it, None if the hook was not called."""
        (self._folder / "fault.json").unlink(missing_ok=True)
        try:
            values = json.loads((self._folder / "met.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return _Met(values["num_seen"], values["met"]) if values["id"] == self._id else None


def fault_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a server that loads the plugin of faults, and writes its entry point."""
    control = folder.absolute() / "faults"
    control.mkdir(parents=True, exist_ok=True)
    return {CONTROL: str(control)} | plugin_environment(
        folder, "mmtok_soak_faults", f"{fault_plugin.__name__}:register"
    )


def out_of_memory(trial: Trial, num_points: int, *flags: str) -> None:
    """Lets each allocation of each hook fail once, at most `num_points` of them, evenly spread."""
    for hook in _HOOKS:
        with _deaths(trial) as deaths:
            points: list[int] | None = None
            while points is None or points:
                if trial.is_over() or deaths.are_too_many():
                    break
                with deaths.counted(), _served(trial, flags) as (server, faults):
                    if points is None:
                        points = _points_of(trial, server, faults, hook, max(1, num_points // len(_HOOKS)))
                        trial.counts[f"allocations_{hook}"] = max(points, default=0)
                    while points and server.is_alive() and not trial.is_over():
                        point = points.pop(0)
                        what = f"family {trial.family} hook {hook} allocation {point}"
                        _one(trial, server, faults, what, "memory", hook=hook, kind="memory", at=point)


def features_that_are_not_numbers(trial: Trial, num_faults: int, *flags: str) -> None:
    """Replaces one, some or all of an image's features by NaN or infinity, after the encoder."""
    numbers = list(range(num_faults))
    with _deaths(trial) as deaths:
        while numbers and not trial.is_over() and not deaths.are_too_many():
            with deaths.counted(), _served(trial, flags) as (server, faults):
                while numbers and server.is_alive() and not trial.is_over():
                    value, where = _VALUES[numbers.pop(0) % len(_VALUES)]
                    what = f"family {trial.family} features {value} ({where})"
                    fault = {"hook": "get_image_feature", "kind": "values", "value": value, "where": where}
                    _one(trial, server, faults, what, value, **fault)


def hooks_that_raise(trial: Trial, *flags: str) -> None:
    """Makes each hook of the scheduler raise once."""
    hooks = list(_HOOKS)
    with _deaths(trial) as deaths:
        while hooks and not trial.is_over() and not deaths.are_too_many():
            with deaths.counted(), _served(trial, flags) as (server, faults):
                while hooks and server.is_alive() and not trial.is_over():
                    hook = hooks.pop(0)
                    what = f"family {trial.family} hook {hook} raises RuntimeError"
                    _one(trial, server, faults, what, f"an error in {hook}", hook=hook, kind="raise")


def _points_of(trial: Trial, server: SglangServer, faults: _Faults, hook: str, most: int) -> list[int]:
    """Returns at which allocations to fail: as many as the hook makes, or as are wanted of them."""
    faults.next(hook=hook, kind="memory", at=10**9)
    _ask(server, _body(trial, f"count {hook}"))
    met = faults.met()
    if met is None:
        # Another family's hook, or one that ran in another process.
        trial.count(f"hooks_not_called_{hook}")
        return []
    if met.num_seen <= most:
        return list(range(1, met.num_seen + 1))
    return sorted({1 + round(step * (met.num_seen - 1) / max(1, most - 1)) for step in range(most)})


def _one(trial: Trial, server: SglangServer, faults: _Faults, what: str, kind_of: str, **fault: Any) -> None:
    """Asks with one fault, then without: it is answered, the server lives, and what comes after is exact."""
    body = _body(trial, what)
    # Without it the image's features are those that are held, and its encoder is not called.
    send(server, "/flush_cache?timeout=30", b"")
    faults.next(**fault)
    reply = _ask(server, body)
    met = faults.met()
    trial.count("faults")
    if met is None or not met.met:
        trial.count("faults_not_met")
        if fault["kind"] != "memory":
            trial.fail(f"the fault did not come about: {kind_of}", what)
    if not server.is_alive():
        trial.fail(f"the server ended: {kind_of}", f"{what}: {_error_line(server)}")
        return
    plain = _ask(server, chat_body([], "Hello?", {}, max_tokens=1))
    if plain.status != 200:
        trial.fail(
            f"a request without an image fails afterwards: {kind_of}", f"{what}: {plain.status} {plain.text[:200]}"
        )
        return
    if reply.status == 0:
        trial.fail(f"a request was not answered: {kind_of}", f"{what}: {reply.text[:200]}")
    trial.count(f"answers_{reply.status // 100}xx" if reply.status else "answers_none")
    again = _logprobs(trial, server, body, f"{what}, the same again")
    flushed = send(server, "/flush_cache?timeout=30", b"")
    if flushed.status != 200:
        trial.fail(f"requests are left in the server: {kind_of}", f"{what}: {flushed.text[:200]}")
    exact = _logprobs(trial, server, body, f"{what}, after a flush")
    if again is None or exact is None:
        return
    difference = largest_difference([exact], [again])
    if not difference <= TOLERANCE:
        difference = min(difference, math.inf)
        trial.fail(
            f"the next identical request is not exact: {kind_of}", f"{what}: logprobs differ by {difference:.3g}"
        )


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


class _Deaths:
    """Counts servers that ended; after three of a hook, the rest of its faults is not run."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._number = 0

    def are_too_many(self) -> bool:
        return self._number >= _MAX_DEATHS

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        num_failures = sum("the server ended" in failure.what for failure in self._trial.failures)
        try:
            yield
        except ServerError as error:
            self._trial.fail("a server does not start", str(error)[-600:])
            self._number = _MAX_DEATHS
        if sum("the server ended" in failure.what for failure in self._trial.failures) > num_failures:
            self._number += 1


@contextlib.contextmanager
def _deaths(trial: Trial) -> Iterator[_Deaths]:
    deaths = _Deaths(trial)
    yield deaths
    if deaths.are_too_many():
        trial.count("stopped_after_three_ends")


@contextlib.contextmanager
def _served(trial: Trial, flags: tuple[str, ...]) -> Iterator[tuple[SglangServer, _Faults]]:
    environment = fault_environment(trial.folder)
    folder = Path(environment[CONTROL])
    (folder / "fault.json").unlink(missing_ok=True)
    with trial.served(*flags, **environment) as server:
        yield server, _Faults(folder)
