"""A hub that runs on a thread of the test, and the stock client for it."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn
from huggingface_hub import HfApi, constants

from loramux.hub.server import Hub, Policy, Storage


class RunningHub:
    """A hub that answers at `url`."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self.storage = hub, hub.storage
        self._server = uvicorn.Server(uvicorn.Config(hub, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def client(self, token: str | None = "any") -> HfApi:
        return HfApi(endpoint=self.url, token=token or False)

    def web(self, token: str | None = None) -> httpx.Client:
        """A client for requests made by hand."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, verify=False)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self.storage.close()


@contextlib.contextmanager
def running_hub(root: Path, policy: Policy | None = None) -> Iterator[RunningHub]:
    running = RunningHub(Hub(Storage(root), policy))
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
    try:
        yield running
    finally:
        constants.HF_HUB_OFFLINE = offline
        running.stop()
