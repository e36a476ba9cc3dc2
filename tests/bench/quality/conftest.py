from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmtok_deploy.bench.pocket.model import make_model, make_processor
from mmtok_deploy.bench.quality.pocket import POCKET_CHECKPOINT, pocket_server
from mmtok_deploy.bench.server import SglangServer

IS_TRAINED = (POCKET_CHECKPOINT / "config.json").is_file()


@pytest.fixture(scope="session")
def served_pocket_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    """A server of the pocket model; of an untrained one, which answers at random, where its checkpoint is not there."""
    arguments: list[str] = []
    folder: Path | None = None
    if not IS_TRAINED:
        folder = tmp_path_factory.mktemp("pocket")
        processor = make_processor()
        make_model(processor, 0).to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
        arguments.append("--model-impl=transformers")
    with pocket_server(None if folder is None else str(folder), torch.device("cpu"), *arguments) as server:
        yield server
