"""Is a LoRA of tensor trains as good at a tenth of the parameters? LoRETTA against LoRA (Yang et al. 2024).

    python benchmarks/claims/loretta.py --to claims/loretta

LoRETTA and LoRA of rank 8 and the smallest LoRA there is, where the prompt names the task.
"""

import bed
from bed import Contender

TASKS = ("where", "tomorrow", "sort", "largest", "plural")
CONTENDERS = {
    "LoRA r8": Contender("lora", {"rank": 8, "alpha": 16.0}),
    "LoRA r1": Contender("lora", {"rank": 1, "alpha": 2.0}),
    "LoRETTA r8, train rank 2": Contender("loretta", {"rank": 8, "train_rank": 2}),
    "LoRETTA r8, train rank 5": Contender("loretta", {"rank": 8, "train_rank": 5}),
}

if __name__ == "__main__":
    title = "Exact match in % on the test split, task named in the prompt"
    args = bed.parser(__doc__, "loretta").parse_args()
    bed.contest(args, title, bed.tasks(*TASKS, cue=True), CONTENDERS, rates=(3e-3, 1e-2))
