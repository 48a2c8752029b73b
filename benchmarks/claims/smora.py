"""Does a finer partition of the same ranks help? SMoRA's blocks of 8, 4, 2 and 1 (Zhao et al. 2025).

    python benchmarks/claims/smora.py --to claims/smora

64 ranks, 8 of them active for each token, in ever smaller blocks, beside the LoRAs of 8 and of 64 ranks at the same
scale. The prompt names the task, as the paper's prompts do, so that everybody can solve every task.
"""

import bed
from bed import Contender

TASKS = ("where", "tomorrow", "sort", "plural")
SCALE = 2.0
LORAS = {f"LoRA r{rank}": Contender("lora", {"rank": rank, "alpha": SCALE * rank}) for rank in (8, 64)}
BLOCKS = {
    f"SMoRA, blocks of {size}": Contender("smora", {"rank": 64, "top_k": 8, "alpha": SCALE * 8, "block_size": size})
    for size in (8, 4, 2, 1)
}

if __name__ == "__main__":
    title = "Exact match in % on the test split, task named in the prompt"
    bed.contest(bed.parser(__doc__, "smora").parse_args(), title, bed.tasks(*TASKS, cue=True), LORAS | BLOCKS)
