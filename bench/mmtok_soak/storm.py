"""Many clients at once on a server with little memory, and the growth of memory over thousands of requests."""

from __future__ import annotations

import random
import re
import threading
import time
from typing import Any

import openai
from scipy import stats

from mmtok_bench.client import in_parallel
from mmtok_bench.families import FAMILY_TRAITS
from mmtok_bench.process_tree import process_tree
from mmtok_bench.server import SglangServer
from mmtok_deploy.photographs import PHOTOGRAPHS
from mmtok_soak.fixed_chats import Account, ask_for_logprobs, chat_body, largest_difference, small_image
from mmtok_soak.trial import Trial, resident_bytes, send

__all__ = ["MIN_JUDGED", "STORM_ENVIRONMENT", "STORM_FLAGS", "leak", "storm"]

STORM_FLAGS = (
    "--mmtok-budget=10%",
    "--enable-metrics",
    "--mmtok-feature-cache-mb=1",
    # Overrides the value of `cpu_arguments`, since the last one is used. Only a few requests fit at a time.
    "--max-total-tokens=2560",
    "--chunked-prefill-size=64",
)
STORM_ENVIRONMENT = {"SGLANG_VLM_CACHE_SIZE_MB": "1", "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "11"}
_TIMEOUT_S = 300.0
_ABORTED_SHARE = 0.2
_NUM_KNOWN = 40
# For answers whose images were encoded in another batch than before.
_TOLERANCE = 1e-4
_MAX_GROWTH_MB_PER_1000 = 1.0
# Resident memory varies by 1 MB; with few measurements, the standard error of the growth is 1 MB per 1,000 requests.
_NUM_MEASURED = 200
MIN_JUDGED = 1000
"""The growth of memory is judged from this many requests on."""
_HELD = ("mmtok:selections_remembered_bytes", "mmtok:feature_cache_bytes")
_BUDGETS: tuple[dict[str, Any], ...] = (
    {},
    {"mmtok_budget": "all"},
    {"mmtok_budget": "50%"},
    {"mmtok_budget": 1},
    {"mmtok_budget": 9, "mmtok_method": "divprune"},
    {"mmtok_method": "random", "mmtok_seed": 5},
    {"mmtok_method": "even"},
    {"mmtok_method": "vision-coverage"},
    {"mmtok_budget": "50%", "mmtok_method": "downsample"},
)
_SIZES = ((168, 168), (224, 168), (112, 252), (224, 224))


def storm(trial: Trial, server: SglangServer, num_requests: int, *, num_clients: int = 64) -> None:
    """Sends requests from many clients, a fifth of which disconnect during the answer.

    Forty requests are asked one after another before; later answers to the same requests are compared with these.
    Growth of resident memory is measured over the second half, in which no request is new to the server.
    """
    bodies = [_body(trial, number) for number in range(_NUM_KNOWN)]
    known = [ask_for_logprobs(server, body) for body in bodies]
    retractions_before = _metric(server, "sglang:num_retracted_requests")
    memory: list[tuple[int, int]] = []
    done = 0
    lock = threading.Lock()

    def one(number: int) -> None:
        nonlocal done
        if trial.is_over() or not server.is_alive():
            return
        draw = trial.random("storm", number)
        which = draw.randrange(_NUM_KNOWN)
        what = f"seed {trial.seed} family {trial.family} storm request {number} (body {which})"
        try:
            if draw.random() < _ABORTED_SHARE:
                _hang_up(server, bodies[which], draw)
                trial.count("aborted")
            else:
                _hold(trial, known[which], ask_for_logprobs(server, bodies[which], timeout_s=_TIMEOUT_S), what)
                trial.count("answered")
        except openai.APITimeoutError:
            trial.fail(f"a request was not answered within {_TIMEOUT_S:.0f} s", what)
        except openai.APIStatusError as error:
            trial.fail(f"a valid request got HTTP {error.status_code}", f"{what}: {error.message[:300]}")
        except openai.APIError as error:
            trial.fail("a valid request got no answer", f"{what}: {type(error).__name__} {error}"[:500])
        with lock:
            done += 1
            if done % max(1, num_requests // _NUM_MEASURED) == 0:
                memory.append((done, resident_bytes(server)))
            if done % max(1, num_requests // 40) == 0:
                trial.step(f"{done} of {num_requests} requests")

    start_s = time.monotonic()
    in_parallel(num_clients, one, range(num_requests))
    trial.count("requests", done)
    trial.numbers["requests_per_s"] = round(done / (time.monotonic() - start_s), 1)
    trial.numbers["retractions"] = _metric(server, "sglang:num_retracted_requests") - retractions_before
    _judge_growth(trial, memory, done)


def leak(trial: Trial, server: SglangServer, num_requests: int) -> None:
    """Sends requests that are all different, with a budget of one token, and measures growth.

    Each selection is new, so that each adds to the caches. Threads and open files are counted besides resident memory.
    Memory that the server reports for its caches, which are bounded, is no leak.
    """
    num_threads, num_files = _threads_and_files(server)
    memory: list[tuple[int, int]] = []
    for number in range(num_requests):
        if trial.is_over() or not server.is_alive():
            break
        image = small_image(list(PHOTOGRAPHS)[number % 5], 112, 112)
        fields = {"mmtok_budget": 1, "mmtok_guidance": f"thing {number}"}
        body = chat_body([image], f"What is thing {number}?", fields, max_tokens=1)
        try:
            ask_for_logprobs(server, body)
        except openai.OpenAIError as error:
            trial.fail("a valid request got no answer", f"leak request {number}: {error}"[:400])
        trial.count("requests")
        if number % max(1, num_requests // 40) == 0:
            trial.step(f"{number} of {num_requests} requests")
        if number % max(1, num_requests // _NUM_MEASURED) == 0:
            held = sum(int(_metric(server, name)) for name in _HELD)
            memory.append((number, resident_bytes(server) - held))
    _judge_growth(trial, memory, trial.counts["requests"])
    threads_now, files_now = _threads_and_files(server)
    trial.numbers |= {"more_threads": threads_now - num_threads, "more_files": files_now - num_files}
    if threads_now > num_threads + 40 or files_now > num_files + 40:
        trial.fail("threads or open files are left", f"{trial.numbers}")


def _body(trial: Trial, number: int) -> dict[str, Any]:
    draw = trial.random("storm body", number)
    fields = _BUDGETS[number % len(_BUDGETS)]
    traits = FAMILY_TRAITS[trial.family]
    if fields.get("mmtok_method") in traits.impossible_methods:
        fields = {}
    names = draw.sample(list(PHOTOGRAPHS), draw.choice((1, 1, 1, 2)) if traits.token_px else 1)
    images = [small_image(name, *draw.choice(_SIZES)) for name in names]
    question = f"What is number {number}? " + "Look closely. " * draw.randrange(4)
    return chat_body(images if number % 10 else [], question, fields, max_tokens=draw.choice((1, 4, 16)))


def _hang_up(server: SglangServer, body: dict[str, Any], draw: random.Random) -> None:
    """Reads up to three pieces of a long answer and closes the connection."""
    with server.client() as client:
        stream = client.chat.completions.create(
            model="default",
            messages=body["messages"],
            max_tokens=64,
            temperature=0,
            stream=True,
            timeout=_TIMEOUT_S,
            extra_body={"ignore_eos": True, "mm_processor_kwargs": body["mm_processor_kwargs"]},
        )
        for _ in range(draw.randrange(4)):
            next(iter(stream), None)
        stream.close()


def _hold(trial: Trial, known: Account, account: Account, what: str) -> None:
    difference = largest_difference([known], [account])
    trial.highest("largest_difference_under_way", min(difference, 1e9))
    if not difference <= _TOLERANCE:
        trial.fail("an answer under load is not the one from before", f"{what}: logprobs differ by {difference:.3g}")


def _judge_growth(trial: Trial, memory: list[tuple[int, int]], num_requests: int) -> None:
    """Fails if resident memory grows by 1 MB per 1,000 requests or more over the second half."""
    half = [(number, size) for number, size in memory if number >= num_requests / 2]
    if len(half) < 5:
        return
    fit = stats.linregress([number for number, _ in half], [size for _, size in half])
    growth_mb = 1000 * fit.slope / 2**20
    error_mb = 1000 * fit.stderr / 2**20
    trial.numbers |= {"growth_mb_per_1000": round(growth_mb, 2), "growth_error_mb_per_1000": round(error_mb, 2)}
    # Over fewer requests, the allocators' own changes exceed this growth.
    if num_requests >= MIN_JUDGED and growth_mb >= _MAX_GROWTH_MB_PER_1000:
        sizes_mb = [round(size / 2**20) for _, size in memory]
        growth = f"{growth_mb:.2f} MB per 1,000 requests, with a standard error of {error_mb:.2f}"
        trial.fail("resident memory grows", f"{growth}; MB on the way: {sizes_mb}")


def _threads_and_files(server: SglangServer) -> tuple[int, int]:
    processes = process_tree(server.process_id)
    return sum(each.num_threads() for each in processes), sum(each.num_fds() for each in processes)


def _metric(server: SglangServer, name: str) -> float:
    found = re.findall(
        rf"^{name}(?:_total)?(?:{{[^}}]*}})? (\S+)$", send(server, "/metrics", b"", method="GET").text, re.M
    )
    return sum(float(value) for value in found)
