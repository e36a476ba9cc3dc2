"""The manifest beside every exported file: what the file computes, for which sizes, and its checksum."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from mmtok_deploy.budget import Budget
from mmtok_deploy.config import KeySource, SelectionConfig
from mmtok_deploy.dim_range import DimRange

__all__ = [
    "ArtifactError",
    "Check",
    "FileInfo",
    "Format",
    "Kind",
    "Manifest",
    "TensorInfo",
    "describe_file",
    "why_no_file",
]

SCHEMA = 2

Kind = Literal["selection", "encoder", "attached"]
"""The selection alone, joined to a vision encoder of this project, or attached to an encoder that others exported."""
Format = Literal["onnx", "tensorrt", "tensorrt-rtx"]
CheckStatus = Literal["passed", "selection only", "not run"]

BUDGET_DIMENSION = "K"
"""The dimension of outputs whose size is known at run time: how many tokens are kept."""
_METADATA_PREFIX = "mmtok."
# Outputs whose second dimension is the kept tokens.
_KEPT_OUTPUTS = ("kept", "order", "visual_tokens", "coverage")

_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "bool")


class ArtifactError(ValueError):
    """An exported file cannot be used: it is missing, changed, of another version, or for something else."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output.

    Args:
        name: Its name in the graph.
        dtype: As PyTorch names it: float32, float16, bfloat16, int64, bool.
        shape: Sizes; a text is the name of one of the manifest's dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.dtype not in _DTYPES:
            raise ValueError(
                f"a tensor has a name and is of {', '.join(_DTYPES)}, got {self.name!r:.100}, {self.dtype!r:.100}"
            )
        for size in self.shape:
            if not isinstance(size, str) and not (_is_count(size) and size >= 1):
                raise ValueError(f"a size of {self.name} is a number of at least 1 or a name, got {size!r:.100}")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of the artifact, in the manifest's folder."""

    name: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or Path(self.name).name != self.name:
            raise ValueError(f"a file's name is one without folders, got {self.name!r:.100}")
        if not _is_count(self.size_bytes) or not isinstance(self.sha256, str):
            raise ValueError(f"a file has size_bytes and sha256, got {self.size_bytes!r:.100}, {self.sha256!r:.100}")


@dataclass(frozen=True, slots=True)
class Check:
    """A comparison with the float32 reference.

    Args:
        status: "passed"; "selection only" if the encoder cannot run on the machine that exported it; "not run" if
            nothing can run there, or no check was asked for.
        runtime: Library that ran it, with its version; empty if nothing ran.
        detail: What was compared, or why nothing was.
    """

    status: CheckStatus
    runtime: str
    detail: str

    def __post_init__(self) -> None:
        if self.status not in get_args(CheckStatus):
            raise ValueError(f"a check is one of {', '.join(get_args(CheckStatus))}, got {self.status!r:.100}")
        if not isinstance(self.runtime, str) or not isinstance(self.detail, str):
            raise ValueError("a check has texts that say what ran it and what was compared")


