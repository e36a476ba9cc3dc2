from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.mem_cache.multimodal_cache import EmbeddingResult, MultiModalStaticCache

from mmtok_sglang.flush import flushing

KEY = 7


@pytest.mark.parametrize("flushed", [True, False])
def test_all_that_was_made_of_images_is_forgotten_with_sglangs_caches(
    flushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = MultiModalStaticCache(1 << 20)
    embeddings.set(KEY, EmbeddingResult(embedding=torch.zeros(3, 8)))
    monkeypatch.setattr(mm_schedule, "embedding_cache", embeddings)
    cleared: list[str] = []
    stores: Any = [SimpleNamespace(clear=lambda name=name: cleared.append(name)) for name in ("features", "kept")]
    assert flushing(*stores)(lambda scheduler, empty_cache: flushed, None, empty_cache=False) is flushed
    assert cleared == (["features", "kept"] if flushed else [])
    assert embeddings.has(KEY) is not flushed


def test_a_server_without_images_yet_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm_schedule, "embedding_cache", None)
    store: Any = SimpleNamespace(clear=lambda: None)
    assert flushing(store, store)(lambda scheduler, empty_cache: True, None)
