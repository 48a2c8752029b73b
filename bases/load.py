"""Finding and loading the frozen model: the bundled one by its name, any other by Hub id or local folder."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..support.console import say
from ..support.errors import ConfigError
from ..support.files import atomic_folder, write_json
from ..support.identity import BaseIdentity

BUNDLED = "loramux/tiny"
"""The name under which the base that ships with the package is loaded and named in exports."""

_BUNDLED_FOLDER = Path(__file__).parent / "tiny"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{40})/?$")


def resolve_base(name: str | Path) -> str:
    """What `from_pretrained` accepts for `name`: the folder of the bundled base, a local folder, or a Hub id.

    Raises:
        ConfigError: when `name` is neither, or a folder that does not exist or holds no model.
    """
    text = str(name)
    if text == BUNDLED:
        return str(_BUNDLED_FOLDER)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"base {text!r}: the folder has no config.json, so it is not a Hugging Face model")
        return str(folder)
    if isinstance(name, Path) or not _HUB_ID.fullmatch(text):
        raise ConfigError(
            f"base {text!r}: no such folder, and not a Hub id; give {BUNDLED!r} (it comes with loramux), "
            "a Hub id such as 'HuggingFaceTB/SmolLM2-135M', or a folder with config.json and safetensors"
        )
    return text


def load_base(
    name: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    quantize: Literal["8bit", "4bit"] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer, from safetensors only and without running code that came with the model.

    Args:
        name: `loramux/tiny`, a Hub id, or a folder.
        dtype: of the weights, a torch dtype or its name ("bfloat16").
        revision: branch, tag or commit of a Hub id; not for the bundled base or a folder.
        quantize: hold the linears' weights in so many bits, by bitsandbytes (the extra `loramux[quantized]`).

    Returns:
        The model in evaluation mode on `device`, and the tokenizer, which has a padding token.

    Raises:
        ConfigError: when the base cannot be found, reached or read, or `dtype` is not a floating point type.
    """
    source = resolve_base(name)
    options = {"revision": _checked_revision(name, source, revision), "trust_remote_code": False}
    weights = _floating(dtype)
    try:
        if quantize is not None:
            options |= {"quantization_config": _quantization(quantize, weights), "device_map": {"": device}}
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=weights, use_safetensors=True, **options)
    except _UNREADABLE as error:
        raise _explained(name, source, error) from error
    placed = model.to(device) if quantize is None else model  # bitsandbytes places its weights itself
    return placed.eval(), load_tokenizer(name, revision=revision)


def _quantization(bits: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantize {bits!r} needs bitsandbytes: pip install 'loramux[quantized]'")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base alone; arguments and errors are those of `load_base`."""
    source = resolve_base(name)
    revision = _checked_revision(name, source, revision)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except _UNREADABLE as error:
        raise _explained(name, source, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_identity(name: str | Path, *, revision: str | None = None, known_as: str | None = None) -> BaseIdentity:
    """Name a base so that an adapter made here can be used elsewhere: never by a path of this machine.

    Args:
        name: what was given to `load_base`.
        known_as: the Hub id that a local folder is a copy of.

    Raises:
        ConfigError: for a folder whose origin is not recorded, when `known_as` does not tell it.
    """
    if known_as is not None:
        if not _is_public(known_as):
            raise ConfigError(f"base known as {known_as!r}: give a Hub id ('owner/name') or {BUNDLED!r}, not a path")
        return BaseIdentity(known_as, revision)
    source = resolve_base(name)
    if Path(source) == _BUNDLED_FOLDER:
        return BaseIdentity(BUNDLED)
    if Path(source).is_dir():
        return _folder_identity(Path(source), revision)
    return BaseIdentity(source, _commit(source, revision))


def write_base(folder: Path) -> Path:
    """Write the bundled base as an ordinary Hugging Face folder that any tool can load.

    Raises:
        ConfigError: when `folder` exists and is not empty.
    """
    refuse_used_folder(folder)
    with atomic_folder(folder) as staging:
        for file in sorted(_BUNDLED_FOLDER.iterdir()):
            shutil.copyfile(file, staging / file.name)
        # Transformers drops the public name on save; recorded here, copies of the folder are still recognised.
        data = json.loads((staging / "config.json").read_text(encoding="utf-8"))
        write_json(staging / "config.json", {"_name_or_path": BUNDLED, **data})
    return folder


def refuse_used_folder(folder: Path) -> None:
    """Raise ConfigError unless a new folder can be written at `folder` without losing anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not empty; name a new folder")


def _checked_revision(name: str | Path, source: str, revision: str | None) -> str:
    if revision is not None and os.path.isdir(source):
        raise ConfigError(f"base {str(name)!r}: it lies on this machine and has no revision {revision!r}")
    return revision or "main"


def _floating(dtype: str | torch.dtype) -> torch.dtype:
    found: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {dtype!r}: give float32, bfloat16 or float16")
    return found


def _explained(name: str | Path, source: str, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if os.path.isdir(source):
        return ConfigError(f"base {str(name)!r}: cannot be read from that folder: {reason}")
    return ConfigError(
        f"base {str(name)!r}: cannot be loaded from the Hugging Face Hub: {reason}\n"
        f"Check the id, the network and (for a gated model) `hf auth login`; {BUNDLED!r} needs no network."
    )


def _folder_identity(folder: Path, revision: str | None) -> BaseIdentity:
    cached = _CACHED.search(folder.absolute().as_posix())
    if cached:
        return BaseIdentity(f"{cached['owner']}/{cached['name']}", cached["revision"])
    origin = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path", "")
    if not _is_public(origin):
        raise ConfigError(
            f"base {str(folder)!r}: a folder of this machine, and its config.json does not say which public model it "
            "is; tell it (known_as: owner/name), so that others can use the adapters"
        )
    if origin != BUNDLED:
        say(f"{folder}: taken as a copy of {origin!r}, as its config.json says; give known_as if its weights differ")
    return BaseIdentity(origin, revision)


def _is_public(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _commit(hub_id: str, revision: str | None) -> str | None:
    try:
        found = AutoConfig.from_pretrained(hub_id, revision=revision or "main", trust_remote_code=False)
    except OSError:
        return revision
    return getattr(found, "_commit_hash", None) or revision
