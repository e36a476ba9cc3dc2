"""Reads exported files with changes: each field of the manifest, and single bits of the manifest and of the graph.

Runs as a program of its own, since a damaged graph may end the process that reads it: `python -m
mmtok_soak.artifacts FAMILY CHECKPOINT FOLDER NUM_FLIPS SEED` prints one JSON object a line.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import transformers

from mmtok_bench.families import FamilyName

__all__ = ["changed_manifests", "run_artifacts"]


def run_artifacts(
    family: FamilyName, checkpoint: Path, folder: Path, num_flips: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yields the result of each changed file: the change, the outcome, and whether the outcome is in order.

    A file is in order if it is refused as incomplete or as one for another server, or if it selects the same tokens as
    the unchanged file.
    """
    good = _export(family, folder / "good")
    select = partial(_selection, family, checkpoint)
    expected = select(good)
    for what, text in changed_manifests(_manifest(good).read_text(encoding="utf-8")):
        yield _try(f"manifest: {what}", select, _copy(good, folder / "tried", manifest=text.encode()), expected)
    draw = random.Random(seed)
    for number in range(num_flips):
        changed = good if number % 2 else _manifest(good)
        data = bytearray(changed.read_bytes())
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        data[place] ^= 1 << bit
        flipped = {"graph" if number % 2 else "manifest": bytes(data)}
        what = f"flip {number} seed {seed}: bit {bit} of byte {place} of {changed.name}"
        yield _try(what, select, _copy(good, folder / "tried", **flipped), expected)


def changed_manifests(text: str) -> Iterator[tuple[str, str]]:
    """Yields a manifest with each of its values changed in turn: another value, another type, null, and missing."""
    whole = json.loads(text)
    for path in _paths(whole):
        for change in ("another value", "another type", "null", "missing"):
            values = copy.deepcopy(whole)
            holder = values
            for key in path[:-1]:
                holder = holder[key]
            if change == "missing":
                del holder[path[-1]]
            else:
                holder[path[-1]] = _other(holder[path[-1]], change)
            yield f"{'.'.join(map(str, path))}: {change}", json.dumps(values, indent=2) + "\n"


def _paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield (*before, key)
        yield from _paths(part, (*before, key))


def _other(value: Any, change: str) -> Any:
    if change == "null":
        return None
    if change == "another type":
        return 7 if isinstance(value, str | list | dict) or value is None else "seven"
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 2 + 1
        case str():
            return {"float32": "float16", "onnx": "tensorrt", "selection": "encoder"}.get(value, value + "x")
        case list():
            return value[::-1] if len(value) > 1 else [*value, *value]
        case dict():
            return {**value, "extra": 1}
        case _:
            return 1


def _export(family: FamilyName, folder: Path) -> Path:
    from mmtok_deploy.dim_range import DimRange
    from mmtok_deploy.presets import PRESETS
    from mmtok_export.artifact import export_model
    from mmtok_export.selection_graph import build_selection
    from mmtok_export.spec import SelectionSpec

    # The widths are those of the tiny checkpoints.
    spec = SelectionSpec(
        budget=16,
        num_tokens=DimRange.fixed(576) if _has_576_tokens(family) else DimRange(16, 64, 512),
        num_words=DimRange(1, 16, 64),
        batch=DimRange(1, 1, 3),
        vision_width=256,
        keys_width=_keys_width(family),
        dtype="float32",
        keys_dtype="float32",
        config=PRESETS[family].config,
        form="lazy",
    )
    path = folder / "selection.onnx"
    export_model(build_selection(spec), path, "selection", spec, force=True)
    return path


def _manifest(file: Path) -> Path:
    from mmtok_deploy.manifest import Manifest

    return Manifest.path_of(file)


def _copy(good: Path, folder: Path, *, manifest: bytes | None = None, graph: bytes | None = None) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good.parent, folder)
    file = folder / good.name
    if manifest is not None:
        _manifest(file).write_bytes(manifest)
    if graph is not None:
        file.write_bytes(graph)
    return file


def _selection(family: FamilyName, checkpoint: Path, file: Path) -> dict[str, Any]:
    """Returns a server's selection with the file, after the checks of the server's start."""
    import torch

    from mmtok_deploy import Budget
    from mmtok_deploy.executors import EngineExecutor, make_executor
    from mmtok_deploy.presets import PRESETS
    from mmtok_deploy.problem import SelectionProblem
    from mmtok_sglang.engine_file import check_engine_file
    from mmtok_sglang.families import FAMILIES
    from mmtok_sglang.settings import Settings

    preset = PRESETS[family]
    settings = Settings(family, Budget.parse(16), preset.config, preset.guidance, engine=file)
    # After importing the families, which import SGLang: it registers InternVL's format.
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    check_engine_file(settings, FAMILIES[family], config, torch.float32)
    executor = make_executor("auto", torch.device("cpu"), preset.config, file)
    assert isinstance(executor, EngineExecutor)
    executor.check()
    generator = torch.Generator().manual_seed(0)
    num_tokens = 576 if _has_576_tokens(family) else 64
    sizes = ((num_tokens, 256), (num_tokens, _keys_width(family)), (5, 256))
    vision, keys, text = (torch.randn(*size, generator=generator) for size in sizes)
    (selection,) = executor.select([SelectionProblem(vision, keys, text, 16)])
    return {"order": selection.order.tolist(), "coverage": selection.coverage.tolist()}


def _has_576_tokens(family: FamilyName) -> bool:
    return family.startswith("llava")


def _keys_width(family: FamilyName) -> int:
    return 4 * 64 if family == "internvl3" else 64  # a token of InternVL is 2 x 2 patches


def _try(what: str, select: Callable[[Path], dict[str, Any]], file: Path, expected: dict[str, Any]) -> dict[str, Any]:
    from mmtok_deploy.engines import EngineError
    from mmtok_deploy.manifest import ArtifactError
    from mmtok_sglang.engine_file import EngineMismatchError

    try:
        outcome = "the same selection" if select(file) == expected else "another selection"
    except (ArtifactError, EngineError, EngineMismatchError):
        outcome = "refused"
    except Exception as error:  # any other error is a result
        outcome = f"raises {type(error).__name__}: {error}"[:300]
    return {"what": what, "outcome": outcome, "in_order": outcome in ("refused", "the same selection")}


if __name__ == "__main__":
    family, checkpoint, folder, num_flips, seed = sys.argv[1:]
    for result in run_artifacts(cast("FamilyName", family), Path(checkpoint), Path(folder), int(num_flips), int(seed)):
        print(json.dumps(result), flush=True)
