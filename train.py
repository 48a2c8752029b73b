"""Train a mixture of tasks on a frozen model. `python train.py` is `loramux train`, also under a launcher:

    python train.py                                        the default job
    python train.py my.yaml --set train.steps=800
    accelerate launch --num_processes 8 train.py my.yaml --set train.distributed=fsdp

What happens, top to bottom: a recipe is read (`training/recipe.py`), the base is loaded and the method put on it
(`training/run.py`), the stages are trained (`training/loop.py`), and what each task gained is measured and exported.
"""

import sys

from loramux.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
