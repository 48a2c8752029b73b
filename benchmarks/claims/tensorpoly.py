"""Is a tenth of Poly enough? TensorPoly-I against Poly and the LoRA of its size (Su et al. 2024).

    python benchmarks/claims/tensorpoly.py --to claims/tensorpoly

Two pairs of tasks in conflict; eight skills of rank 8, dense or of tensor products of order 4 or 2.
"""

import bed
from bed import Contender

TASKS = ("who", "where", "sort", "largest")
SKILLS = {"skills": 8, "rank": 8, "alpha": 8.0}
CONTENDERS = {
    "LoRA r6, of the size of order 4": Contender("lora", {"rank": 6}),
    "LoRA r10, of the size of order 2": Contender("lora", {"rank": 10}),
    "TensorPoly-I, order 4": Contender("tensorpoly", {**SKILLS, "order": 4}),
    "TensorPoly-I, order 2": Contender("tensorpoly", {**SKILLS, "order": 2}),
    "Poly": Contender("poly", {**SKILLS, "sampled": False}),
}

if __name__ == "__main__":
    args = bed.parser(__doc__, "tensorpoly").parse_args()
    title = "Exact match in % on the test split, prompts as they are"
    bed.contest(args, title, bed.tasks(*TASKS), CONTENDERS, rates=(3e-3, 1e-2))
