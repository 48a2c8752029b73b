"""What a server is told: what to serve, to whom, and how much of it."""

import ipaddress
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..support.config import apply_overrides, config, load_yaml, parse
from ..support.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_PATHS = ("runs", "adapters", "roots")
_KEY_FILES = ("api_keys_file", "admin_key_file")


@config
class Limits:
    """How much one client may ask for, and all of them together.

    Attributes:
        body_bytes: of a request.
        body_s: seconds until a request must have arrived whole.
        prompt_tokens: of one prompt; the base's own length without an answer where not given.
        answer_tokens: what `max_tokens` may be at most.
        answers: prompts times `n` of one request.
        queue: answers that wait while all slots are taken; more are refused with 429.
        deadline_s: seconds until an answer must be whole.
        drain_s: seconds that answers in the making get after SIGTERM.
        adapter_labels: adapters with metrics of their own; all others are counted together.
    """

    body_bytes: Positive = 2 << 20
    body_s: Seconds = 20.0
    prompt_tokens: Positive | None = None
    answer_tokens: Positive = 4096
    answers: Positive = 64
    queue: Annotated[int, Field(ge=0)] = 256
    deadline_s: Seconds = 300.0
    drain_s: Seconds = 60.0
    adapter_labels: Positive = 200


@config
class Memory:
    """What may be held at once.

    Attributes:
        slots: answers that are made side by side.
        rank: of one adapter, and of a weighted mix of several.
        adapters: kept in host memory; the least recently used one leaves first, and comes back from disk when asked.
        adapter_bytes: of all adapters in host memory.
        cache_tokens: of keys and values that all running answers together may come to need.
        prefix_bytes: of keys and values kept for prompts that begin like earlier ones.
    """

    slots: Positive = 32
    rank: Positive = 256
    adapters: Positive = 256
    adapter_bytes: Positive = 4 << 30
    cache_tokens: Positive = 65536
    prefix_bytes: Annotated[int, Field(ge=0)] = 256 << 20


@config
class ServeConfig:
    """Everything `loramux serve` can be told.

    Attributes:
        base: model to serve, by Hub id or folder; of the first run where not given.
        revision: of a base from the Hub.
        also_called: other names under which adapters know this base.
        runs: finished runs; their exports become adapters, their router the automatic choice, and what routes token by
            token a model of its own.
        adapters: folders of PEFT LoRAs, each served under its folder's name.
        roots: folders below which adapters may be loaded at run time, besides those above.
        hub: also load adapters from the Hugging Face Hub at run time.
        host, port: where to listen; port 0 takes a free one.
        api_keys_file: keys of clients, one a line (or LORAMUX_API_KEYS, separated by commas).
        admin_key_file: the key that loads and unloads adapters (or LORAMUX_ADMIN_KEY).
        anyone: without keys, answer also to others than this machine.
        choice: offer the model `auto`: the router of the first run if it has one that reads prompts, else prototypes of
            the adapters' example prompts.
        threshold: `auto` answers with the base where no adapter reaches this weight.
        dtype: of the base and the adapters; as the run says, or float32.
        quantize: hold the base's weights in fewer bits, by bitsandbytes; not with `runs`.
        device: "auto" takes a GPU where there is one.
    """

    base: str | None = None
    revision: str | None = None
    also_called: tuple[str, ...] = ()
    runs: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()
    roots: tuple[Path, ...] = ()
    hub: bool = False
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys_file: Path | None = None
    admin_key_file: Path | None = None
    anyone: bool = False
    choice: bool = True
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: Literal["8bit", "4bit"] | None = None
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    memory: Memory = field(default_factory=Memory)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_serve_config(file: Path | None, overrides: list[str], given: Mapping[str, object]) -> ServeConfig:
    """The settings of a YAML file, with `key=value` overrides, and what the command line names itself on top.

    Raises:
        ConfigError: naming the key that is wrong, and the nearest right one.
    """
    data = {} if file is None else load_yaml(file) or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: give keys and values, such as `port: 8000`")
    if file is not None:
        data = _relative_to(file.parent, data)
    where = str(file) if file is not None else "settings"
    return parse(ServeConfig, {**apply_overrides(data, overrides), **given}, where=where)


def _relative_to(folder: Path, data: Mapping[str, object]) -> dict[str, object]:
    """Paths of a file are relative to that file."""
    result = dict(data)
    for key in _KEY_FILES:
        if isinstance(path := result.get(key), str):
            result[key] = str(folder / path)
    for key in _PATHS:
        if isinstance(paths := result.get(key), list):
            result[key] = [str(folder / path) if isinstance(path, str) else path for path in paths]
    return result
