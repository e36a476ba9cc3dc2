"""Exported files as the soak changes them."""

from __future__ import annotations

import json

from mmtok_soak.artifacts import changed_manifests


def test_each_value_of_a_manifest_is_changed_in_turn() -> None:
    text = json.dumps({"budget": 3, "files": [{"name": "a.onnx"}]})
    changed = dict(changed_manifests(text))
    assert len(changed) == 4 * 4
    assert json.loads(changed["budget: another value"]) == {"budget": 4, "files": [{"name": "a.onnx"}]}
    assert json.loads(changed["files.0.name: missing"]) == {"budget": 3, "files": [{}]}
    assert json.loads(changed["files: null"]) == {"budget": 3, "files": None}
    assert all(json.loads(each) != json.loads(text) for what, each in changed.items() if what != "files: another value")
