"""What is added to the frozen model: banks, branches, the PEFT skin, method presets and export.

Importing this package registers the `LORAMUX` adapter type with PEFT.
"""

if __name__ == "adapters":
    raise ImportError(
        "this is the adapters/ folder of a loramux checkout, found because the checkout is on sys.path; "
        "import loramux.adapters, and run tests with plain `pytest`"
    )

from .banks import Bank, BankConfig, Cored, Dense, TensorProduct, TensorTrain
from .branch import Branch, BranchConfig
from .cores import Core, CoreConfig, FactorMix, HeadMix, InnerMix, OutputMix
from .export import BaseIdentity, ExportConfig, ExportReport, exact_factors, export_task, save_lora
from .fidelity import Fidelity, measure_fidelity
from .generated import Hyper, Template
from .hub import LoramuxModel
from .import_experts import import_experts
from .joining import NewTask, Trained, even_blend
from .layer import LoramuxLinear
from .lora_folder import PlainLora, read_lora
from .low_rank import RANK_CLASSES, LowRank
from .peft_config import LoramuxConfig
from .registry import (
    Method,
    MethodConfig,
    StageConfig,
    TaskNames,
    find_method,
    method_config,
    methods,
    numbered_tasks,
    register_method,
)
from .sizing import Linear, adapted_linears, adapter_parameters, check_ranks, count_parameters, matched_lora_rank

__all__ = [
    "RANK_CLASSES",
    "Bank",
    "BankConfig",
    "BaseIdentity",
    "Branch",
    "BranchConfig",
    "Core",
    "CoreConfig",
    "Cored",
    "Dense",
    "ExportConfig",
    "ExportReport",
    "FactorMix",
    "Fidelity",
    "HeadMix",
    "Hyper",
    "InnerMix",
    "Linear",
    "LoramuxConfig",
    "LoramuxLinear",
    "LoramuxModel",
    "LowRank",
    "Method",
    "MethodConfig",
    "NewTask",
    "OutputMix",
    "PlainLora",
    "StageConfig",
    "TaskNames",
    "Template",
    "TensorProduct",
    "TensorTrain",
    "Trained",
    "adapted_linears",
    "adapter_parameters",
    "check_ranks",
    "count_parameters",
    "even_blend",
    "exact_factors",
    "export_task",
    "find_method",
    "import_experts",
    "matched_lora_rank",
    "measure_fidelity",
    "method_config",
    "methods",
    "numbered_tasks",
    "read_lora",
    "register_method",
    "save_lora",
]
