"""What each process of the distributed tests runs: several short trainings in one process group.

A training whose name starts with `job` is the whole main job, with its exports and its report; one whose name starts
with `refused` leaves the reason in a text file.

torchrun --nproc_per_node 2 distributed_child.py BASE TASKS OUT "NAME=override;override" ...
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from training_cases import make_recipe

from loramux.support.errors import ConfigError
from loramux.training.main_job import train_job
from loramux.training.run import train_run


def held_part(model: torch.nn.Module, step: int) -> dict[str, float]:
    """How much of all weights this process holds, and a score that falls."""
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    return {"held": held / sum(p.numel() for p in model.parameters()), "metric": -step}


EVALUATIONS = {"moa": "validation", "smora": held_part, "lora": held_part}


def main(base: str, tasks: str, out: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        name, _, overrides = job.partition("=")
        recipe = make_recipe(Path(base), Path(tasks), *overrides.split(";"))
        if name.startswith("job"):
            train_job(recipe, Path(out) / name)
        elif name.startswith("refused"):
            try:
                train_run(recipe, Path(out) / name)
            except ConfigError as error:
                (Path(out) / f"{name}.txt").write_text(str(error))
        else:
            train_run(recipe, Path(out) / name, evaluate=EVALUATIONS.get(name.split("-")[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
    torch.distributed.destroy_process_group()
