"""Which experts act: scorers, normalisers, routers, auxiliary losses and statistics. Knows tensors only."""

if __name__ == "routing":
    raise ImportError(
        "this is the routing/ folder of a loramux checkout, found because the checkout is on sys.path; "
        "import loramux.routing, and run tests with plain `pytest`"
    )

from .context import RoutingContext, prompt_mask
from .decision import Decision, Granularity, own_gates
from .losses import BalanceLoss, BudgetLoss, LabelLoss, LocalBalanceLoss, Penalty, RouterLoss, balance_loss, label_loss
from .normalisers import (
    Argmax,
    DSelectK,
    GumbelSoftmax,
    Identity,
    NoisyStep,
    Normaliser,
    RandomOne,
    SigmoidShare,
    SigmoidTopK,
    Softmax,
    Threshold,
    TopK,
)
from .router import Router, RouterConfig, copy_corners, update_selection_biases
from .scorers import (
    Constant,
    FirstPass,
    FixedTable,
    OwnScore,
    OwnTokenGate,
    PooledPrompt,
    PromptPrototypes,
    Prototypes,
    RouterDims,
    Scorer,
    TaskEmbedding,
    TaskTable,
    TokenAndTask,
    TokenLinear,
    TokenPerceptron,
    TokenPrototypes,
    identity_rows,
)
from .statistics import LayerUsage, RouteObserver, RoutingStatistics, router_name

__all__ = [
    "Argmax",
    "BalanceLoss",
    "BudgetLoss",
    "Constant",
    "DSelectK",
    "Decision",
    "FirstPass",
    "FixedTable",
    "Granularity",
    "GumbelSoftmax",
    "Identity",
    "LabelLoss",
    "LayerUsage",
    "LocalBalanceLoss",
    "NoisyStep",
    "Normaliser",
    "OwnScore",
    "OwnTokenGate",
    "Penalty",
    "PooledPrompt",
    "PromptPrototypes",
    "Prototypes",
    "RandomOne",
    "RouteObserver",
    "Router",
    "RouterConfig",
    "RouterDims",
    "RouterLoss",
    "RoutingContext",
    "RoutingStatistics",
    "Scorer",
    "SigmoidShare",
    "SigmoidTopK",
    "Softmax",
    "TaskEmbedding",
    "TaskTable",
    "Threshold",
    "TokenAndTask",
    "TokenLinear",
    "TokenPerceptron",
    "TokenPrototypes",
    "TopK",
    "balance_loss",
    "copy_corners",
    "identity_rows",
    "label_loss",
    "own_gates",
    "prompt_mask",
    "router_name",
    "update_selection_biases",
]
