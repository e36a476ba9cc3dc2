from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache import kv_cache_configurator

from mmtok_sglang import memory
from mmtok_sglang.memory import MAX_SELECTION_BYTES, allocated_bytes, reserving
from mmtok_sglang.metrics import SelectionMetrics, collectors


@pytest.mark.parametrize(("num_bytes", "allocated"), [(0, 0), (1, 512), (512, 512), (513, 1024), (4 << 20, 4 << 20)])
def test_a_tensor_takes_whole_blocks(num_bytes: int, allocated: int) -> None:
    assert allocated_bytes(torch.empty(num_bytes, dtype=torch.uint8)) == allocated


@pytest.mark.parametrize(("device_type", "workspace_gb"), [("cuda", 1.2), ("cpu", 0)])
def test_the_kv_cache_leaves_room_for_what_the_plugin_takes(
    monkeypatch: pytest.MonkeyPatch, device_type: str, workspace_gb: float
) -> None:
    monkeypatch.setattr(memory, "current_platform", SimpleNamespace(device_type=device_type))
    reserving_too = reserving(256 << 20, SelectionMetrics())
    arguments: dict[str, Any] = {"is_multimodal": True, "mm_feature_transport": None}
    sglangs = kv_cache_configurator.mm_runtime_reservation_gb(**arguments)
    reserved_gb = reserving_too(kv_cache_configurator.mm_runtime_reservation_gb, **arguments) - sglangs
    assert reserved_gb == pytest.approx(0.25 + MAX_SELECTION_BYTES / 2**30 + workspace_gb, abs=1e-6)
    assert collectors()["reserved_bytes"]._value.get() == pytest.approx(reserved_gb * 2**30)
