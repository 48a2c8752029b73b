"""What a run leaves behind, and what tells one run from another.

recipe.yaml        the recipe as resolved
environment.json   versions, seed, revision, machine; the fingerprints of the base and of every task
metrics.jsonl      one line per log entry
gradients.jsonl    how well the tasks' gradients agree, where train.log_gradients asks for it
checkpoints/       for exact resume
mixture/           the result: a PEFT folder with a manifest; it exists once the run is finished
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.peft_config import PREFIX
from ..support.config import load_yaml, parse, to_data
from ..support.errors import RunError
from ..support.files import atomic_folder, remove_partials, write_json, write_text
from ..tasks import Task
from .batches import MixtureBatches
from .checkpoint import check_tensors, verify_manifest, write_manifest, writing
from .recipe import Recipe, dump_recipe, resolve_paths
from .state import peft_names

_PACKAGES = ("loramux", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "safetensors")
_FREE_KEYS = (
    *("base.known_as", "base.also_called", "train.distributed", "train.log_every", "train.log_gradients"),
    *("train.save_every", "train.keep_checkpoints", "method.excess_rank"),
    *("train.trackers", "baseline", "evaluate.split", "evaluate.limit", "evaluate.batch_size", "export"),
)
"""Keys that may differ on resume: they do not change what is learnt."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file, self.environment_file = self.path / "recipe.yaml", self.path / "environment.json"
        self.metrics_file, self.gradients_file = self.path / "metrics.jsonl", self.path / "gradients.jsonl"
        self.checkpoints, self.mixture = self.path / "checkpoints", self.path / "mixture"

    @property
    def is_finished(self) -> bool:
        return self.mixture.is_dir()

    def open(self, recipe: Recipe, *, resume: bool) -> Literal["new", "resumed", "finished"]:
        """Take the folder for a run of `recipe`; its file is kept up to date where keys may differ on resume.

        Raises:
            RunError: it holds another run, or this one and `resume` was not asked for, or files of something else.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_partials(self.path)
            if not any(self.path.iterdir()):
                self._write_recipe(recipe)
                return "new"
        if not self.recipe_file.is_file():
            raise RunError(f"{self.path}: not empty and not a run folder (no recipe.yaml); name another folder")
        if not resume:
            state = "a finished run" if self.is_finished else "an unfinished run"
            raise RunError(f"{self.path}: holds {state}; resume it (--resume) or name another folder")
        if recipe != self.read_recipe():
            self._refuse_other_recipe(recipe)
            with writing(self.recipe_file):
                self._write_recipe(recipe)
        return "finished" if self.is_finished else "resumed"

    def forget(self) -> None:
        """Leave the folder as it was found: the recipe of this new run was refused."""
        for file in (self.recipe_file, self.environment_file):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # others may keep something there
            self.path.rmdir()

    def read_recipe(self) -> Recipe:
        """The recipe this folder was made with.

        Raises:
            RunError: this is no run folder.
        """
        if not self.recipe_file.is_file():
            raise RunError(f"{self.path}: not a run folder (no recipe.yaml)")
        data = resolve_paths(load_yaml(self.recipe_file), self.path.absolute())
        return parse(Recipe, data, where=str(self.recipe_file))

    def note_environment(self, fingerprint: str, recipe: Recipe, batches: MixtureBatches | None) -> None:
        """Write what a run was made with and on; on resume, check the base and the tasks first.

        Args:
            fingerprint: of the bare base, see `base_fingerprint`.
            batches: what it is trained on; None where there is no task yet.

        Raises:
            RunError: the run in this folder was begun with another base model or on other tasks.
        """
        self.check_base(fingerprint, recipe.base.model)
        noted: dict[str, Any] = {"base_fingerprint": fingerprint}
        if batches is not None:
            tasks = [task.task for task in batches.tasks]
            self.check_tasks(tasks)
            noted |= {"tasks": _fingerprints(tasks), "padding_waste": batches.padding_waste}
            noted |= {"processes": batches.processes}
        machine = {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count(), **_devices()}
        environment = {
            **noted,
            "seed": recipe.train.seed,
            "git_revision": _git_revision(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "hardware": machine,
        }
        write_json(self.environment_file, environment)

    def environment(self) -> dict[str, Any]:
        """What was noted; nothing before training starts."""
        if not self.environment_file.is_file():
            return {}
        found: dict[str, Any] = json.loads(self.environment_file.read_text(encoding="utf-8"))
        return found

    def check_base(self, fingerprint: str, name: str) -> None:
        """Raise RunError when this run was trained on other base weights than those with `fingerprint`."""
        if self.environment().get("base_fingerprint", fingerprint) != fingerprint:
            raise RunError(
                f"{self.path}: trained on another base model than {name!r} as it is now (its weights differ); "
                "give the base it was trained on (base.model, base.revision, base.dtype), or name another folder"
            )

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raise RunError when this run was begun on other training or validation examples than `tasks` have."""
        given = _fingerprints(tasks)
        noted = self.environment().get("tasks", given)
        if list(noted.items()) != list(given.items()):
            differing = [name for name in {**noted, **given} if noted.get(name) != given.get(name)]
            told = ", ".join(f"{name} {_change(name, noted, given)}" for name in differing)
            raise RunError(
                f"{self.path}: begun on other tasks ({told or 'in another order'}); give it the training and "
                "validation examples and the settings it was begun with, or name another folder"
            )

    # ------------------------------------------------------------------ logs

    def log(self, step: int, values: Mapping[str, float], **labels: str) -> None:
        """Append one line to the metrics; RunError when that cannot be written."""
        _append(self.metrics_file, {"step": step, **labels, **values})

    def log_gradients(self, step: int, tasks: Sequence[str], cosines: Sequence[Sequence[float | None]]) -> None:
        """Append the cosines between the tasks' gradients, task x task; RunError when that cannot be written."""
        _append(self.gradients_file, {"step": step, "tasks": list(tasks), "cosine": cosines})

    def metrics(self) -> list[dict[str, Any]]:
        """All metric lines; a last line torn by a kill is left out.

        Raises:
            RunError: a line other than the last is not readable.
        """
        return [entry for _, entry in _lines(self.metrics_file)]

    def gradients(self) -> list[dict[str, Any]]:
        """All lines about gradients; raises as `metrics` does."""
        return [entry for _, entry in _lines(self.gradients_file)]

    def cut_logs(self, step: int) -> None:
        """Drop what was logged after `step`, and a torn last line, so that a resumed run logs every step once."""
        for file in (self.metrics_file, self.gradients_file):
            if file.is_file():
                kept = [line for line, entry in _lines(file) if entry["step"] <= step]
                write_text(file, "".join(f"{line}\n" for line in kept))

    # ------------------------------------------------------------------ the result

    def write_mixture(self, model: Any, weights: Mapping[str, Tensor], card: str | None = None) -> Path:
        """Save the adapter as a PEFT folder and read it back.

        Args:
            model: the PEFT model.
            weights: its adapter tensors by the model's own keys, whole and on the CPU.
            card: its README.md, in the place of PEFT's.

        Raises:
            RunError: it cannot be written, or what PEFT wrote is not, name for name and bit for bit, what the model
                holds.
        """
        with writing(self.mixture), atomic_folder(self.mixture) as staging:
            model.save_pretrained(staging, state_dict=dict(weights), save_embedding_layers=False)
            check_tensors(staging / "adapter_model.safetensors", peft_names(model, weights))
            if card is not None:
                write_text(staging / "README.md", card)
            write_manifest(staging)
        return self.mixture

    def verify_mixture(self) -> Path:
        """The mixture folder, checked against its manifest.

        Raises:
            RunError: the run is not finished, or a file of the mixture was truncated or changed.
        """
        if not self.recipe_file.is_file():
            raise RunError(f"{self.path}: not a run folder (no recipe.yaml)")
        if not self.is_finished:
            raise RunError(f"{self.path}: the run is not finished (no mixture folder); resume it first")
        verify_manifest(self.mixture)
        return self.mixture

    def _write_recipe(self, recipe: Recipe) -> None:
        write_text(self.recipe_file, dump_recipe(recipe, self.path.absolute()))

    def _refuse_other_recipe(self, recipe: Recipe) -> None:
        mine, given = _flat(to_data(self.read_recipe())), _flat(to_data(recipe))
        differing = [key for key in sorted({*mine, *given}) if mine.get(key) != given.get(key) and not _is_free(key)]
        if differing:
            shown = "; ".join(f"{key} was {mine.get(key)!r}, now {given.get(key)!r}" for key in differing)
            raise RunError(
                f"{self.path}: made by another recipe ({shown}); use that recipe to resume, or another folder"
            )


def _append(file: Path, entry: Mapping[str, Any]) -> None:
    with writing(file), file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(entry) + "\n")


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a log as text and as data."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield line, json.loads(line)
        except ValueError:
            if number < len(lines):
                raise RunError(f"{file}, line {number}: not readable as JSON") from None


def base_fingerprint(model: nn.Module) -> str:
    """A hash that tells base models apart: names, shapes and the first and last values of all frozen parameters.

    Args:
        model: bare, or inside adapters of ours, which do not count.
    """
    digest = hashlib.sha256()
    named = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if PREFIX not in name}
    for name, parameter in sorted(named.items()):
        flat = parameter.detach().reshape(-1)
        ends = torch.cat([flat[:64], flat[-64:]]).cpu().contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(ends.numpy().tobytes())
    return digest.hexdigest()


def _fingerprints(tasks: Sequence[Task]) -> dict[str, str]:
    return {task.name: task.fingerprint for task in tasks}


def _change(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    if name not in before:
        return "is new"
    return "changed" if name in now else "is gone"


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the loramux checkout, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _devices() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpus": []}
    return {"gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
