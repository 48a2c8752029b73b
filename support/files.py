"""Writing that survives a kill: a file or a folder is either the old one or the new one, never half of either."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REPLACED = ".replaced"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that replaces `target` when the block succeeds.

    Everything in it is synced to disk before the rename; on any error it is removed and `target` stays as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield staging
        _sync_tree(staging)
        _replace_folder(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write, sync and rename, so that `path` always holds a whole text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def remove_partials(folder: Path) -> None:
    """Sweep up what an interrupted `atomic_folder` or `write_text` left in `folder`.

    A folder that was moved aside and not yet replaced is put back.
    """
    for leftover in folder.glob(".*.partial"):
        target = folder / leftover.name[1:].removesuffix(".partial").rpartition(".")[0]
        if (leftover / _REPLACED).is_dir() and not target.exists():
            os.rename(leftover / _REPLACED, target)
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _replace_folder(staging: Path, target: Path) -> None:
    os.chmod(staging, 0o755)
    if target.exists():
        # A folder cannot be exchanged in one portable call; the old one is moved aside, so a kill between the two
        # renames leaves a complete copy of it under the `.partial` name.
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        os.rename(target, aside / _REPLACED)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(aside / _REPLACED, target)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(staging, target)
    _sync_folder(target.parent)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors makes its files unreadable for everybody else
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
