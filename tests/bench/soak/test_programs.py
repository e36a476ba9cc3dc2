"""The rows that have no server: signatures and exported files."""

from __future__ import annotations

import json
import subprocess
import sys

from mmtok_deploy.bench.soak.artifacts import changed_manifests


def test_every_changed_signature_is_found() -> None:
    command = [sys.executable, "-m", "mmtok_deploy.bench.soak.drift", "qwen2.5-vl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert result["num_tried"] > 3 * result["num_hooks"] > 15


def test_each_value_of_a_manifest_is_changed_in_turn() -> None:
    text = json.dumps({"budget": 3, "files": [{"name": "a.onnx"}]})
    changed = dict(changed_manifests(text))
    assert len(changed) == 4 * 4
    assert json.loads(changed["budget: another value"]) == {"budget": 4, "files": [{"name": "a.onnx"}]}
    assert json.loads(changed["files.0.name: missing"]) == {"budget": 3, "files": [{}]}
    assert json.loads(changed["files: null"]) == {"budget": 3, "files": None}
    assert all(json.loads(each) != json.loads(text) for what, each in changed.items() if what != "files: another value")
