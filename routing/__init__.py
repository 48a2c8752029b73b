"""Which experts act: scorers, normalisers, routers, auxiliary losses and statistics. Knows tensors only."""

if __name__ == "routing":
    raise ImportError(
        "this is the routing/ folder of a loramux checkout, found because the checkout is on sys.path; "
        "import loramux.routing, and run tests with plain `pytest`"
    )

from .context import RoutingContext, prompt_mask
from .decision import Decision, Granularity
from .losses import balance_loss, label_loss
from .normalisers import Argmax, Normaliser, SigmoidTopK, Softmax, TopK
from .router import Router, RouterConfig, update_selection_biases
from .scorers import PooledPrompt, RouterDims, Scorer, TaskTable, TokenLinear
from .statistics import LayerUsage, RoutingStatistics

__all__ = [
    "Argmax",
    "Decision",
    "Granularity",
    "LayerUsage",
    "Normaliser",
    "PooledPrompt",
    "Router",
    "RouterConfig",
    "RouterDims",
    "RoutingContext",
    "RoutingStatistics",
    "Scorer",
    "SigmoidTopK",
    "Softmax",
    "TaskTable",
    "TokenLinear",
    "TopK",
    "balance_loss",
    "label_loss",
    "prompt_mask",
    "update_selection_biases",
]
