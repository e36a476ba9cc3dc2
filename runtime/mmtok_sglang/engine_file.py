"""--mmtok-engine: whether an exported selection fits the server."""

from __future__ import annotations

from typing import Any

import torch

from mmtok_deploy.auto_budget import AutoBudget
from mmtok_deploy.backends.triton_plan import FeatureTypes
from mmtok_deploy.manifest import ArtifactError, Manifest
from mmtok_sglang.families.base import Family
from mmtok_sglang.settings import Settings

__all__ = ["EngineMismatchError", "check_engine_file"]


class EngineMismatchError(ValueError):
    """An exported file that was made for another model, budget or dtype than the server's."""


def check_engine_file(settings: Settings, family: Family, config: Any, dtype: torch.dtype) -> None:
    """Raises EngineMismatchError if the server's exported file cannot select for its model and budget.

    Args:
        settings: The server's; one without an exported file fits.
        family: The model's.
        config: Its Hugging Face configuration.
        dtype: What it is served in.

    Raises:
        ArtifactError: The file is not whole.
    """
    if settings.engine is None:
        return
    try:
        manifest = Manifest.load(settings.engine)
    except ArtifactError as error:
        raise ArtifactError(f"--mmtok-engine: {error}") from error
    pinned, found = settings.engine_sha256, manifest.files[0].sha256
    if pinned not in (None, found):
        raise EngineMismatchError(
            f"--mmtok-engine {settings.engine} has the SHA-256 {found}, --mmtok-engine-sha256 names {pinned}: it is "
            "not the file that was pinned"
        )
    if manifest.kind != "selection":
        raise EngineMismatchError(
            f"--mmtok-engine {settings.engine} holds an encoder as well, the server has its own: mmtok export selection"
        )
    types = family.feature_types(config, dtype, settings.executor_keys)
    problems = [*_size_problems(manifest, settings, family, config, types), *_dtype_problems(manifest, types)]
    if manifest.key_source != settings.executor_keys:
        # Beside the widths, which may be equal.
        problems.append(
            f"was exported with --keys {manifest.key_source}, the server compares tokens by the projector's "
            f"{settings.executor_keys} (--mmtok-keys)"
        )
    if manifest.constants != settings.executor_config:
        problems.append(f"was exported with {manifest.constants}, the server has {settings.executor_config}")
    if problems:
        raise EngineMismatchError(f"--mmtok-engine {settings.engine} {'; it '.join(problems)}. Export one that fits")


def _size_problems(
    manifest: Manifest, settings: Settings, family: Family, config: Any, types: FeatureTypes
) -> list[str]:
    problems = []
    widths = {"vision": types.vision_width, "keys": types.keys_width}
    for name, width in widths.items():
        *_, found = (None, *manifest.input(name).shape)
        if found != width:
            problems.append(f"takes {name} of width {found}, the model's have {width}")
    missing = [name for name in ("B", "N", "M") if name not in manifest.dimensions]
    if missing:
        return [*problems, f"says nothing of its dimensions {', '.join(missing)}"]
    sizes = manifest.dimensions["N"]
    fixed = family.num_selected_from(config)
    if fixed is not None and fixed not in sizes:
        problems.append(f"selects from {sizes} tokens, the model has {fixed}")
    elif not settings.budget.is_all:
        problems += _budget_problems(manifest, settings, family, config)
    return problems


def _budget_problems(manifest: Manifest, settings: Settings, family: Family, config: Any) -> list[str]:
    budget = settings.budget
    if isinstance(budget, AutoBudget):
        if not manifest.takes_budget:
            return [
                f"makes {manifest.budget} picks always, --mmtok-budget auto asks for different numbers: mmtok export "
                "selection --budget-input"
            ]
        budget = budget.largest
    num_tokens = family.num_selected_from(config) or manifest.dimensions["N"].maximum
    needed = family.max_num_kept(num_tokens, budget, config)
    # A share of images of any size: the largest needs all of the file's picks, the others the first of them.
    is_share = budget.tokens is None and family.num_selected_from(config) is None
    if needed == manifest.budget or ((is_share or manifest.takes_budget) and needed < manifest.budget):
        return []
    return [f"keeps {manifest.budget} tokens, --mmtok-budget {budget} keeps {needed} of {num_tokens}"]


def _dtype_problems(manifest: Manifest, types: FeatureTypes) -> list[str]:
    dtypes = {"vision": types.vision, "text": types.vision, "keys": types.keys}
    return [
        f"takes {name} in {manifest.input(name).dtype}, the server computes them in {str(computed)[6:]}"
        for name, computed in dtypes.items()
        # float32 holds every value of the others.
        if manifest.input(name).dtype not in (str(computed)[6:], "float32")
    ]