@dataclass(frozen=True, slots=True)
class Manifest:
    """An exported file's description, `FILE.json` beside `FILE`.

    Args:
        kind: What the graph holds.
        format: The library that runs the file.
        files: The file itself, then its weights and the configuration of its image processor, if it has them.
        inputs: In the graph's order.
        outputs: In the graph's order.
        dimensions: Range of each named dimension: B images, N vision tokens, M rows of text.
        budget: K, tokens kept; the largest K where the graph takes a budget or keeps a share.
        form: How the picks are made; a `Form` of the exporter.
        constants: Temperatures, weight, coverage.
        details: Further facts that depend on the kind: an encoder's family, image size and grid; the tensors that a
            selection is attached to; an engine's compute capabilities; `keys`, "output" where the keys are tokens
            after the projector.
        versions: Versions of the libraries that made it.
        requires: Oldest version of each library that runs it.
        created: UTC time, ISO 8601.
        check: The comparison with the reference at export.
        share: The share of the image's tokens that the graph keeps, "10%"; empty where it keeps a count.
    """

    kind: Kind
    format: Format
    files: tuple[FileInfo, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    dimensions: dict[str, DimRange]
    budget: int
    form: str
    constants: SelectionConfig
    versions: dict[str, str]
    requires: dict[str, str]
    created: str
    check: Check
    share: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("kind", Kind), ("format", Format)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} is one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        if not self.files:
            raise ValueError("files names at least the file itself")
        if not _is_count(self.budget) or self.budget < 1:
            raise ValueError(f"budget is a number of at least 1, got {self.budget!r:.100}")
        for name in ("form", "created", "share"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a text, got {getattr(self, name)!r:.100}")
        for versions in (self.versions, self.requires):
            if not all(isinstance(each, str) for each in (*versions, *versions.values())):
                raise ValueError("versions and requires hold a text for each library")
        if not isinstance(self.details, dict):
            raise ValueError(f"details is an object, got {self.details!r:.100}")
        for size in self.dimensions.values():
            if not all(_is_count(each) for each in (size.minimum, size.optimum, size.maximum)):
                raise ValueError(f"a dimension has whole numbers, got {size!r:.200}")
        if self.share:
            Budget.parse(self.share)
        num_kept = BUDGET_DIMENSION if self.is_told_at_run_time else self.budget
        for tensor in self.outputs:
            if tensor.name in _KEPT_OUTPUTS and tensor.shape[1:2] != (num_kept,):
                raise ValueError(
                    f"budget is {self.budget}, and {tensor.name} is {list(tensor.shape)}: expected {num_kept}"
                )

    @property
    def takes_budget(self) -> bool:
        """Whether the number of tokens to keep is an input, one number for each image."""
        return any(tensor.name == "budget" for tensor in self.inputs)

    @property
    def is_told_at_run_time(self) -> bool:
        """Whether the number of tokens to keep is known only when the graph runs."""
        return self.takes_budget or bool(self.share)

    @property
    def key_source(self) -> KeySource:
        """The side of the projector that the keys are taken from."""
        return "output" if self.details.get("keys") == "output" else "input"

    def num_kept(self, num_tokens: int, asked: int | None = None) -> int:
        """Returns how many tokens of an image are kept if none is excluded.

        Args:
            num_tokens: N of the image.
            asked: Budget of the image, if the graph takes one.
        """
        budget = Budget.parse(self.share) if self.share else Budget(self.budget if asked is None else asked)
        return min(self.budget, budget.num_kept(num_tokens))

    def contract(self) -> str:
        """Returns a checksum of what the graph computes; the graph holds it as well (`metadata`)."""
        said = {name: getattr(self, name) for name in ("kind", "budget", "share", "form")}
        said |= {
            "constants": asdict(self.constants),
            "inputs": [asdict(tensor) for tensor in self.inputs],
            "outputs": [asdict(tensor) for tensor in self.outputs],
            "dimensions": {name: str(size) for name, size in sorted(self.dimensions.items())},
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def metadata(self) -> dict[str, str]:
        """Returns the graph's `metadata_props`, which identify a file without its manifest."""
        said = {
            "version": self.versions.get("mmtok-deploy", ""),
            "file": self.files[0].name,
            "budget": self.share or str(self.budget),
            "form": self.form,
            "constants": json.dumps(asdict(self.constants)),
            "preset": str(self.details.get("preset") or ""),
            "contract_sha256": self.contract(),
        }
        return {f"{_METADATA_PREFIX}{name}": value for name, value in said.items()}

    def input(self, name: str) -> TensorInfo:
        """Returns the input of that name.

        Raises:
            ArtifactError: There is none.
        """
        for tensor in self.inputs:
            if tensor.name == name:
                return tensor
        raise ArtifactError(
            f"{self.files[0].name} has no input {name!r}, only {', '.join(each.name for each in self.inputs)}"
        )

    def to_json(self) -> str:
        """Returns the manifest's text."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Returns the manifest of that text.

        Raises:
            ArtifactError: Not a manifest, or one of another schema.
        """
        try:
            values = json.loads(text)
            schema = values.pop("schema")
            if schema != SCHEMA:
                raise ArtifactError(f"schema {schema} is not understood, this version reads {SCHEMA}: export again")
            names = {each.name for each in fields(cls)}
            if set(values) != names:
                raise ArtifactError(f"fields differ: {', '.join(sorted(set(values) ^ names))}")
            return cls(
                **values
                | {
                    "files": tuple(FileInfo(**each) for each in values["files"]),
                    "inputs": _tensors(values["inputs"]),
                    "outputs": _tensors(values["outputs"]),
                    "dimensions": {name: DimRange(**size) for name, size in values["dimensions"].items()},
                    "constants": SelectionConfig(**values["constants"]),
                    "check": Check(**values["check"]),
                }
            )
        except ArtifactError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"not a manifest of an exported file: {type(error).__name__}: {error}") from error

    @staticmethod
    def path_of(file: Path) -> Path:
        """Returns the path of an exported file's manifest."""
        return file.with_name(f"{file.name}.json")

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Returns the manifest of an exported file without computing checksums.

        Raises:
            ArtifactError: The file or its manifest is missing, or the manifest does not describe the file.
        """
        path = cls.path_of(file)
        if obstacle := why_no_file(file):
            raise ArtifactError(obstacle)
        if not path.is_file():
            raise ArtifactError(f"{path} is not there, which is written beside {file.name}: keep the files together")
        try:
            manifest = cls.from_json(path.read_text(encoding="utf-8"))
        except (ArtifactError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path}: {error}") from error
        if manifest.files[0].name != file.name:
            described = manifest.files[0].name
            raise ArtifactError(f"{path} describes {described}, not {file.name}: keep both names as they are")
        return manifest

    @classmethod
    def load(cls, file: Path) -> Manifest:
        """Returns the manifest of an exported file after checking the checksums of all its files.

        Raises:
            ArtifactError: The file or its manifest is missing, or a file has changed.
        """
        manifest = cls.read(file)
        for expected in manifest.files:
            _check_file(file.with_name(expected.name), expected)
        return manifest

    def read_file(self, file: Path, sha256: str | None = None) -> bytes:
        """Returns the checked bytes of the exported file; load these, since the file may change after the check.

        Args:
            file: The file.
            sha256: Checksum that the bytes must also have, lower case; None for none.

        Raises:
            ArtifactError: The file has changed, or is not the one that `sha256` names.
        """
        content = file.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if sha256 is not None and found != sha256:
            raise ArtifactError(
                f"{file} has the SHA-256 {found}, expected {sha256}: it is not the file that was pinned"
            )
        if found != self.files[0].sha256:
            raise ArtifactError(f"{file} is not what was exported (its checksum differs): export it again")
        return content


def why_no_file(path: Path) -> str | None:
    """Returns why a path is not a file that can be read, None if it is one."""
    if path.is_dir():
        return f"{path} is a folder: name the file in it"
    if path.is_file():
        return None
    links_to = f" (it is a link to {path.readlink()})" if path.is_symlink() else ""
    return f"{path} {'is no file' if path.exists() else 'does not exist'}{links_to}"


def describe_file(path: Path) -> FileInfo:
    """Returns a file's name, size and checksum."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileInfo(path.name, path.stat().st_size, digest)


def _check_file(path: Path, expected: FileInfo) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is not there: export it again, and keep the files together")
    size = path.stat().st_size
    if size != expected.size_bytes:
        raise ArtifactError(f"{path} has {size} bytes, exported were {expected.size_bytes}: export it again")
    if describe_file(path).sha256 != expected.sha256:
        raise ArtifactError(f"{path} is not what was exported (its checksum differs): export it again")


def _tensors(values: list[dict[str, Any]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(each["name"], each["dtype"], tuple(each["shape"])) for each in values)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
