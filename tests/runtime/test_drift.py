"""A new SGLang whose functions take other parameters is noticed before anything is hooked."""

from __future__ import annotations

from typing import get_args

import pytest

from mmtok_deploy.bench.families import Family
from mmtok_deploy.bench.soak.drift import drift_of


@pytest.mark.parametrize("family", get_args(Family))
def test_every_changed_signature_is_found(family: str) -> None:
    result = drift_of(family)
    assert result["failures"] == []
    assert result["num_tried"] > 3 * result["num_hooks"] > 15
