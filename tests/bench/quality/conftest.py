from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mmtok_deploy.bench.quality.pocket import pocket_server
from mmtok_deploy.bench.server import SglangServer


@pytest.fixture(scope="session")
def served_pocket_model() -> Iterator[SglangServer]:
    with pocket_server(torch.device("cpu")) as server:
        yield server
