"""What helps where examples are few? MoSA and MTLoRA against plain LoRA on a tenth of the examples.

    python benchmarks/claims/low_data.py --to claims/low_data

80 training examples of each task, with the task named in the prompt, so that a plain LoRA can solve them all. MoSA: one
LoRA, of which one random block of ranks acts in every step, with and without the consistency loss (Zhang et al. 2023).
MTLoRA: a shared LoRA and one per task (Agiza et al. 2024), against either alone at the same number of parameters.
"""

import bed
from bed import Contender

TASKS = ("where", "tomorrow", "sort", "plural")
CONTENDERS = {
    "LoRA r32": Contender("lora", {"rank": 32}),
    "MoSA r32": Contender("mosa", {"rank": 32}),
    "MoSA r32, no consistency": Contender("mosa", {"rank": 32, "consistency": 0.0}),
    "MTLoRA, shared r16 and own r4": Contender("mtlora", {"rank": 16, "task_rank": 4, "scaling": 1.0, "dropout": 0.0}),
    "own r8 alone": Contender("moa", {"rank": 8}),
}

if __name__ == "__main__":
    title = "Exact match in % on the test split, 80 training examples per task, task named in the prompt"
    learnt = bed.tasks(*TASKS, cue=True, train=80)
    bed.contest(bed.parser(__doc__, "low_data").parse_args(), title, learnt, CONTENDERS)
