"""Where adapters to choose from come from: folders, repositories, and searches on a hub."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.lora_folder import CONFIG
from ..support.console import say
from ..support.errors import ConfigError, LoramuxError
from .checks import LORA, check_adapter, common_base, names_of, read_adapter_config, skeleton
from .find import search
from .manifest import manifest_of
from .pull import pull
from .recommend import Candidate
from .remote import Remote, split_revision
from .source import read_adapters

_EXAMPLES = 8
_BEST_FIRST = ("exported", "named", "auto", "adapted")


@dataclass(frozen=True)
class Choice:
    """Candidates, and the base that all of them are of."""

    base: str
    revision: str | None
    candidates: list[Candidate]


def gather(sources: Sequence[str], remote: Remote, *, base: str | None = None, limit: int = 20) -> Choice:
    """The plain LoRAs that sources hold.

    Args:
        sources: folders, repositories (`owner/name`, `owner/name@revision`), and words to search a hub for; none
            searches for all adapters of the base.
        base: a Hub id, with `@revision` or without, or a folder; None takes the one that the adapters name. A search
            needs it.
        limit: repositories to take from a search.

    Raises:
        ConfigError: there is no base to search for, or nothing was found.
        AdapterError: the adapters do not name one base and `base` is None; an adapter that was named is of another base
            or does not fit it. One that a search found is left out instead, and told.
        RemoteError, TrustError: as for `pull`.
    """
    found: list[Candidate] = []
    for source in sources or ("",):
        if source and (Path(source).is_dir() or "/" in source):
            found += _from_place(source, remote, base)
        else:
            found += _from_search(source, remote, base, limit)
    if not found:
        raise ConfigError(f"no plain LoRAs found in {', '.join(sources) or remote.endpoint}")
    configs = {candidate.name: read_adapter_config(candidate.folder / CONFIG) for candidate in found}
    name, revision = split_revision(base) if base else common_base(configs, "say which (--base MODEL)")
    model, names = skeleton(name, revision), names_of(name)
    for candidate in found:
        check_adapter(candidate.folder, model, names)
    return Choice(name, revision, found)


def _from_place(source: str, remote: Remote, base: str | None) -> list[Candidate]:
    folder = Path(source).expanduser()
    return list(_in_folder(folder if folder.is_dir() else pull(source, remote, base=base).folder, source))


def _from_search(text: str, remote: Remote, base: str | None, limit: int) -> Iterator[Candidate]:
    if base is None:
        raise ConfigError("say which base to search adapters for (--base MODEL), or name folders or repositories")
    for hit in search(remote, text or None, base=split_revision(base)[0], limit=limit):
        try:
            yield from _from_place(hit.repository, remote, base)
        except LoramuxError as error:
            say(f"left out {hit.repository}: {error}")


def _in_folder(folder: Path, called: str) -> Iterator[Candidate]:
    """The plain LoRAs of a folder, with what its manifest or else their exports tell of them."""
    manifest = manifest_of(folder, called)
    if manifest is None:
        for adapter in read_adapters(folder, examples=_EXAMPLES):
            if _is_lora(adapter.folder):
                name = called if adapter.folder == folder else str(adapter.folder)
                yield Candidate(name, adapter.folder, tuple(example.prompt for example in adapter.examples))
        return
    for task in manifest.tasks:
        if _is_lora(folder / task.folder):
            name = f"{called}/{task.folder}" if task.folder else called
            score = next((task.scores[column] for column in _BEST_FIRST if column in task.scores), None)
            scores = {task.dataset: score} if task.dataset and score is not None else {}
            yield Candidate(name, folder / task.folder, tuple(example.input for example in task.examples), scores)


def _is_lora(folder: Path) -> bool:
    return read_adapter_config(folder / CONFIG).kind == LORA
