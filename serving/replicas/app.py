"""The application that `serve run` starts."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from ray import serve

from ...bases import BUNDLED, load_tokenizer
from ...support.config import config as config_class
from ...support.config import parse, to_data
from ...training.run_folder import RunFolder
from ..api import build_app
from ..api.service import Service
from ..config import Positive, ServeConfig, load_serve_config
from ..keys import Keys
from ..runs import RunAdapters, check_run_settings, register_all, run_adapters
from .choosing import Choosing
from .front import RemoteChooser, RemoteEngine, RemoteStore
from .replica import Replica


@config_class
class Deployments:
    """What `serve run` can be told.

    Attributes:
        config: the YAML file of `loramux serve`.
        replicas: how many.
        cpus, gpus: of each.
    """

    config: Path | None = None
    replicas: Positive = 2
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0


def build(arguments: dict[str, str]) -> Any:
    """The application.

    Args:
        arguments: of `Deployments`.

    Raises:
        ConfigError: the arguments, the settings or the keys cannot be used.
        RunError: a run that is named is not finished, or damaged.
    """
    how = parse(Deployments, arguments, where="serve run")
    config, runs = opened(load_serve_config(how.config, [], {}))
    keys = Keys.read(config, os.environ, is_local=False)  # where Ray listens is not for us to say
    roots = (*config.roots, *config.adapters, *(run.root for run in runs))
    behind = replace(config, runs=(), adapters=(), roots=roots, choice=False, host="localhost")
    behind = replace(behind, api_keys_file=None, admin_key_file=None)  # the front alone is asked, and asks for keys
    most = config.memory.slots + config.limits.queue
    light = {"max_ongoing_requests": most, "ray_actor_options": {"num_cpus": 0.1}}
    replicas = (
        serve.deployment(Replica)
        .options(
            num_replicas=how.replicas,
            max_ongoing_requests=most,
            ray_actor_options={"num_cpus": how.cpus, "num_gpus": how.gpus},
        )
        .bind(to_data(behind))
    )
    choosing = serve.deployment(Choosing).options(**light).bind(to_data(config), replicas) if config.choice else None
    front = serve.deployment(serve.ingress()(Front)).options(**light)
    return front.bind(to_data(config), keys, replicas, choosing)


def opened(config: ServeConfig) -> tuple[ServeConfig, list[RunAdapters]]:
    """Settings with what the runs in them bring, and the adapters of these runs.

    Raises:
        ConfigError: the settings contradict the runs.
        RunError: as `run_adapters`.
    """
    if not config.runs:
        return config, []
    check_run_settings(config)
    runs = [run_adapters(run) for run in config.runs]
    base = RunFolder(config.runs[0]).read_recipe().base
    names = (*config.also_called, *(name for run in runs for name in run.base_names))
    dtype = config.dtype or base.dtype
    return replace(config, base=base.model, revision=base.revision, dtype=dtype, also_called=names), runs


class Front:
    """The routes of `loramux serve`, before the replicas."""

    def __init__(self, settings: dict[str, Any], keys: Keys, replicas: Any, choosing: Any) -> None:
        self._config = parse(ServeConfig, settings, where="settings")
        self._keys, self._replicas, self._choosing = keys, replicas, choosing

    async def __serve_build_asgi_app__(self) -> Any:
        config, choosing = self._config, self._choosing
        base = config.base or BUNDLED
        facts = await self._replicas.facts.remote()
        store = RemoteStore(self._replicas, reserved=(base, *config.also_called))
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

        def register(name: str, folder: Path) -> None:
            store.load(name, str(folder.absolute()), prompts=examples.get(name, ()))

        runs = [run_adapters(run) for run in config.runs]
        await service.with_changes(lambda: register_all(config.adapters, runs, register))
        if choosing is not None:
            store.subscribe(lambda: choosing.know.remote(store.examples()))
            await choosing.know.remote(store.examples())
        return build_app(service)
