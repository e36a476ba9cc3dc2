"""A second SGLang plugin for one server, by which tests and the soak inject faults."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["plugin_environment"]


def plugin_environment(folder: Path, name: str, target: str, *paths: Path) -> dict[str, str]:
    """Writes a plugin's entry point; returns the environment in which every process of a server loads the plugin.

    Args:
        folder: Where the entry point is written; it has to stay while the server runs.
        name: Name of the plugin, in lower case with underscores.
        target: `module:function`, which SGLang calls once in each process.
        *paths: Folders to import the module from, if it is not installed.
    """
    plugin = folder.absolute() / "plugin"
    metadata = plugin / f"{name}-1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {target}\n")
    found = [str(plugin), *map(str, paths), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, found))}
