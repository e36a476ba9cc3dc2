from __future__ import annotations

from typing import get_args

import pytest
from transformers import AutoConfig

from mmtok_bench.families import FAMILY_TRAITS, FamilyName
from mmtok_deploy.methods import MethodName
from mmtok_deploy.presets import PRESETS
from mmtok_sglang.families import FAMILIES
from mmtok_sglang.transformers_backend import TransformersModel
from tests.runtime.conftest import checkpoint


def test_all_packages_have_the_same_families() -> None:
    assert set(get_args(FamilyName)) == set(FAMILY_TRAITS) == set(FAMILIES) == set(PRESETS)


@pytest.mark.parametrize("name", get_args(FamilyName))
def test_the_traits_are_those_of_the_plugin(name: FamilyName) -> None:
    traits, family = FAMILY_TRAITS[name], FAMILIES[name]
    config = AutoConfig.from_pretrained(checkpoint(name))
    assert traits.placeholder == family.placeholder
    impossible = tuple(method for method in get_args(MethodName) if family.obstacle_to(method, config) is not None)
    assert traits.impossible_methods == impossible
    is_theirs = issubclass(family.model_class, TransformersModel)
    assert traits.arguments == (("--model-impl=transformers",) if is_theirs else ())
    vision = config.vision_config
    has_one_size = family.num_selected_from(config) is not None or name == "internvl3"
    side = None if has_one_size else vision.patch_size * vision.spatial_merge_size
    assert traits.token_px == side
