"""Are two stages better than one? ALTER with experts first and gates later, and all at once (Xie et al. 2023).

    python benchmarks/claims/alter.py --to claims/alter

Two pairs of tasks in conflict, with 80 training examples of each.
"""

import bed
from bed import Contender

TASKS = ("who", "where", "sort", "largest")
CONTENDERS = {
    "LoRA r24, of its size": Contender("lora", {"rank": 24}),
    "experts alone": Contender("moa", {"rank": 6}),
    "two stages": Contender("alter", {"rank": 6}),
    "joint from even gates": Contender("alter", {"rank": 6, "gate_share": 0.995, "warmth": 0.0}),
    "joint from own experts": Contender("alter", {"rank": 6, "gate_share": 0.995}),
}

if __name__ == "__main__":
    args = bed.parser(__doc__, "alter").parse_args()
    title = "Exact match in % on the test split, 80 training examples per task"
    bed.contest(args, title, bed.tasks(*TASKS, train=80), CONTENDERS)
