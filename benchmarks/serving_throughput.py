"""Tokens per second of the engine with many adapters, beside stock PEFT's ways in one process.

    python benchmarks/serving_throughput.py --dtype float32 --json throughput.json

The model and the adapters are those of serving_steps.py: 47 M parameters, rank 8 on all linear layers. Eight clients,
each on an adapter of its own, ask for 32 tokens after 32. PEFT answers the same eight requests as one batch with
`adapter_names`, and one by one with `set_adapter`. Then Zipf traffic over 1,000 adapters on disk, of which memory holds
a part, beside the same traffic on one adapter, with answers of 16 to 48 tokens; and the time of bringing an adapter of
host memory into a batch.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from serving_steps import VOCABULARY, peft_mixed, random_factors, served_base

from loramux.adapters import LowRank
from loramux.serving.engine import Engine, EngineOptions
from loramux.serving.generations import Lease
from loramux.serving.request import Chunk, Event, Request, Route, Sampling
from loramux.serving.slots import RowAdapters, layout_of
from loramux.serving.store import AdapterStore, StoreLimits
from loramux.serving.threads import compute_on_one_thread

CLIENTS, PROMPT, NEW = 8, 32, 32
_EARLIER = 500
"""Requests before the first that is measured, in Zipf traffic."""


class NoTokenizer:
    """Stands where text is not wanted."""

    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return ""


def prompt(seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(seed)).tolist()


class Clients:
    """Eight clients that each ask again as soon as they have their answer.

    Args:
        choose: gives what answers request `number`: a route, or the lease of one.
        answers: tokens of every answer.
    """

    def __init__(self, engine: Engine, choose: Callable[[int], Route | Lease], answers: Sequence[int]) -> None:
        self._engine, self._choose, self._answers = engine, choose, answers
        self._numbers = itertools.count()
        self._prompts = [prompt(number) for number in range(len(answers))]
        self._left = len(answers)
        self._done = threading.Event()
        self._threads = ThreadPoolExecutor(CLIENTS)

    def tokens_per_second(self) -> float:
        start = time.perf_counter()
        for _ in range(CLIENTS):
            self._threads.submit(self._ask)
        self._done.wait()
        return sum(self._answers) / (time.perf_counter() - start)

    def _ask(self) -> None:
        number = next(self._numbers)
        if number >= len(self._answers):
            return
        chosen = self._choose(number)
        route = chosen.route if isinstance(chosen, Lease) else chosen

        def take(event: Event) -> None:
            if isinstance(event, Chunk):
                return
            if isinstance(chosen, Lease):
                chosen.release()
            self._left -= 1
            if not self._left:
                self._done.set()
            self._threads.submit(self._ask)  # beside the engine, as the server waits for adapters

        sampling = Sampling(max_tokens=self._answers[number], temperature=0.0, ignore_eos=True)
        self._engine.submit(Request(self._prompts[number], sampling, route, take, streams=False))


def ours(dtype: torch.dtype) -> Callable[[], float]:
    threads = compute_on_one_thread()
    model = served_base(dtype)
    layout = layout_of(model)
    engine = Engine(model, NoTokenizer(), layout, EngineOptions(prefix_bytes=0, threads=threads))
    engine.start()
    loras = [layout.pack(random_factors(model, seed), dtype) for seed in range(CLIENTS)]
    routes = [Route(f"a{seed}", f"a{seed}", ((lora, 1.0),)) for seed, lora in enumerate(loras)]
    return lambda: Clients(engine, lambda number: routes[number], [NEW] * CLIENTS).tokens_per_second()


def peft_batch(dtype: torch.dtype) -> Callable[[], float]:
    model, _ = peft_mixed(dtype, CLIENTS)
    ids = torch.tensor([prompt(seed) for seed in range(CLIENTS)])
    names = [f"a{number}" for number in range(CLIENTS)]
    return lambda: _generate(model, ids, adapter_names=names)


def peft_one_by_one(dtype: torch.dtype) -> Callable[[], float]:
    model, _ = peft_mixed(dtype, CLIENTS)

    def answer() -> float:
        start = time.perf_counter()
        for number in range(CLIENTS):
            model.set_adapter(f"a{number}")
            _generate(model, torch.tensor([prompt(number)]))
        return CLIENTS * NEW / (time.perf_counter() - start)

    return answer


@torch.inference_mode()
def _generate(model: Any, ids: torch.Tensor, **options: Any) -> float:
    model.generation_config.eos_token_id = None
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, **options)
    return len(ids) * NEW / (time.perf_counter() - start)


SYSTEMS = {
    "ours, 8 adapters": ours,
    "PEFT, 8 adapters in one batch": peft_batch,
    "PEFT, set_adapter one by one": peft_one_by_one,
}


def _serve_system(pipe: Connection, name: str, dtype: torch.dtype) -> None:
    answer = SYSTEMS[name](dtype)
    answer()
    pipe.send(None)
    while pipe.recv():
        pipe.send(answer())


def side_by_side(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Medians of tokens per second. Every system has a process of its own, as in use; they take turns."""
    spawn = get_context("spawn")
    pipes = {}
    for name in SYSTEMS:
        pipes[name], other = spawn.Pipe()
        spawn.Process(target=_serve_system, args=(other, name, dtype), daemon=True).start()
        pipes[name].recv()
    found: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            found[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return {name: statistics.median(values) for name, values in found.items()}


def swap_time(dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds to bring an adapter of host memory into the rows of a batch of 32, and of a decoding step."""
    model = served_base(dtype)
    layout = layout_of(model)
    loras = [layout.pack(random_factors(model, seed), dtype) for seed in range(33)]
    rows = RowAdapters(layout, dtype, torch.device("cpu"))
    for number in range(32):
        rows.add(Route(f"a{number}", f"a{number}", ((loras[number], 1.0),)))
    rows.operands()
    times = []
    for number in range(20):
        start = time.perf_counter()
        rows.remove(number)
        rows.add(Route(f"n{number}", f"n{number}", ((loras[32 - number % 3], 1.0),)))
        rows.operands()
        times.append(time.perf_counter() - start)
    return {"swap_ms": 1e3 * statistics.median(times)}


def save_folder(folder: Path, factors: dict[str, LowRank]) -> Path:
    folder.mkdir(parents=True)
    rank = next(iter(factors.values())).rank
    targets = sorted({name.rsplit(".", 1)[-1] for name in factors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, pair in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.up.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def zipf(dtype: torch.dtype, adapters: int, held: int, requests: int, rounds: int) -> dict[str, float]:
    """Zipf traffic over adapters on disk beside the same traffic on one adapter, in tokens per second."""
    threads = compute_on_one_thread()
    model = served_base(dtype)
    layout = layout_of(model)
    engine = Engine(model, NoTokenizer(), layout, EngineOptions(prefix_bytes=0, threads=threads))
    engine.start()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        kinds = [random_factors(model, seed) for seed in range(8)]
        store = AdapterStore(layout, model, (), (root,), StoreLimits(adapters=held), dtype)
        for number in range(adapters):
            save_folder(root / f"a{number}", kinds[number % 8])
        start = time.perf_counter()
        for number in range(adapters):
            store.register(f"a{number}", root / f"a{number}")
        registered = time.perf_counter() - start
        draw = random.Random(0)
        weights = [1 / (rank + 1) for rank in range(adapters)]
        traffic = draw.choices(range(adapters), weights, k=rounds * CLIENTS * requests)
        per_round = CLIENTS * requests
        for number in draw.choices(range(adapters), weights, k=_EARLIER):
            store.lease(f"a{number}").release()  # memory holds what earlier traffic has left there
        Clients(engine, lambda number: store.lease("a0"), [NEW] * CLIENTS).tokens_per_second()
        one, many = [], []
        for start in range(0, rounds * per_round, per_round):
            names = [f"a{number}" for number in traffic[start : start + per_round]]
            answers = [draw.randint(NEW // 2, NEW + NEW // 2) for _ in names]  # or clients on one adapter keep in step
            one.append(Clients(engine, lambda number: store.lease("a0"), answers).tokens_per_second())
            many.append(Clients(engine, lambda n, names=names: store.lease(names[n]), answers).tokens_per_second())
    engine.stop()
    return {
        "seconds to register": registered,
        "MB of adapters held": store.held().nbytes / 1e6,
        "one adapter": statistics.median(one),
        f"{adapters} adapters": statistics.median(many),
    }


def alone(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """A measurement in a process of its own, whose other threads do not compute."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--held", type=int, default=64, help="of them, in memory at a time")
    parser.add_argument("--only", choices=["clients", "swap", "zipf"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    results: dict[str, dict[str, float]] = {}
    if options.only in (None, "clients"):
        results["tokens per second, 8 clients"] = side_by_side(dtype, options.rounds)
    if options.only in (None, "swap"):
        results["swap"] = alone(swap_time, dtype)
    if options.only in (None, "zipf"):
        results["Zipf"] = alone(zipf, dtype, options.adapters, options.held, 6, options.rounds)
    for title, figures in results.items():
        print(f"\n{title}, {options.dtype}")
        for name, value in figures.items():
            print(f"  {name:34s} {value:10.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
