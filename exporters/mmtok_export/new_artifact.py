"""Makes the files of an export appear together and complete, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtok_deploy.manifest import Manifest

__all__ = ["PROCESSOR_SUFFIX", "WEIGHTS_SUFFIX", "check_output", "files_of", "new_artifact"]

WEIGHTS_SUFFIX = ".data"
PROCESSOR_SUFFIX = ".processor_config.json"
# Suffix of the temporary folder beside the output path, in which a file is written.
_UNFINISHED = ".mmtok-unfinished"


@contextmanager
def new_artifact(path: Path, *, force: bool) -> Iterator[Path]:
    """Yields a path of the same name in a temporary folder; at the end, all files of this folder move beside `path`.

    Args:
        path: Final path of the file.
        force: Whether existing files may be replaced.

    Raises:
        FileExistsError: The file exists and may not be replaced.
    """
    check_output(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        _clear_unfinished(path.parent)
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent))
        except OSError as error:
            raise OSError(
                f"no file can be written in {path.parent} ({error.strerror}): choose another --output"
            ) from error
        # The system releases this lock when the process ends, even if it is killed.
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder / path.name
        # Another export may have written the file in the meantime.
        check_output(path, force=force)
        # The manifest is moved last, since a file without it cannot be loaded.
        written = sorted(folder.iterdir(), key=lambda file: file == Manifest.path_of(folder / path.name))
        for file in files_of(path):
            file.unlink(missing_ok=True)
        for file in written:
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _clear_unfinished(parent: Path) -> None:
    """Removes temporary folders of killed exports, which may take gigabytes."""
    for folder in parent.glob(f".*{_UNFINISHED}"):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:  # another export is running
            pass
        finally:
            os.close(lock)


def check_output(path: Path, *, force: bool) -> None:
    """Checks whether a file can be written, without writing anything.

    Raises:
        FileExistsError: The file, or one that is written beside it, exists and may not be replaced.
        NotADirectoryError: Its folder, or one above it, is no folder.
        PermissionError: Its folder may not be written to.
    """
    above = next(each for each in path.absolute().parents if os.path.lexists(each))
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is no folder: choose another --output")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"no file may be written in {above}: choose another --output")
    if path.is_dir() or not path.name:
        raise FileExistsError(f"{path} is a folder: name a file, --output FILE")
    for existing in files_of(path):
        if existing.is_symlink() and not existing.exists():
            raise FileExistsError(f"{existing} is a link to {existing.readlink()}, which is not there: remove the link")
        if existing.exists() and not force:
            raise FileExistsError(f"{existing} is there already: choose another --output, or --force to replace it")


def files_of(path: Path) -> list[Path]:
    """Returns the paths of an exported file, its weights, its image processor's configuration and its manifest."""
    beside = (path.with_name(f"{path.name}{suffix}") for suffix in (WEIGHTS_SUFFIX, PROCESSOR_SUFFIX))
    return [path, *beside, Manifest.path_of(path)]
