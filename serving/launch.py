"""From settings to a service that is ready to run: the base, its adapters, the automatic choice, hosted mixtures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters import LoramuxModel
from ..adapters.prompt import text_config
from ..bases import BUNDLED, load_base
from ..hub.remote import Remote
from ..support.console import say
from ..support.errors import ConfigError
from ..training.run import public_name
from .api.service import Service
from .choice import Chooser, LearnedRouter, Scorer
from .config import ServeConfig
from .engine import Engine, EngineOptions
from .keys import Keys
from .mixtures import Mixtures
from .packed import pack_linears
from .prototypes import Prototypes
from .runs import RunAdapters, check_run_settings, register_all, run_adapters, served_run
from .slots import layout_of
from .store import AdapterStore, StoreLimits


@dataclass(frozen=True)
class Opened:
    """The model that runs, and what comes with it.

    Attributes:
        model: the bare base, or the one inside a hub whose mixture is hosted.
        base: its public name.
        base_names: what adapters may call it.
        runs: whose exports are served.
        examples: prompts of the runs' tasks.
    """

    model: Any
    tokenizer: Any
    base: str
    base_names: tuple[str, ...]
    runs: Sequence[RunAdapters] = ()
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    router: LearnedRouter | None = None
    mixtures: Mixtures | None = None


def open_service(config: ServeConfig, environment: Mapping[str, str], *, threads: int = 0) -> tuple[Service, Engine]:
    """Load everything; nothing runs yet.

    Args:
        threads: as in `EngineOptions`.

    Raises:
        ConfigError: the settings, the base or the keys cannot be used.
        RunError: a run that is named is not finished, or damaged.
    """
    keys = Keys.read(config, environment)
    for folder in config.adapters:
        if not folder.is_dir():
            raise ConfigError(f"adapters: {folder} is not a folder")
    opened = _opened_run(config) if config.runs else _opened_base(config)
    pack_linears(opened.model)
    layout = layout_of(opened.model)
    engine = Engine(opened.model, opened.tokenizer, layout, _engine_options(config, threads), opened.mixtures)
    mixtures = {} if opened.mixtures is None else {name: opened.mixtures.tasks(name) for name in opened.mixtures.names}
    memory = config.memory
    store = AdapterStore(
        layout,
        opened.model,
        (*opened.base_names, *config.also_called),
        (*config.roots, *config.adapters, *(run.root for run in opened.runs)),
        StoreLimits(memory.adapters, memory.adapter_bytes, memory.rank),
        opened.model.dtype,
        reserved=mixtures,
        hub=Remote() if config.hub else None,
    )
    examples = opened.examples
    register_all(
        config.adapters, opened.runs, lambda name, folder: store.register(name, folder, examples.get(name, ()))
    )
    prototypes = Prototypes(store.examples, lambda text: list(opened.tokenizer(text)["input_ids"]), engine.embed)
    store.subscribe(prototypes.refresh)
    service = Service(
        config,
        engine,
        store,
        opened.tokenizer,
        opened.base,
        int(text_config(opened.model).vocab_size),
        keys,
        mixtures,
        _chooser(config, opened.router or prototypes, store, engine),
    )
    service.at_close.append(store.close)
    if opened.router is None and config.choice:
        service.at_close.append(prototypes.start().stop)
    return service, engine


def _chooser(config: ServeConfig, scorer: Scorer, store: AdapterStore, engine: Engine) -> Chooser | None:
    if not config.choice:
        return None
    return Chooser(scorer, store.names, engine.embed, threshold=config.threshold)


def _opened_base(config: ServeConfig) -> Opened:
    base = config.base or BUNDLED
    dtype, device = config.dtype or "float32", device_of(config.device)
    model, tokenizer = load_base(base, dtype=dtype, device=device, revision=config.revision, quantize=config.quantize)
    return Opened(model, tokenizer, base, (base,))


def _opened_run(config: ServeConfig) -> Opened:
    check_run_settings(config)
    first = served_run(config.runs[0])
    others = [run_adapters(run) for run in config.runs[1:]]
    for note in first.notes:
        say(note)
    dtype = getattr(torch, config.dtype) if config.dtype else first.model.dtype
    first.model.to(device_of(config.device), dtype)
    hub: LoramuxModel | None = first.model.base_model if first.mixture is not None else None
    return Opened(
        first.model if hub is None else hub.model,
        first.tokenizer,
        public_name(first.recipe),
        first.adapters.base_names,
        (first.adapters, *others),
        first.examples,
        first.router if not others else None,
        None if hub is None else Mixtures(hub, {str(first.mixture): hub.active_adapters[0]}),
    )


def device_of(name: str) -> str:
    """`auto` is a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _engine_options(config: ServeConfig, threads: int) -> EngineOptions:
    """The engine lets no more requests wait than are admitted."""
    memory = config.memory
    return EngineOptions(
        max_rows=memory.slots,
        max_cache_tokens=memory.cache_tokens,
        prefix_bytes=memory.prefix_bytes,
        max_waiting=memory.slots + config.limits.queue,
        threads=threads,
    )
