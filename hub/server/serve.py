"""Runs a hub in this process."""

import ipaddress
from pathlib import Path

import uvicorn

from ...support.console import say
from ...support.errors import ConfigError
from .app import Hub, Policy
from .storage import Storage

_GOODBYE_S = 10


def serve(root: Path, *, host: str = "127.0.0.1", port: int = 8000, policy: Policy | None = None) -> None:
    """Serve the hub in `root` until the process is told to stop.

    Raises:
        ConfigError: `host` can be reached from other machines, and no valid token protects the hub.
        RunError: another process serves this folder.
    """
    storage = Storage(root)
    try:
        refuse_strangers(storage, host)
        hub = Hub(storage, policy)
        address = f"[{host}]" if ":" in host else host
        say(f"hub in {root} (Ctrl-C stops it); for clients: export HF_ENDPOINT=http://{address}:{port}")
        uvicorn.run(
            hub,
            host=host,
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=_GOODBYE_S,
            server_header=False,
        )
    finally:
        storage.close()


def refuse_strangers(storage: Storage, host: str) -> None:
    """Let nobody but this machine reach a hub that asks nobody who they are."""
    if storage.accounts.is_open() and not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: other machines would reach this hub, and everybody could change it. Make a token first "
            f"(loramux hub token create USER --root {storage.root}), or serve on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
