"""Time and peak memory of training steps, ours beside stock PEFT in one process, as ratios.

    python benchmarks/train_step.py --json train_step.json

A 15 M Llama (288 wide, 6 layers, vocabulary 32,000), float32, adapters on all linear layers, AdamW. Systems alternate;
each figure is the median over rounds of the CPU time of one step (equal to its wall time on one quiet thread). Every
ratio is against the stock system that its line names. Memory is the peak resident size of a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from loramux.adapters import LoramuxConfig
from loramux.training.answer_logits import Objective, locate_answers, task_weights

logging.set_verbosity_error()
logging.disable_progress_bar()
VOCABULARY, TOKENS, ROWS, ANSWER, TASKS = 32_000, 128, 8, 8, 8
SHORT = 16
Step = Callable[[], None]
Batch = dict[str, torch.Tensor]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def batch(rows: int = ROWS, answer: int | None = None, lengths: list[int] | None = None, seed: int = 0) -> Batch:
    """Random tokens; with `answer`, only that many tokens at the end of each row are trained."""
    lengths = lengths or [TOKENS] * rows
    ids = torch.randint(0, VOCABULARY, (rows, max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths])
    labels = ids.masked_fill(mask == 0, -100)
    if answer is not None:
        position = torch.arange(max(lengths)).expand(rows, -1)
        labels = labels.masked_fill(position < torch.tensor(lengths).unsqueeze(1) - answer, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ours(method: str, **options: int) -> torch.nn.Module:
    names = [f"task{i}" for i in range(TASKS)]
    config = LoramuxConfig(
        method=method, options=options, tasks=names, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(base(), config)


def peft_lora(rank: int) -> torch.nn.Module:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base(), config)


def peft_xlora() -> torch.nn.Module:
    """X-LoRA over eight rank-8 LoRAs, router and experts trained."""
    folder = Path(tempfile.mkdtemp())
    for index in range(8):
        peft_lora(8).save_pretrained(folder / str(index))
    host = base()
    host.config.use_cache = False
    adapters = {str(index): str(folder / str(index)) for index in range(8)}
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=288,
        xlora_depth=2,
        xlora_size=256,
        use_trainable_adapters=True,
        adapters=adapters,
    )
    return get_peft_model(host, config)


def usual_step(model: torch.nn.Module, inputs: Batch, **extra: torch.Tensor) -> Step:
    """One step as `Trainer` makes it: the model computes all logits and its own loss."""
    optimizer = _optimizer(model)

    def step() -> None:
        model(**inputs, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def answer_step(model: torch.nn.Module, inputs: Batch, tasks: torch.Tensor | None = None) -> Step:
    """One step as our trainer makes it: logits and loss at answer positions only."""
    optimizer = _optimizer(model)
    hub = model.base_model
    hub.set_stage(hub.stages[0])
    objective = Objective(model, hub)
    answers = locate_answers(inputs["labels"])
    row_tasks = torch.zeros(len(inputs["labels"]), dtype=torch.long) if tasks is None else tasks
    of_answer = row_tasks[answers.rows]
    weights = task_weights(torch.bincount(of_answer, minlength=TASKS), hub.stages[0].reduction)[of_answer]
    fed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "routing_tasks": row_tasks}

    def step() -> None:
        objective(fed, inputs["labels"], answers, weights, 1.0).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def eight_runs(inputs: list[Batch]) -> Step:
    """One step of each of eight stock runs, one task each."""
    steps = [usual_step(peft_lora(8), part) for part in inputs]

    def all_steps() -> None:
        for step in steps:
            step()

    return all_steps


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    model.train()
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


@dataclass(frozen=True)
class Comparison:
    """`system` against `against`: the ratio of their times, and the bound we mean to keep."""

    name: str
    system: str
    against: str
    bound: float


def joined(parts: list[Batch]) -> Batch:
    """One batch of all rows, padded to the longest."""
    width = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    pad = torch.nn.functional.pad
    return {
        key: torch.cat([pad(part[key], (0, width - part[key].shape[1]), value=value) for part in parts])
        for key, value in fill.items()
    }


def per_task_batches(rows: int, tokens: int = TOKENS) -> list[Batch]:
    answer = min(ANSWER, tokens // 4)
    return [batch(rows, answer=answer, lengths=[tokens] * rows, seed=task) for task in range(TASKS)]


def one_pass(rows: int, tokens: int = TOKENS) -> Step:
    """One step of our eight experts, `rows` examples each, over the base they share."""
    tasks = torch.arange(TASKS).repeat_interleave(rows)
    return answer_step(ours("moa", rank=8), joined(per_task_batches(rows, tokens)), tasks)


SYSTEMS: dict[str, Callable[[], Step]] = {
    "PEFT LoRA r=64": lambda: usual_step(peft_lora(64), batch()),
    "lora r=64": lambda: usual_step(ours("lora", rank=64), batch()),
    "smora 8 of 64": lambda: usual_step(ours("smora", rank=64, top_k=8), batch()),
    "PEFT X-LoRA 8 x r=8": lambda: usual_step(peft_xlora(), batch()),
    "molora 8 x r=8, top-2": lambda: usual_step(ours("molora", experts=8, rank=8, top_k=2), batch()),
    "PEFT LoRA r=64, completion only": lambda: usual_step(peft_lora(64), batch(answer=ANSWER)),
    "lora r=64, completion only": lambda: answer_step(ours("lora", rank=64), batch(answer=ANSWER)),
    "8 x PEFT LoRA r=8, 8 rows each": lambda: eight_runs(per_task_batches(8)),
    "moa, 8 x 8 rows in one pass": lambda: one_pass(8),
    "8 x PEFT LoRA r=8, 1 row each": lambda: eight_runs(per_task_batches(1)),
    "moa, 8 x 1 row in one pass": lambda: one_pass(1),
    "8 x PEFT LoRA r=8, 1 short row each": lambda: eight_runs(per_task_batches(1, SHORT)),
    "moa, 8 x 1 short row in one pass": lambda: one_pass(1, SHORT),
}
TIMES = [
    Comparison("lora against PEFT LoRA", "lora r=64", "PEFT LoRA r=64", 1.0),
    Comparison("smora against PEFT LoRA", "smora 8 of 64", "PEFT LoRA r=64", 1.25),
    Comparison("molora against PEFT X-LoRA", "molora 8 x r=8, top-2", "PEFT X-LoRA 8 x r=8", 0.5),
    Comparison("completion only", "lora r=64, completion only", "PEFT LoRA r=64, completion only", 0.6),
    Comparison("eight tasks x 8 rows", "moa, 8 x 8 rows in one pass", "8 x PEFT LoRA r=8, 8 rows each", 0.25),
    Comparison("eight tasks x 1 row", "moa, 8 x 1 row in one pass", "8 x PEFT LoRA r=8, 1 row each", 0.25),
    Comparison(
        f"eight tasks x 1 row of {SHORT}",
        "moa, 8 x 1 short row in one pass",
        "8 x PEFT LoRA r=8, 1 short row each",
        0.25,
    ),
]
MEMORY = [
    Comparison("lora", "lora r=64", "PEFT LoRA r=64", 1.0),
    Comparison("smora", "smora 8 of 64", "PEFT LoRA r=64", 1.0),
    Comparison("molora", "molora 8 x r=8, top-2", "PEFT X-LoRA 8 x r=8", 1.0),
    Comparison("completion only", "lora r=64, completion only", "PEFT LoRA r=64, completion only", 1.0),
]


def time_systems(names: list[str], rounds: int) -> dict[str, float]:
    """Median CPU seconds of one step, systems alternating."""
    steps = {name: SYSTEMS[name]() for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name in names if round_ % 2 else reversed(names):
            start = time.process_time()
            steps[name]()
            if round_:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(name: str, threads: int) -> float:
    """Peak resident megabytes of a process that makes three steps of one system."""
    command = [sys.executable, __file__, "--memory-of", name, "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def own_peak(name: str) -> float:
    step = SYSTEMS[name]()
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def compare(comparisons: list[Comparison], figures: dict[str, float], unit: str) -> list[dict[str, object]]:
    rows = []
    for item in comparisons:
        ratio = figures[item.system] / figures[item.against]
        verdict = "ok" if ratio <= item.bound else "over"
        print(
            f"{item.name:32s} {figures[item.system]:9.3f} / {figures[item.against]:9.3f} {unit} = {ratio:5.2f}  "
            f"(bound {item.bound:.2f}: {verdict})",
            flush=True,
        )
        rows.append({"name": item.name, "ratio": ratio, "bound": item.bound, "system": item.system,
                     "against": item.against, "unit": unit})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the ratios here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="only comparisons whose name contains this")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(own_peak(arguments.memory_of))
        return
    times = [item for item in TIMES if arguments.only in item.name]
    names = list(dict.fromkeys(name for item in times for name in (item.against, item.system)))
    rows = compare(times, time_systems(names, arguments.rounds), "s")
    if not arguments.no_memory:
        memory = [item for item in MEMORY if arguments.only in item.name]
        names = dict.fromkeys(name for item in memory for name in (item.against, item.system))
        rows += compare(memory, {name: peak_memory(name, arguments.threads) for name in names}, "MB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "comparisons": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
