"""Many clients on many adapters that are loaded, replaced, unloaded and pinned all the while: every answer is that of
the generation it names."""

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from serving_cases import Live, live_server, stock_text, write_loras

CONTENTS = tuple(f"content{number}" for number in range(8))
PROMPTS = ("Mia hid the red cup in the garden.\n", "7 12 3 19\n", "one old wolf\n")


class Traffic:
    """What clients and administrators do until the time is up."""

    def __init__(self, live: Live, folder: Path, names: list[str], references: dict[tuple[str, str], str]) -> None:
        self.live, self.folder, self.names, self.references = live, folder, names, references
        self.content_of: dict[str, str] = {}
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, clients: int, seconds: float) -> None:
        limits = httpx.Limits(max_connections=clients + 8)
        async with httpx.AsyncClient(base_url=self.live.url, timeout=120, limits=limits) as http:
            for number, content in enumerate(CONTENTS):
                info = await http.post("/v1/lora_adapters", json=self._source(f"first{number}", content))
                self.content_of[info.json()["generation"]] = content
            for name in self.names:
                await http.post("/v1/lora_adapters", json=self._source(name, random.choice(CONTENTS)))
            until = time.monotonic() + seconds
            await asyncio.gather(
                *(self._client(http, number, until) for number in range(clients)),
                *(self._administrator(http, number, until) for number in range(4)),
            )

    def _source(self, name: str, content: str) -> dict[str, str]:
        return {"name": name, "source": str(self.folder / content)}

    async def _client(self, http: httpx.AsyncClient, seed: int, until: float) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            name, prompt = draw.choice(self.names), draw.choice(PROMPTS)
            body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": draw.random() < 0.3}
            if draw.random() < 0.05:
                await self._leaves(http, body)
                continue
            reply = await http.post("/v1/completions", json=body)
            if reply.status_code != 200:
                code = reply.json()["error"]["code"]
                self.seen[code] += 1
                if code not in ("model_not_found", "adapter_unloading", "queue_full", "adapter_not_found"):
                    self.wrong.append(reply.text)
                continue
            content = self.content_of[reply.headers["x-loramux-generation"]]
            text = streamed(reply.text) if body["stream"] else reply.json()["choices"][0]["text"]
            self.seen["answers"] += 1
            if text != self.references[content, prompt]:
                self.wrong.append(f"{name} {content} {prompt!r}: {text!r}")

    async def _leaves(self, http: httpx.AsyncClient, body: dict) -> None:
        """A client that goes away in the middle of its answer."""
        self.seen["left"] += 1
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True, "max_tokens": 60}) as reply:
            async for _ in reply.aiter_bytes():
                return

    async def _administrator(self, http: httpx.AsyncClient, seed: int, until: float) -> None:
        draw = random.Random(1000 + seed)
        while time.monotonic() < until:
            name, content = draw.choice(self.names), draw.choice(CONTENTS)
            path = f"/v1/lora_adapters/{name}"
            action = draw.choice(("replace", "replace", "unload", "force", "pin"))
            if action == "replace":
                reply = await http.put(path, json={"source": str(self.folder / content)})
            elif action == "pin":
                reply = await http.post(f"{path}/pin", json={"pinned": draw.random() < 0.3})
            else:
                await http.delete(path, params={"force": action == "force"})
                reply = await http.post("/v1/lora_adapters", json=self._source(name, content))
            self.seen[f"{action} {reply.status_code}"] += 1
            if reply.status_code >= 500 and reply.json()["error"]["code"] != "adapter_memory_full":
                self.wrong.append(reply.text)
            await asyncio.sleep(0.02)


def streamed(text: str) -> str:
    """The text of a stream of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"])


@pytest.mark.parametrize(
    ("clients", "adapters", "seconds"),
    [(24, 10, 5), pytest.param(200, 50, 120, marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
    ids=["short", "long"],
)
def test_every_answer_is_that_of_its_generation(tmp_path, clients, adapters, seconds):
    folder = write_loras(tmp_path, *CONTENTS)
    references = {(c, prompt): stock_text(folder / c, prompt) for c in CONTENTS for prompt in PROMPTS}
    names = [f"adapter{number}" for number in range(adapters)]
    memory = {"adapters": 40, "slots": 32}
    with live_server(roots=[str(folder)], memory=memory, limits={"queue": 400}) as live:
        traffic = Traffic(live, folder, names, references)
        asyncio.run(traffic.run(clients, seconds))
        print(dict(traffic.seen), live.engine.stats())
        assert not traffic.wrong, traffic.wrong[:5]
        assert traffic.seen["answers"] > clients
        assert traffic.seen["replace 200"] > 2
        assert all(info.leases == 0 for info in live.service.store.list()), "a lease was not given back"
        assert live.service.admission.in_flight == 0
