"""Does `loramux recommend` find the adapter to start from? Leave one task out, and compare with trying them all.

    python benchmarks/recommend.py runs/moa --shots 16 --steps 40 --seeds 0,1,2 --json recommend.json

For every task of a finished run, the exports of the other tasks are the candidates. Brute force fine-tunes each of them
on the few examples, as a plain LoRA in stock PEFT, and a LoRA from scratch, and measures all on the test split. A rule
picks one candidate from what can be known before; what is lost against the best candidate is its regret.
"""

import argparse
import json
import os
import random
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from peft import PeftModel
from scipy.stats import kendalltau
from torch import Tensor

from loramux.hub.recommend import Candidate, Signs, ordered, read_signs, values
from loramux.hub.source import read_source
from loramux.hub.trial import answer_losses, fine_tune, fresh_lora
from loramux.tasks import EncodedTask
from loramux.training.assess import encode_tasks
from loramux.training.run import load_run, open_base

TRIAL_STEPS = 8
RULES: dict[str, Callable[[Signs, Signs], Tensor]] = {
    "few-shot loss": lambda signs, _: -signs.losses.mean(1),
    "similarity of prompts": lambda signs, _: signs.similarity.mean(1),
    "both: `loramux recommend`": lambda signs, _: values(signs),
    f"with `--trial-steps {TRIAL_STEPS}`": lambda _, tried: values(tried),
}
"""What can be known before: candidates by the signs as they are, and after a short trial."""


def few(task: EncodedTask, shots: int, seed: int) -> EncodedTask:
    """The task with `shots` of its training examples, drawn by the seed."""
    chosen = random.Random(seed).sample(range(len(task.splits["train"])), shots)
    return replace(
        task,
        splits={**task.splits, "train": tuple(task.splits["train"][i] for i in chosen)},
        examples={**task.examples, "train": tuple(task.examples["train"][i] for i in chosen)},
    )


def study(place: Path, shots: int, steps: int, seeds: Sequence[int], limit: int) -> list[dict]:
    run = load_run(place)
    tasks = {task.name: task for task in encode_tasks(run)}
    source = read_source(place, examples=3)
    candidates = {
        a.task: Candidate(a.task, a.folder, tuple(example.prompt for example in a.examples)) for a in source.adapters
    }
    base, tokenizer = open_base(run.recipe)
    cases = []

    def tuned_loss(model: PeftModel, task: EncodedTask) -> float:
        """Nats per answer token on the test split, after a few steps on the few examples."""
        fine_tune(model, task.splits["train"], tokenizer.pad_token_id or 0, steps)
        loss = answer_losses(model.eval(), tokenizer, task.splits["test"][:limit]).mean().item()
        model.unload()
        return loss

    for seed in seeds:
        for name, whole in tasks.items():
            task = few(whole, shots, seed)
            others = [candidate for other, candidate in candidates.items() if other != name]
            signs = read_signs(task, others, base, tokenizer, shots=shots)
            tried = read_signs(task, others, base, tokenizer, shots=shots, trial_steps=TRIAL_STEPS)
            tuned = {}
            for other in others:
                model = PeftModel.from_pretrained(base, str(other.folder), is_trainable=True)
                tuned[other.name] = tuned_loss(model, task)
            scratch = tuned_loss(fresh_lora(base, others[0].folder, seed), task)
            best = ordered(others, tried)[0]
            case = {"task": name, "seed": seed, "tuned": tuned, "scratch": scratch, "sure": best.first}
            case["rules"] = {
                rule: dict(zip(tuned, key(signs, tried).tolist(), strict=True)) for rule, key in RULES.items()
            }
            cases.append(case)
            print(f"{name}, seed {seed}: {best.candidate.name} first in {best.first:.0%}", flush=True)
    return cases


def table(cases: Sequence[dict]) -> str:
    """What each rule's pick comes to, on average over the cases."""
    lines = [
        "| rule | test loss | regret | best found | among best 3 | Kendall tau |",
        "|---|---:|---:|---:|---:|---:|",
    ]

    def row(name: str, losses: list[float], more: str) -> None:
        regrets = [loss - min(case["tuned"].values()) for case, loss in zip(cases, losses, strict=True)]
        lines.append(f"| {name} | {statistics.mean(losses):.3f} | {statistics.mean(regrets):.3f} | {more} |")

    row("try them all", [min(case["tuned"].values()) for case in cases], "100% | 100% | 1.00")
    for rule in RULES:
        picks = [max(case["rules"][rule], key=case["rules"][rule].get) for case in cases]
        ranks = [sorted(c["tuned"], key=c["tuned"].get).index(pick) for c, pick in zip(cases, picks, strict=True)]
        hits = [sum(rank < top for rank in ranks) / len(ranks) for top in (1, 3)]
        tau = statistics.mean(agreement(case["rules"][rule], case["tuned"]) for case in cases)
        losses = [case["tuned"][pick] for case, pick in zip(cases, picks, strict=True)]
        row(rule, losses, f"{hits[0]:.0%} | {hits[1]:.0%} | {tau:.2f}")
    chance = 1 / len(cases[0]["tuned"])
    means = [statistics.mean(case["tuned"].values()) for case in cases]
    row("any (the mean of all)", means, f"{chance:.0%} | {3 * chance:.0%} | 0.00")
    row("a LoRA from scratch", [case["scratch"] for case in cases], "- | - | -")
    return "\n".join(lines)


def agreement(scores: dict[str, float], losses: dict[str, float]) -> float:
    """Kendall's tau between an order by score and the order by loss."""
    return float(kendalltau(list(scores.values()), [-losses[name] for name in scores]).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    cases = study(arguments.run, arguments.shots, arguments.steps, seeds, arguments.limit)
    if arguments.json:
        arguments.json.write_text(json.dumps(cases, indent=1))
    print(table(cases))
    sure = [case for case in cases if case["sure"] >= 0.9]
    print(f"\nfirst in 90% of resamples or more: {len(sure)} of {len(cases)}")
    if sure:
        print(table(sure))


if __name__ == "__main__":
    main()
