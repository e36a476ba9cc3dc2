from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmtok_bench.client import openai_client
from mmtok_gpu_check import served_checks
from tests.bench.quality.stand_in import completion, serving


def test_a_new_server_is_asked_in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[Any] = []

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        budgets.append((body.get("mm_processor_kwargs") or {}).get("mmtok_budget"))
        return (400, {"message": "refused"}) if budgets[-1] == 200 else (200, completion("a", 64))

    compiled = "mmtok:triton_compiles_total"
    hashed = "mmtok:image_hash_milliseconds_sum"
    counts = iter([{hashed: 9.0, compiled: 5.0}, {hashed: 51.0, compiled: 5.0}, {hashed: 80.0, compiled: 7.0}])
    monkeypatch.setattr(served_checks, "read_counts", lambda server: next(counts))
    with serving(reply) as url:
        server: Any = SimpleNamespace(client=lambda: openai_client(url))
        found = served_checks.check_server(server, num_requests=40, concurrency=8, max_side_px=120)
    assert budgets[:30] == [None] * 30
    assert set(budgets[30:]) <= set(served_checks._BUDGETS)
    assert len(set(budgets[30:])) > 4
    assert found["num_failed"] == budgets.count(200) > 0
    assert found["triton_compiles"] == 2
    assert "triton_compiles_elsewhere" not in found
    # 21 requests after the first nine.
    assert found["image_hash_ms"] == 2
    assert 0 < found["later_ttft_p50_ms"] <= found["later_ttft_p90_ms"]
