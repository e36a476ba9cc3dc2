from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from mmtok_bench.families import FamilyName
from mmtok_bench.pocket import pocket_checkpoint
from mmtok_bench.quality.bench import quality_server
from mmtok_bench.server import SglangServer


@pytest.fixture(scope="package")
def pocket_model_of() -> Iterator[Callable[[FamilyName], SglangServer]]:
    """Gives the running server of a family's pocket model, started when it is first asked for.

    Not kept for the session: servers take gigabytes, and other tests start theirs.
    """
    with contextlib.ExitStack() as servers:
        yield cache(
            lambda family: servers.enter_context(quality_server(pocket_checkpoint(family), family, torch.device("cpu")))
        )


@pytest.fixture
def served_pocket_model(pocket_model_of: Callable[[FamilyName], SglangServer]) -> SglangServer:
    """The pocket LLaVA-1.5."""
    return pocket_model_of("llava-1.5")
