"""What is added to the frozen model: banks, branches, the PEFT skin, method presets and export.

Importing this package registers the `LORAMUX` adapter type with PEFT.
"""

if __name__ == "adapters":
    raise ImportError(
        "this is the adapters/ folder of a loramux checkout, found because the checkout is on sys.path; "
        "import loramux.adapters, and run tests with plain `pytest`"
    )

from .banks import BankConfig, DenseBank
from .branch import Branch, BranchConfig
from .hub import LoramuxModel
from .layer import LoramuxLayer
from .peft_config import LoramuxConfig
from .registry import Method, MethodConfig, StageConfig, find_method, method_config, methods, register_method

__all__ = [
    "BankConfig",
    "Branch",
    "BranchConfig",
    "DenseBank",
    "LoramuxConfig",
    "LoramuxLayer",
    "LoramuxModel",
    "Method",
    "MethodConfig",
    "StageConfig",
    "find_method",
    "method_config",
    "methods",
    "register_method",
]
