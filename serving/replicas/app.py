"""The application that `serve run` starts."""

import os
from pathlib import Path
from typing import Any

from ray import serve

from ...bases import BUNDLED, load_tokenizer
from ...support.config import parse, to_data
from ...support.console import say
from ..api import build_app
from ..api.service import Service
from ..config import ServeConfig, load_serve_config
from ..errors import ServingError
from ..keys import Keys
from .front import RemoteEngine, RemoteStore
from .replica import Replica


def build(arguments: dict[str, str]) -> Any:
    """The application.

    Args:
        arguments: `config`, the YAML file of `loramux serve`; `replicas`, how many (default 2); `cpus` and `gpus` of
            each.

    Raises:
        ConfigError: the settings cannot be used.
    """
    config = load_serve_config(Path(arguments["config"]) if "config" in arguments else None, [], {})
    settings = to_data(config)
    resources = {"num_cpus": float(arguments.get("cpus", 1)), "num_gpus": float(arguments.get("gpus", 0))}
    replicas = serve.deployment(Replica).options(
        num_replicas=int(arguments.get("replicas", 2)),
        max_ongoing_requests=config.memory.slots + config.limits.queue,
        ray_actor_options=resources,
    )
    front = serve.deployment(serve.ingress()(Front)).options(
        max_ongoing_requests=config.memory.slots + config.limits.queue, ray_actor_options={"num_cpus": 0.1}
    )
    keys = {key: os.environ[key] for key in ("LORAMUX_API_KEYS", "LORAMUX_ADMIN_KEY") if key in os.environ}
    return front.bind(settings, keys, replicas.bind(settings))


class Front:
    """The routes of `loramux serve`, before the replicas."""

    def __init__(self, settings: dict[str, Any], environment: dict[str, str], replicas: Any) -> None:
        self._config = parse(ServeConfig, settings, where="settings")
        self._environment, self._replicas = environment, replicas

    async def __serve_build_asgi_app__(self) -> Any:
        config = self._config
        facts = await self._replicas.facts.remote()
        base = config.base or BUNDLED
        store = RemoteStore(self._replicas, reserved=(base, "base", "auto", *config.also_called))
        service = Service(
            config,
            RemoteEngine(self._replicas, facts),
            store,
            load_tokenizer(base, revision=config.revision),
            base,
            facts.vocabulary,
            Keys.read(config, self._environment),
        )
        await service.with_store(lambda: _load_all(store, config))
        return build_app(service)


def _load_all(store: RemoteStore, config: ServeConfig) -> None:
    for folder in config.adapters:
        for adapter in sorted(folder.glob("*/adapter_config.json")):
            try:
                store.load(adapter.parent.name, str(adapter.parent.absolute()))
            except ServingError as error:
                say(f"{adapter.parent} is not served: {error}")
