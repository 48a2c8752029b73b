"""The application that `serve run` starts."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from ...bases import BUNDLED, load_tokenizer
from ...support.config import parse, to_data
from ...support.console import say
from ...training.run_folder import RunFolder
from ..api import build_app
from ..api.service import Service
from ..config import ServeConfig, load_serve_config
from ..errors import ServingError
from ..keys import Keys
from ..runs import run_adapters
from .choosing import Choosing
from .front import RemoteChooser, RemoteEngine, RemoteStore
from .replica import Replica


def build(arguments: dict[str, str]) -> Any:
    """The application.

    Args:
        arguments: `config`, the YAML file of `loramux serve`; `replicas`, how many (default 2); `cpus` and `gpus` of
            each.

    Raises:
        ConfigError: the settings cannot be used.
        RunError: a run that is named is not finished, or damaged.
    """
    config = load_serve_config(Path(arguments["config"]) if "config" in arguments else None, [], {})
    keys = Keys.read(config, os.environ, is_local=False)  # where Ray listens is not for us to say
    places = {run: run_adapters(run) for run in config.runs}
    if config.runs:
        recipe = RunFolder(config.runs[0]).read_recipe()
        names = (*config.also_called, *(name for place in places.values() for name in place.base_names))
        config = replace(config, base=recipe.base.model, revision=recipe.base.revision, also_called=names)
    roots = (*config.roots, *config.adapters, *(place.root for place in places.values()))
    behind = to_data(replace(config, runs=(), adapters=(), roots=roots, choice=False))
    most = config.memory.slots + config.limits.queue
    resources = {"num_cpus": float(arguments.get("cpus", 1)), "num_gpus": float(arguments.get("gpus", 0))}
    light = {"max_ongoing_requests": most, "ray_actor_options": {"num_cpus": 0.1}}
    count = int(arguments.get("replicas", 2))
    replicas = (
        serve.deployment(Replica)
        .options(num_replicas=count, max_ongoing_requests=most, ray_actor_options=resources)
        .bind(behind)
    )
    choosing = serve.deployment(Choosing).options(**light).bind(to_data(config), replicas) if config.choice else None
    front = serve.deployment(serve.ingress()(Front)).options(**light)
    return front.bind(to_data(config), keys, replicas, choosing)


class Front:
    """The routes of `loramux serve`, before the replicas."""

    def __init__(self, settings: dict[str, Any], keys: Keys, replicas: Any, choosing: Any) -> None:
        self._config = parse(ServeConfig, settings, where="settings")
        self._keys, self._replicas, self._choosing = keys, replicas, choosing

    async def __serve_build_asgi_app__(self) -> Any:
        config, choosing = self._config, self._choosing
        base = config.base or BUNDLED
        facts = await self._replicas.facts.remote()
        store = RemoteStore(self._replicas, reserved=(base, "base", "auto", *config.also_called))
        service = Service(
            config,
            RemoteEngine(self._replicas, facts),
            store,
            load_tokenizer(base, revision=config.revision),
            base,
            facts.vocabulary,
            self._keys,
            chooser=None if choosing is None else RemoteChooser(choosing),
        )
        examples = {} if choosing is None else await choosing.examples.remote()
        await service.with_changes(lambda: _load_all(store, config, examples))
        if choosing is not None:
            store.subscribe(lambda: choosing.know.remote(store.examples()))
            await choosing.know.remote(store.examples())
        return build_app(service)


def _load_all(store: RemoteStore, config: ServeConfig, examples: dict[str, tuple[str, ...]]) -> None:
    folders = {name: folder for run in config.runs for name, folder in run_adapters(run).folders.items()}
    folders |= {
        path.parent.name: path.parent for place in config.adapters for path in place.glob("*/adapter_config.json")
    }
    for name, folder in sorted(folders.items()):
        try:
            store.load(name, str(folder.absolute()), prompts=examples.get(name, ()))
        except ServingError as error:
            say(f"{folder} is not served: {error}")
