"""Pulling: adapters come from a hub to this machine, checked before anything of them is used."""

import glob
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ..adapters.lora_folder import CONFIG, PICKLED, WEIGHTS
from ..support.errors import AdapterError, ConfigError, TrustError
from ..support.files import atomic_folder, write_json
from .card import CARD
from .checks import AdapterConfig, check_adapter, common_base, listed_adapters, names_of, read_adapter_config, skeleton
from .remote import LARGEST_TEXT, Commit, Remote, check_name, sha256_of, split_revision
from .signing import ATTESTATION, Attestation, verify

RECORD = "pulled.json"
_FETCHED = (".safetensors", ".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".png")
_MAY_BE_EDITED = (CARD, ".gitattributes")


@dataclass(frozen=True)
class Pulled:
    """What was fetched.

    Attributes:
        commit: that it is of, whatever the revision that was asked for was called.
        folder: where it lies.
        adapters: its PEFT folders below that.
        files: SHA-256 by path.
        left: paths that were not fetched.
        signature: whose it is and from which run the files come, where a signature was asked for.
    """

    repository: str
    commit: str
    folder: Path
    adapters: list[str]
    files: dict[str, str]
    left: list[str] = field(default_factory=list)
    signature: Attestation | None = None


def pull(
    name: str,
    remote: Remote,
    *,
    to: Path | None = None,
    base: str | None = None,
    force_base: bool = False,
    trusted: Mapping[str, Ed25519PublicKey] | None = None,
) -> Pulled:
    """Fetch a repository of adapters and check it.

    Args:
        name: `owner/name` or `owner/name@revision`.
        to: a folder for it; one that an earlier pull made is replaced. None leaves it in the cache.
        base: the model it is meant for, a Hub id, with `@revision` or without, or a folder; None takes the one it
            names.
        force_base: take it though it names another base or another revision of it.
        trusted: keys of which one must have signed it; None asks for no signature.

    Raises:
        RemoteError: there is no such repository, or it holds no adapters.
        TrustError: a file is not what the hub says it is, or not what a trusted key signed.
        AdapterError: an adapter is pickled, of another base, or does not fit it.
        ConfigError: `to` holds something else, or the base cannot be found.
    """
    repository, revision = split_revision(name)
    _refuse_other_folder(to, check_name(repository))
    commit = remote.commit(repository, revision)
    wanted = [path for path, file in commit.files.items() if _is_wanted(path, file.size)]
    adapters = listed_adapters(wanted, repository)
    _refuse_without_weights(adapters, commit.files, repository)
    cached = _fetch(repository, commit, wanted, remote)
    hashes = {path: sha256_of(cached / path) for path in wanted}
    signature = _check_signature(repository, cached, hashes, trusted) if trusted is not None else None
    folders = {str(PurePosixPath(repository) / folder): cached / folder for folder in adapters}
    _check_adapters(folders, base, force_base)
    left = sorted(set(commit.files) - set(wanted))
    pulled = Pulled(repository, commit.sha, cached, adapters, hashes, left, signature)
    return pulled if to is None else _copy(pulled, to, revision, remote.endpoint)


def _is_wanted(path: str, size: int) -> bool:
    """Weights and what people and programs read; no code, no pickles."""
    if not (path.endswith(_FETCHED) or PurePosixPath(path).name in ("LICENSE", "LICENCE")):
        return False
    return path.endswith(".safetensors") or size <= LARGEST_TEXT


def _refuse_without_weights(folders: Iterable[str], there: Collection[str], repository: str) -> None:
    for folder in map(PurePosixPath, folders):
        if str(folder / WEIGHTS) not in there:
            pickled = f"its weights are pickled ({PICKLED}), and reading a pickle can run any code"
            reason = pickled if str(folder / PICKLED) in there else f"no {WEIGHTS} beside its {CONFIG}"
            raise AdapterError(f"{repository}, {folder}: {reason}")


def _fetch(repository: str, commit: Commit, paths: list[str], remote: Remote) -> Path:
    """Files of a commit in the cache, each compared with the hub's hash of it.

    What the cache has wrong, from a disk that failed or a hand that touched it, is fetched anew once.
    """
    for again in (False, True):
        with remote.talking(repository):
            patterns = [glob.escape(path) for path in paths]
            found = remote.api.snapshot_download(
                repository, revision=commit.sha, allow_patterns=patterns, force_download=again
            )
        folder = Path(found)
        wrong = [path for path in paths if not _is_right(folder / path, commit, path)]
        if not wrong:
            return folder
    raise TrustError(
        f"{repository}: {wrong[0]} is not what {remote.endpoint} says it is (its hash differs), also when fetched again"
    )


def _is_right(path: Path, commit: Commit, name: str) -> bool:
    return path.is_file() and commit.files[name].is_same(path)


def _check_signature(
    repository: str, folder: Path, hashes: Mapping[str, str], trusted: Mapping[str, Ed25519PublicKey]
) -> Attestation:
    text = (folder / ATTESTATION).read_text(encoding="utf-8") if ATTESTATION in hashes else None
    attestation = verify(text, trusted, repository)
    if attestation.repository != repository:
        raise TrustError(f"{repository}: its signature is for {attestation.repository}")
    signed = {path: digest for path, digest in attestation.files.items() if _is_wanted(path, 0)}
    found = {path: digest for path, digest in hashes.items() if path not in (*_MAY_BE_EDITED, ATTESTATION)}
    for path in sorted({*signed, *found}):
        if path not in signed:
            raise TrustError(f"{repository}: {path} is not among the files that {attestation.key_id} signed")
        if signed[path] != found.get(path):
            change = "differs from" if path in found else "is missing from"
            raise TrustError(f"{repository}: {path} {change} what {attestation.key_id} signed")
    return attestation


def _check_adapters(folders: Mapping[str, Path], base: str | None, force_base: bool) -> None:
    configs = {called: read_adapter_config(folder / CONFIG) for called, folder in folders.items()}
    remedy = "say which (--base MODEL --force-base)"
    name, revision = split_revision(base) if base else common_base(configs, remedy)
    if base and not force_base:
        _refuse_other_base(configs, name, revision)
    model = skeleton(name, revision)
    for folder in folders.values():
        check_adapter(folder, model)


def _refuse_other_base(configs: Mapping[str, AdapterConfig], name: str, revision: str | None) -> None:
    names = names_of(name)
    for called, config in configs.items():
        if config.base is not None and config.base not in names:
            raise AdapterError(
                f"{called}: an adapter of {config.base!r}, not of {name!r}; if that is a copy of it, say so "
                "(--force-base)"
            )
        if revision and config.revision and config.revision != revision:
            raise AdapterError(
                f"{called}: an adapter of {config.named_base}, not of its revision {revision!r}; take it nevertheless "
                "with --force-base"
            )


def _refuse_other_folder(to: Path | None, repository: str) -> None:
    if to is None or not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    record = read_record(to)
    if record is None:
        raise ConfigError(f"{to}: exists and was not pulled; name a new folder")
    if record.get("repository") != repository:
        raise ConfigError(f"{to}: holds {record.get('repository')}; name another folder for {repository}")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a pull noted beside the files; None where none did."""
    try:
        data = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _copy(pulled: Pulled, to: Path, revision: str | None, endpoint: str) -> Pulled:
    with atomic_folder(to) as staging:
        for path in pulled.files:
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pulled.folder / path, staging / path)
        noted = {"repository": pulled.repository, "endpoint": endpoint, "revision": revision or "main"}
        signature = pulled.signature
        signed = {"signed_by": signature.key_id, "origin": dict(signature.origin)} if signature else {}
        write_json(staging / RECORD, {**noted, "commit": pulled.commit, **signed, "files": pulled.files})
    return Pulled(**{**pulled.__dict__, "folder": to})
