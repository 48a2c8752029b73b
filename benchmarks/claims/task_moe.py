"""Do learned routes beat even and random ones? Task-level MoE (Ye et al. 2022).

    python benchmarks/claims/task_moe.py --to claims/task_moe

Two pairs of tasks in conflict. Routes are learned in the first half of the steps and then frozen while the experts
start anew, or frozen as they were drawn, or even: the LoRA of the experts' ranks. The LoRA of its size stands beside.
"""

import bed
from bed import Contender

TASKS = ("who", "where", "sort", "largest")
EXPERTS = {"experts": 3, "rank": 8}
CONTENDERS = {
    "LoRA r37, of its size": Contender("lora", {"rank": 37}),
    "LoRA r24, even routes": Contender("lora", {"rank": 24}),
    "routes as drawn": Contender("task_moe", {**EXPERTS, "route_share": 0.005}),
    "routes learned, then frozen": Contender("task_moe", {**EXPERTS, "route_share": 0.5}),
    "routes learned throughout": Contender("task_moe", EXPERTS),
}

if __name__ == "__main__":
    args = bed.parser(__doc__, "task_moe").parse_args()
    bed.contest(args, "Exact match in % on the test split, prompts as they are", bed.tasks(*TASKS), CONTENDERS)
