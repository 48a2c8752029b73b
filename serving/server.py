"""Running a service: a socket, a banner, lines of JSON as log, and an end that loses no answer."""

import logging.config
import os
import socket
import time
from types import FrameType

import uvicorn

from ..support.console import say
from ..support.errors import ConfigError
from .api import build_app
from .api.gate import ThisMachineOnly
from .api.service import Service
from .config import ServeConfig
from .engine import Engine

_BACKLOG = 2048
_NAMED = 12
_CLOSE_S = 10
_KEEP_ALIVE_S = 75  # longer than clients and proxies keep idle connections, so that they are who closes them
_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "loramux.serving.api.gate.JsonLines"}},
    "handlers": {"lines": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
    "loggers": {
        name: {"handlers": ["lines"], "level": "INFO", "propagate": False} for name in ("loramux.serving", "uvicorn")
    },
}


def serve(service: Service, engine: Engine) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the answers in the making; a second signal does not wait for them.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listener = listen(service.config)
    logging.config.dictConfig(_LOGGING)
    engine.start()
    server = Server(service, engine)
    try:
        server.run(sockets=[listener])
    finally:
        engine.stop(drain=False, timeout_s=_CLOSE_S)
        service.close()


def listen(config: ServeConfig) -> socket.socket:
    """The socket to serve on.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"{config.host}:{config.port}: cannot listen there ({reason}); name another host or port"
        ) from None


class Server(uvicorn.Server):
    """Drains before it ends: answers in the making are finished, and new requests are told to go elsewhere."""

    def __init__(self, service: Service, engine: Engine) -> None:
        self.service, self.engine = service, engine
        self._drained_by: float | None = None
        app = build_app(service)
        if not service.keys.clients and not service.config.anyone:
            app.add_middleware(ThisMachineOnly, host=service.config.host)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CLOSE_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        say(banner(self.service, f"http://{f'[{host}]' if ':' in host else host}:{port}"))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drained_by is not None:
            self.should_exit = self.force_exit = True
            return
        self.service.admission.is_draining = True
        self._drained_by = time.monotonic() + self.service.config.limits.drain_s

    async def on_tick(self, counter: int) -> bool:
        if self._drained_by is not None and not self.should_exit:
            is_late = time.monotonic() > self._drained_by
            if is_late:
                self.engine.stop(drain=False, timeout_s=0)
            self.should_exit = is_late or not self.service.admission.in_flight
        return await super().on_tick(counter)


def banner(service: Service, url: str) -> str:
    """What is served, and how to call it."""
    config, keys = service.config, service.keys
    adapters = [info.name for info in service.store.list()]
    more = f" and {len(adapters) - _NAMED} more" if len(adapters) > _NAMED else ""
    listed = f"{len(adapters)}: {', '.join(adapters[:_NAMED])}{more}" if adapters else "none"
    threshold = f", the base below {config.threshold:g}" if config.threshold else ""
    automatic = f"yes, as model `auto`{threshold}" if service.chooser is not None else "no"
    admin = "by everybody" if keys.is_open else "with the admin key" if keys.admin else "by nobody (no admin key)"
    model = "auto" if service.chooser is not None else adapters[0] if adapters else service.base
    body = f'{{"model": "{model}", "prompt": "..."}}'
    key = " -H 'Authorization: Bearer KEY'" if keys.clients else ""
    return "\n".join(
        (
            f"loramux serves {service.base} at {url}/v1, {config.memory.slots} answers at a time",
            f"  adapters   {listed}",
            f"  automatic  {automatic}",
            f"  mixtures   {', '.join(service.mixtures) or 'none'}",
            f"  asked      {'with an API key' if keys.clients else 'by everybody who reaches it'}; changed {admin}",
            f"  live page  {url}/",
            f"  try        curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        )
    )
