"""What is learnt: task definitions, sources, templates, metrics and mixtures. Knows no model."""

if __name__ == "tasks":
    raise ImportError(
        "this is the tasks/ folder of a loramux checkout, found because the checkout is on sys.path; "
        "import loramux.tasks, and run tests with plain `pytest`"
    )

from .collate import collate
from .config import SPLITS, Limits, SourceConfig, SplitNames, TaskConfig
from .encoding import Encoded, EncodedTask, as_written, encode, encode_many, encode_task
from .example import Example, Turn
from .loading import TaskSource, load_tasks, read_task_configs
from .metrics import METRICS, compute
from .mixture import Mixture, MixtureConfig
from .task import Task

__all__ = [
    "METRICS",
    "SPLITS",
    "Encoded",
    "EncodedTask",
    "Example",
    "Limits",
    "Mixture",
    "MixtureConfig",
    "SourceConfig",
    "SplitNames",
    "Task",
    "TaskConfig",
    "TaskSource",
    "Turn",
    "as_written",
    "collate",
    "compute",
    "encode",
    "encode_many",
    "encode_task",
    "load_tasks",
    "read_task_configs",
]
