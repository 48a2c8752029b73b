"""Time of decoding steps and of prefill with many adapters, ours beside the bare base and stock PEFT in one process.

    python benchmarks/serving_steps.py --dtype float32 --json steps.json

A 47 M Llama (576 wide, 12 layers, vocabulary 16,384), LoRAs of rank 8 on all linear layers. Systems alternate; each
figure is the median over rounds of the wall time of one pass. Base alone: transformers' own forward with its own cache;
packed: the same with the weights laid out as servers on a CPU have them.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from loramux.adapters import LowRank
from loramux.serving.batch import Batch, Prefill, Row, Runner
from loramux.serving.packed import pack_linears
from loramux.serving.request import BASE, Request, Route, Sampling
from loramux.serving.sampling import RowSampler
from loramux.serving.slots import adaptable_linears, layout_of
from loramux.serving.text import TextStream

logging.set_verbosity_error()
ALONE, PACKED = "base alone", "base alone, packed"
VOCABULARY, ROWS, CONTEXT, PROMPT, RANK = 16_384, 32, 64, 64, 8
Step = Callable[[], Any]


def base(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=9,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    # Freezing makes the output layer copy its input where it is a slice; unfrozen or not, it is the same for all here.
    return model


def served_base(dtype: torch.dtype) -> Any:
    """The base as servers on a CPU have it."""
    model = base(dtype)
    assert pack_linears(model)
    return model


def random_factors(model: Any, seed: int, rank: int = RANK) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(rank, linear.in_features, generator=generator) * 0.01,
            torch.randn(linear.out_features, rank, generator=generator) * 0.01,
        )
        for name, linear in adaptable_linears(model).items()
    }


def prompts(rows: int, tokens: int) -> list[list[int]]:
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return ids.tolist()


def base_decode(model: Any, rows: int = ROWS, **kwargs: Any) -> Step:
    cache = DynamicCache(config=model.config)
    model(torch.tensor(prompts(rows, CONTEXT)), past_key_values=cache, logits_to_keep=1, **kwargs)
    last = torch.tensor(prompts(rows, 1))

    def step() -> None:
        model(last, past_key_values=cache, logits_to_keep=1, **kwargs)
        cache.crop(-1) if hasattr(cache, "crop") else None

    return step


def base_prefill(model: Any, **kwargs: Any) -> Step:
    ids = torch.tensor(prompts(ROWS, PROMPT))
    return lambda: model(ids, use_cache=True, logits_to_keep=1, **kwargs)


def _rows(routes: list[Route], tokens: int) -> list[Row]:
    def row(prompt: list[int], route: Route) -> Row:
        request = Request(prompt, Sampling(temperature=0), route, lambda event: None)
        return Row(
            request,
            RowSampler(request.sampling, None, torch.device("cpu")),
            TextStream(None, (), streams=False),
            prompt,
        )

    return [row(prompt, route) for prompt, route in zip(prompts(len(routes), tokens), routes, strict=True)]


def our_decode(runner: Runner, routes: list[Route]) -> Step:
    prefill = Prefill(runner, _rows(routes, CONTEXT), [None] * len(routes), 1024)
    prefill.step()
    batch = Batch(runner)
    for number in range(len(routes)):
        batch.join(prefill, number)

    def step() -> None:
        batch.decode()
        batch.timeline.advance(-1)

    return step


def our_prefill(runner: Runner, routes: list[Route]) -> Step:
    return lambda: Prefill(runner, _rows(routes, PROMPT), [None] * len(routes), 1024).step()


def peft_mixed(dtype: torch.dtype, adapters: int) -> tuple[Any, list[str]]:
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(base(dtype), config, adapter_name="a0")
    for index in range(1, adapters):
        model.add_adapter(f"a{index}", config)
    model.to(dtype).eval()
    return model, [f"a{row % adapters}" for row in range(ROWS)]


def measure(systems: dict[str, Step], rounds: int, each: int) -> dict[str, float]:
    """Milliseconds of one pass, systems taking turns."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, step in systems.items():
            step()
            for _ in range(each):
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def report(title: str, times: dict[str, float]) -> None:
    print(f"\n{title:45s} {'x base':>10s} {'x packed':>9s}")
    for name, ms in times.items():
        print(f"  {name:30s} {ms:9.2f} ms {ms / times[ALONE]:9.2f} {ms / times[PACKED]:9.2f}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-peft", action="store_true", help="leave stock PEFT out, which takes most of the time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    bare = base(dtype)
    hosted = served_base(dtype)
    layout = layout_of(hosted)
    runner = Runner(hosted, layout, None)
    loras = [layout.pack(random_factors(hosted, seed), dtype) for seed in range(ROWS)]
    many = [Route(f"a{i}", f"a{i}", ((lora, 1.0),)) for i, lora in enumerate(loras)]
    decode = {
        ALONE: base_decode(bare),
        PACKED: base_decode(hosted),
        "ours, no adapter active": our_decode(runner, [BASE] * ROWS),
        "ours, one adapter": our_decode(runner, [many[0]] * ROWS),
        "ours, 32 adapters": our_decode(runner, many),
    }
    prefill = {
        ALONE: base_prefill(bare),
        PACKED: base_prefill(hosted),
        "ours, no adapter active": our_prefill(runner, [BASE] * ROWS),
        "ours, 32 adapters": our_prefill(runner, many),
    }
    if not options.no_peft:
        stock, names = peft_mixed(dtype, ROWS)
        decode["stock PEFT, 32 adapters"] = base_decode(stock, adapter_names=names)
        prefill["stock PEFT, 32 adapters"] = base_prefill(stock, adapter_names=names)
    results = {
        "decode": measure(decode, options.rounds, 8),
        "prefill": measure(prefill, options.rounds, 1),
    }
    report(f"decoding step, {ROWS} rows, {CONTEXT} tokens cached, {options.dtype}", results["decode"])
    report(f"prefill, {ROWS} x {PROMPT}, {options.dtype}", results["prefill"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
