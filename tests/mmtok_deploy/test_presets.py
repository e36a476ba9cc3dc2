from __future__ import annotations

import pytest

from mmtok_deploy import SelectionConfig
from mmtok_deploy.presets import PRESETS, Preset


@pytest.mark.parametrize(
    ("family", "tv_temp", "guidance"),
    [
        ("llava-1.5", 0.02, "keywords"),
        ("llava-next", 0.02, "keywords"),
        ("qwen2.5-vl", 0.01, "question"),
    ],
)
def test_constants_are_the_authors(family: str, tv_temp: float, guidance: str) -> None:
    preset = PRESETS[family]
    assert isinstance(preset, Preset)
    assert preset.config == SelectionConfig(tv_temp=tv_temp, vv_temp=0.2, alpha=0.5, coverage="multimodal")
    assert preset.guidance == guidance


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen3-vl", "qwen3-vl-moe", "qwen3.5", "qwen3.5-moe", "internvl3"])
def test_families_without_constants_of_the_authors_have_those_of_qwen2_5_vl(family: str) -> None:
    assert PRESETS[family] == PRESETS["qwen2.5-vl"]
