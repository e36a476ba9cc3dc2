"""The model families that can be pruned, one file each; add a file and its line here to support another."""

from __future__ import annotations

from mmtok_sglang.families.base import Family
from mmtok_sglang.families.glm_4_1v import Glm41V, Glm45V
from mmtok_sglang.families.internvl3 import InternVL3
from mmtok_sglang.families.llava_1_5 import Llava15
from mmtok_sglang.families.llava_next import LlavaNext
from mmtok_sglang.families.qwen2_5_vl import Qwen25VL
from mmtok_sglang.families.qwen2_vl import Qwen2VL
from mmtok_sglang.families.qwen3_5 import Qwen35, Qwen35Moe
from mmtok_sglang.families.qwen3_vl import Qwen3VL, Qwen3VLMoe

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {
    "qwen2-vl": Qwen2VL(),
    "qwen2.5-vl": Qwen25VL(),
    "qwen3-vl": Qwen3VL(),
    "qwen3-vl-moe": Qwen3VLMoe(),
    "qwen3.5": Qwen35(),
    "qwen3.5-moe": Qwen35Moe(),
    "llava-1.5": Llava15(),
    "llava-next": LlavaNext(),
    "internvl3": InternVL3(),
    "glm-4.1v": Glm41V(),
    "glm-4.5v": Glm45V(),
}
"""By the name of the family's preset (`mmtok_deploy.presets`)."""
