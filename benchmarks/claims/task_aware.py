"""Do tasks that have nothing to do with each other hurt? Gates that see the task (Gupta et al. 2022).

    python benchmarks/claims/task_aware.py --to claims/task_aware

Four tasks about one kind of sentence, named in the prompt, are learned alone and then, in twice the steps, together
with four about other things; the score is that of the first four. A plain LoRA, a router that sees tokens and one that
sees tokens and the task, all of one size.
"""

import argparse

import bed
from bed import Contender

TASKS = ("who", "where", "tomorrow", "colour")
OTHERS = ("sort", "plural", "opposite", "kind")
STEPS = 200
CONTENDERS = {
    "LoRA r64": Contender("lora", {"rank": 64}),
    "tokens alone, 6 x r10": Contender("molora", {"experts": 6, "rank": 10}),
    "tokens and task, 6 x r10": Contender("task_aware_moe", {"experts": 6, "rank": 10}),
}


def part(args: argparse.Namespace, name: str) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "to": args.to / name})


if __name__ == "__main__":
    args = bed.parser(__doc__, "task_aware").parse_args()
    alone, joined = bed.tasks(*TASKS, cue=True), bed.tasks(*TASKS, *OTHERS, cue=True)
    title = "Exact match in % on the test splits of four tasks, learned"
    bed.contest(part(args, "alone"), f"{title} alone", alone, CONTENDERS, steps=STEPS)
    bed.contest(part(args, "joined"), f"{title} with four others", joined, CONTENDERS, steps=2 * STEPS, judged=TASKS)
