"""Checkpoints: all that trains and nothing else, in safetensors and JSON; whole or absent, verified both ways."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..support.console import say
from ..support.errors import RunError
from ..support.files import atomic_folder, remove_partials, write_json

ADAPTER, OPTIMIZER, STATE, MANIFEST = "adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The content of one checkpoint.

    Attributes:
        adapter: adapter and router tensors by PEFT name, buffers included.
        optimizer: optimiser state by `<parameter>/<slot>`.
        state: step, stage, best score and whatever else the loop needs, JSON safe.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class DamagedCheckpoint(RunError):
    """A checkpoint that is not what was written: a file is missing, short or changed."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder` in one atomic move, after reading back what was written.

    Raises:
        RunError: when it cannot be written (a full disk, say); an earlier folder of that name stays.
    """
    with writing(folder), atomic_folder(folder) as staging:
        save_tensors(staging / ADAPTER, checkpoint.adapter)
        save_tensors(staging / OPTIMIZER, checkpoint.optimizer)
        write_json(staging / STATE, {"format": FORMAT, **checkpoint.state})
        write_manifest(staging)
        check_tensors(staging / ADAPTER, checkpoint.adapter)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunError when the block cannot write, whichever library notices (a full disk, a missing permission)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"could not write {path}: {reason}; what was there before is untouched") from None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        DamagedCheckpoint: naming the file that is missing, truncated or changed.
    """
    verify_manifest(folder)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{folder / STATE}: format {state.get('format')!r}; this version reads {FORMAT}")
    return Checkpoint(load_tensors(folder / ADAPTER), load_tensors(folder / OPTIMIZER), state)


class CheckpointFolder:
    """The checkpoints of a run, `step-00000120` and so on, of which the last few and the best are kept."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep

    def at(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.root.glob("step-*") if path.is_dir())

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint of its step, then drop those no longer needed."""
        state = checkpoint.state
        write_checkpoint(self.at(state["step"]), checkpoint)
        needed = {*self.steps()[-self.keep :], state.get("best_step")}
        for step in self.steps():
            if step not in needed:
                shutil.rmtree(self.at(step))
        return self.at(state["step"])

    def read_latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are reported and passed over.

        Raises:
            RunError: there are checkpoints and all are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                checkpoint = read_checkpoint(self.at(step))
            except DamagedCheckpoint as error:
                say(f"{error}; going back to the checkpoint before it")
                damaged.append(str(error))
            else:
                return checkpoint
        if damaged:
            raise RunError("no usable checkpoint is left:\n" + "\n".join(damaged))
        return None

    def drop_after(self, step: int) -> None:
        """Remove checkpoints of later steps and what interrupted writes left behind."""
        if self.root.is_dir():
            remove_partials(self.root)
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.at(later))


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        DamagedCheckpoint: it is missing or no whole safetensors file. Nothing is ever unpickled.
    """
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path}: not a whole safetensors file ({error})") from None


def check_tensors(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Compare a written file with what should be in it, bit for bit.

    Raises:
        RunError: naming the first tensor that is missing, extra or different.
    """
    found = load_tensors(path)
    for name in sorted({*found, *expected}):
        if name not in found:
            raise RunError(f"{path}: tensor {name!r} was not written")
        if name not in expected:
            raise RunError(f"{path}: holds a tensor {name!r} the model does not have")
        if not torch.equal(_bits(found[name]), _bits(expected[name])):
            raise RunError(f"{path}: tensor {name!r} differs from the model ({tuple(found[name].shape)})")


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file of a folder into its manifest."""
    files = {p.relative_to(folder).as_posix(): _fingerprint(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / MANIFEST, {"files": files})


def verify_manifest(folder: Path) -> None:
    """Check every file of a folder against its manifest.

    Raises:
        DamagedCheckpoint: naming the file and what is wrong with it.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(f"{folder / MANIFEST}: missing or not readable") from None
    for name, noted in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path}: missing")
        found = _fingerprint(path)
        if found["bytes"] != noted["bytes"]:
            raise DamagedCheckpoint(f"{path}: {found['bytes']} bytes, {noted['bytes']} were written (truncated?)")
        if found["sha256"] != noted["sha256"]:
            raise DamagedCheckpoint(f"{path}: its content was changed since it was written (SHA-256 differs)")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _bits(tensor: Tensor) -> Tensor:
    """Bytes, so that NaN equals NaN and -0 differs from 0; the shape is kept in front."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return torch.cat([torch.tensor([*tensor.shape, -1]).view(torch.uint8), flat])
