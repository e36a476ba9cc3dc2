from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from mmtok_bench.families import FamilyName, family_arguments
from mmtok_bench.server import SglangServer, cpu_arguments, cpu_environment, running
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from tests.runtime.hand_pruned import HandPruned
from tests.runtime.serving import Served, template_arguments

FAMILIES = get_args(FamilyName)
MIN_TOKENS_IN = 8
"""What the tests' images have, but for the smallest of Qwen2.5-VL."""
PLAIN_HEALTH = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
"""Without it, /health generates a token and takes 1 s at least, whether the server is busy or not."""
MAX_ASPECT_RATIO = 2000
"""Above the default, so that a line of 1 x 1000 pixels, of which no token may be picked, is served."""
CHECKPOINTS = Path(__file__).parents[2] / "artifacts" / "checkpoints"


def checkpoint(family: FamilyName) -> Path:
    return make_tiny_checkpoint(family, CHECKPOINTS / family)


@cache
def judge_of(family: FamilyName) -> HandPruned:
    return HandPruned(family, checkpoint(family))


def make_server(family: FamilyName, *arguments: str, num_ranks: int = 1, **environment: str) -> SglangServer:
    has_budget = any(argument.startswith("--mmtok-budget") for argument in arguments)
    return SglangServer(
        checkpoint(family),
        *cpu_arguments(),
        *template_arguments(family, checkpoint(family)),
        # What a LLaVA needs without a budget alone.
        *(() if has_budget else family_arguments(family)),
        "--enable-cache-report",
        *arguments,
        env=cpu_environment(num_ranks=num_ranks) | PLAIN_HEALTH | environment,
    )


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> FamilyName:
    chosen: FamilyName = request.param
    return chosen


@pytest.fixture(scope="session")
def servers(family: FamilyName) -> Iterator[tuple[Served, Served]]:
    """A server with a budget of 10% and one without the flag, of the same checkpoint."""
    flags = [
        "--mmtok-budget=10%",
        f"--mmtok-min-tokens-in={MIN_TOKENS_IN}",
        f"--mmtok-max-aspect-ratio={MAX_ASPECT_RATIO}",
        "--enable-metrics",
        "--enable-streaming-session",
    ]
    pruned, plain = make_server(family, *flags), make_server(family)
    with running(pruned, plain):
        yield Served(family, pruned, judge_of(family)), Served(family, plain, judge_of(family))


@pytest.fixture
def served(servers: tuple[Served, Served]) -> Iterator[Served]:
    """The server with a budget; it must be alive after whatever the test did to it."""
    yield servers[0]
    assert servers[0].server.is_alive()
