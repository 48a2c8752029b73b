"""A real server on the base that ships, with small random adapters, in a thread of this process."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from engine_cases import generated, save_lora, stock_answer, tiny_base

from loramux.bases import BUNDLED
from loramux.serving.api.service import Service
from loramux.serving.config import ServeConfig
from loramux.serving.engine import Engine
from loramux.serving.launch import open_service
from loramux.serving.server import Server, listen
from loramux.support.config import parse

PROMPT = "Mia hid the red cup in the garden.\n"


def write_loras(folder: Path, *names: str) -> Path:
    """Random LoRAs on the base that ships, by its public name, loud enough to change what it says."""
    base, _ = tiny_base()
    base.name_or_path = BUNDLED
    for seed, name in enumerate(names):
        save_lora(folder / name, base, seed)
    return folder


def stock_text(adapter: Path | None, prompt: str = PROMPT, tokens: int = 8) -> str:
    """What stock transformers and PEFT say with an adapter, greedily."""
    base, tokenizer = tiny_base()
    ids = tokenizer(prompt)["input_ids"]
    made = generated(base, ids, tokens) if adapter is None else stock_answer(base, adapter, ids, tokens)
    return tokenizer.decode(made, skip_special_tokens=True)


@dataclass
class Live:
    """A server that runs."""

    url: str
    service: Service
    engine: Engine
    server: Server
    thread: threading.Thread

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        # Without `verify`, or certificates are read for every call, which takes longer than most answers.
        return httpx.request(method, f"{self.url}{path}", timeout=60, verify=False, **options)

    def complete(self, **body: Any) -> httpx.Response:
        """A greedy completion of the usual prompt, unless the body says otherwise."""
        return self.call("POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **body})


@contextmanager
def live_server(environment: Mapping[str, str] | None = None, **settings: Any) -> Iterator[Live]:
    """Start a server on a free port, and stop it at the end."""
    config = parse(ServeConfig, {"port": 0, **settings}, where="settings")
    service, engine = open_service(config, environment or {})
    listener = listen(config)
    engine.start()
    server = Server(service, engine)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", service, engine, server, thread)
    finally:
        server.should_exit = True
        thread.join(20)
        engine.stop(drain=False, timeout_s=10)
        service.close()


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)
