"""How two adapters, or two folders of them, differ: settings, scores, and how far their updates are apart."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters import LowRank, read_lora
from ..adapters.lora_folder import CONFIG
from ..support.errors import ConfigError
from .checks import LORA, AdapterConfig, read_adapter_config, skeleton
from .manifest import manifest_of
from .pull import pull
from .remote import Remote, split_revision
from .source import adapter_folders


@dataclass(frozen=True)
class LayerDistance:
    """How far two updates of one linear are apart.

    Attributes:
        first, second: their Frobenius norms.
        apart: of their difference, over the larger of the two norms; 0 for the same, 1 or more for unrelated ones.
        cosine: between them; None where one is zero.
    """

    name: str
    first: float
    second: float
    apart: float
    cosine: float | None


@dataclass(frozen=True)
class Difference:
    """Two adapters of the same folder name.

    Attributes:
        settings: those that differ, as they are in the first and the second.
        scores: of both, by what was measured; None where only the other has it.
        layers: None where one of them is no plain LoRA.
    """

    folder: str
    settings: dict[str, tuple[str, str]]
    scores: dict[str, tuple[float | None, float | None]]
    layers: list[LayerDistance] | None


@dataclass(frozen=True)
class Diff:
    pairs: list[Difference]
    only_first: list[str]
    only_second: list[str]


def diff(first: str, second: str, remote: Remote) -> Diff:
    """Compare what two places hold, folder by folder; where each holds one adapter, these two.

    Args:
        first, second: a folder, or `owner/name` or `owner/name@revision`.

    Raises:
        ConfigError: a place holds no adapters, or the base they name cannot be found.
        RemoteError, AdapterError, TrustError: as for `pull`.
    """
    a, b = (_Place.open(name, remote) for name in (first, second))
    if len(a.folders) == len(b.folders) == 1:
        common = [(next(iter(a.folders)), next(iter(b.folders)))]
    else:
        common = [(name, name) for name in a.folders if name in b.folders]
    matched_a, matched_b = {x for x, _ in common}, {y for _, y in common}
    return Diff(
        [_difference(a, b, *names) for names in common],
        [name for name in a.folders if name not in matched_a],
        [name for name in b.folders if name not in matched_b],
    )


@dataclass(frozen=True)
class _Place:
    """Adapters by folder name, and their scores."""

    folders: Mapping[str, Path]
    scores: Mapping[str, Mapping[str, float]]

    @classmethod
    def open(cls, name: str, remote: Remote) -> "_Place":
        root = Path(name).expanduser()
        if not root.is_dir():
            root = pull(name, remote).folder
        own = Path(split_revision(name)[0]).name  # what is in the cache is called by its commit
        folders = {own: root} if (root / CONFIG).is_file() else {f.name: f for f in adapter_folders(root)}
        if not folders:
            raise ConfigError(f"{name}: holds no adapters ({CONFIG})")
        manifest = manifest_of(root, name)
        scores = {task.folder or own: task.named_scores for task in (manifest.tasks if manifest else ())}
        return cls(folders, scores)


def _difference(a: _Place, b: _Place, first: str, second: str) -> Difference:
    folders = (a.folders[first], b.folders[second])
    configs = [read_adapter_config(folder / CONFIG) for folder in folders]
    facts = [config.facts for config in configs]
    settings = {
        key: (facts[0].get(key, "none"), facts[1].get(key, "none"))
        for key in {**facts[0], **facts[1]}
        if facts[0].get(key) != facts[1].get(key)
    }
    scores = (a.scores.get(first, {}), b.scores.get(second, {}))
    measured = {name: (scores[0].get(name), scores[1].get(name)) for name in {**scores[0], **scores[1]}}
    comparable = all(config.kind == LORA for config in configs) and configs[0].base == configs[1].base
    layers = list(_distances(folders, configs[0])) if comparable else None
    return Difference(first if first == second else f"{first} / {second}", settings, measured, layers)


def _distances(folders: tuple[Path, Path], config: AdapterConfig) -> Iterator[LayerDistance]:
    base: nn.Module = skeleton(config.base or "", config.revision)
    first, second = (read_lora(folder, base).factors for folder in folders)
    for name in {**first, **second}:
        yield layer_distance(name, first.get(name), second.get(name))


def layer_distance(name: str, first: LowRank | None, second: LowRank | None) -> LayerDistance:
    """Compare two updates of one linear without building them; None stands for no update."""
    own, other = (_inner(pair, pair).clamp(min=0).sqrt().item() if pair else 0.0 for pair in (first, second))
    inner = _inner(first, second).item() if first and second else 0.0
    largest = max(own, other)
    squared = 0.0 if _are_equal(first, second) else own**2 + other**2 - 2 * inner
    apart = max(squared, 0.0) ** 0.5
    cosine = inner / (own * other) if own and other else None
    return LayerDistance(name, own, other, apart / largest if largest else 0.0, cosine)


def _inner(first: LowRank, second: LowRank) -> Tensor:
    """The Frobenius inner product of two deltas, from products of the size of their ranks."""
    ups = first.up.double().T @ second.up.double()
    downs = first.down.double() @ second.down.double().T
    return torch.sum(ups * downs)


def _are_equal(first: LowRank | None, second: LowRank | None) -> bool:
    """Whether both are the same bit for bit; their distance would be rounding, not zero."""
    if first is None or second is None:
        return first is second
    return torch.equal(first.down, second.down) and torch.equal(first.up, second.up)
