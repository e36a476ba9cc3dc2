"""The faults that the soak brings into a server, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok_sglang.model import PrunedModel
from mmtok_sglang.stages import StageMetrics
from mmtok_soak.fault_plugin import _with_faults, _wrap_get_image_feature
from mmtok_soak.injected import fault_environment

HOOK = "get_image_feature"


def around(original: Callable[..., Tensor], items: Tensor) -> Tensor:
    """A hook that allocates twice, once before and once after what it hooks, which allocates once itself."""
    doubled = items * 2
    return original(doubled).view(-1) + 1


def encode(items: Tensor) -> Tensor:
    return items.exp()


def call(folder: Path, fault: dict[str, Any] | None, name: str = HOOK) -> Tensor:
    if fault is not None:
        (folder / "fault.json").write_text(json.dumps({"id": 1, "hook": HOOK, **fault}))
    result: Tensor = _with_faults(name, around, folder)(encode, torch.zeros(3, 97))
    return result


def met(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "met.json").read_text())
    return found


@pytest.mark.parametrize("point", [1, 2])
def test_each_allocation_of_the_hook_can_fail_once(tmp_path: Path, point: int) -> None:
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError, match=f"allocation {point}"):
        call(tmp_path, {"kind": "memory", "at": point})
    assert met(tmp_path) == {"id": 1, "num_seen": point, "met": True}
    assert (call(tmp_path, None) == 2).all()


def test_what_is_hooked_counts_no_allocations(tmp_path: Path) -> None:
    assert (call(tmp_path, {"kind": "memory", "at": 100}) == 2).all()
    assert met(tmp_path) == {"id": 1, "num_seen": 2, "met": False}


@pytest.mark.parametrize(("where", "count"), [("one", 1), ("some", 3), ("all", 291)])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_are_written_where_they_were_computed(tmp_path: Path, value: str, where: str, count: int) -> None:
    result = call(tmp_path, {"kind": "values", "value": value, "where": where})
    assert int((~result.isfinite()).sum()) == count
    assert met(tmp_path)["met"]


def test_a_fault_of_another_hook_stays(tmp_path: Path) -> None:
    call(tmp_path, {"kind": "raise"}, name="write_positions")
    assert (tmp_path / "fault.json").exists()
    with pytest.raises(RuntimeError, match="injected"):
        call(tmp_path, None)


def test_sglang_finds_the_plugin_in_the_environment_of_the_soaks_servers(tmp_path: Path) -> None:
    assert "mmtok_soak_faults" not in {each.name for each in entry_points(group="sglang.srt.plugins")}
    look = (
        "from importlib.metadata import entry_points\n"
        "print([each.value for each in entry_points(group='sglang.srt.plugins') if 'soak' in each.name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", look],
        env={**os.environ, **fault_environment(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "['mmtok_soak.fault_plugin:register']\n"


def test_a_models_method_is_wrapped_and_the_encoder_is_what_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guarded(self: Any, items: Any) -> Tensor:
        """What `PrunedModel.get_image_feature` does, without a server: allocates before and after the encoder."""
        doubled: Any = items * 2
        features: Tensor = StageMetrics().encode(lambda model, items: items.exp(), self, doubled)
        return features.view(-1) + 1

    monkeypatch.setattr(PrunedModel, "get_image_feature", guarded)
    monkeypatch.setattr(StageMetrics, "encode", StageMetrics.encode)
    _wrap_get_image_feature(tmp_path)
    model: Any = torch.nn.Linear(1, 1)

    def ask(fault: dict[str, Any]) -> Tensor:
        (tmp_path / "fault.json").write_text(json.dumps({"id": 1, "hook": HOOK, **fault}))
        result: Tensor = PrunedModel.get_image_feature(model, torch.zeros(3, 97))  # type: ignore[arg-type]
        return result

    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError, match="allocation 2"):
        ask({"kind": "memory", "at": 2})
    assert (ask({"kind": "memory", "at": 100}) == 2).all()
    # The encoder's own is not counted.
    assert met(tmp_path)["num_seen"] == 2
    assert int((~ask({"kind": "values", "value": "nan", "where": "one"}).isfinite()).sum()) == 1
    with pytest.raises(RuntimeError, match="injected"):
        ask({"kind": "raise"})
