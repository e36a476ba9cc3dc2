"""mmtok export selection: the selection as a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mmtok_deploy.exporters.artifact import file_infos, new_artifact, now, save_model, tensor_infos, versions_of
from mmtok_deploy.exporters.check import check_artifact
from mmtok_deploy.exporters.selection_graph import SelectionSpec, build_selection
from mmtok_deploy.manifest import Check, Manifest

__all__ = ["LIBRARIES", "export_selection"]

LIBRARIES = ("onnx", "onnxscript", "onnxruntime", "torch")
"""Whose versions a manifest of an ONNX file states."""


def export_selection(
    spec: SelectionSpec, path: Path, *, force: bool = False, on_step: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Writes the selection as an ONNX file that has been checked against the reference, and returns its manifest.

    Args:
        spec: What to build.
        path: Where.
        force: Whether it may replace a file.
        on_step: Called with what is done next.

    Raises:
        FileExistsError: The file is there and may not be replaced.
        OSError: It could not be written.
        CheckFailedError: The graph does not give the reference's answer.
    """
    with new_artifact(path, force=force) as file:
        on_step("building the graph")
        model = build_selection(spec)
        save_model(model, file)
        manifest = Manifest(
            kind="selection",
            format="onnx",
            files=file_infos(file),
            inputs=tensor_infos(model.graph.inputs),
            outputs=tensor_infos(model.graph.outputs),
            dimensions={"B": spec.batch, "N": spec.num_tokens, "M": spec.num_words},
            budget=spec.budget,
            form=spec.form,
            constants=spec.config,
            versions=versions_of(*LIBRARIES),
            created=now(),
            check=Check("not run", "", ""),
        )
        Manifest.path_of(file).write_text(manifest.to_json(), encoding="utf-8")
        check = check_artifact(file, manifest, on_case=lambda case: on_step(f"checking {case}"))
        manifest = replace(manifest, check=check)
        Manifest.path_of(file).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
