"""From settings to a service that is ready to run: the base, its adapters, the automatic choice, hosted mixtures."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..adapters.prompt import text_config
from ..bases import BUNDLED, load_base
from ..hub.remote import Remote
from ..support.console import say
from ..support.errors import ConfigError
from .api.service import Service
from .config import ServeConfig
from .engine import Engine, EngineOptions
from .keys import Keys
from .slots import layout_of
from .store import AdapterStore, StoreLimits


def open_service(config: ServeConfig, environment: Mapping[str, str]) -> tuple[Service, Engine]:
    """Load everything; nothing runs yet.

    Raises:
        ConfigError: the settings, the base or the keys cannot be used.
        RunError: a run that is named is not finished, or damaged.
    """
    keys = Keys.read(config, environment)
    dtype = getattr(torch, config.dtype)
    model, tokenizer = load_base(
        config.base or BUNDLED, dtype=dtype, device=device_of(config.device), revision=config.revision
    )
    base = config.base or BUNDLED
    layout = layout_of(model)
    engine = Engine(model, tokenizer, layout, engine_options(config))
    memory = config.memory
    limits = StoreLimits(memory.adapters, memory.adapter_bytes, memory.rank)
    roots = (*config.roots, *config.adapters)
    store = AdapterStore(
        layout, model, (base, *config.also_called), roots, limits, dtype, hub=Remote() if config.hub else None
    )
    for folder in config.adapters:
        register(store, folder)
    vocabulary = int(text_config(model).vocab_size)
    return Service(config, engine, store, tokenizer, base, vocabulary, keys), engine


def register(store: AdapterStore, folder: Path) -> None:
    """Serve every adapter below a folder; what cannot be served is told, and harms nobody."""
    if not folder.is_dir():
        raise ConfigError(f"adapters: {folder} is not a folder")
    for name, error in store.scan(folder).items():
        say(f"{folder / name} is not served: {error}")


def device_of(name: str) -> str:
    """`auto` is a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def engine_options(config: ServeConfig) -> EngineOptions:
    """The engine waits for no more requests than are admitted."""
    memory = config.memory
    waiting = memory.slots + config.limits.queue
    return EngineOptions(max_rows=memory.slots, max_cache_tokens=memory.cache_tokens, max_waiting=waiting)
