"""How large methods are on a given base, without reading its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from ..adapters import Linear, LoramuxConfig, adapted_linears, check_ranks, count_parameters, matched_lora_rank
from ..bases import resolve_base
from ..support.errors import ConfigError
from .evaluate import hub_of
from .recipe import BaseConfig


@dataclass(frozen=True)
class BaseShapes:
    """The linears that are adapted.

    Attributes:
        linears: every adapted linear.
        hidden_size: the width that routers of prompts read.
    """

    linears: tuple[Linear, ...]
    hidden_size: int

    def count(self, method: str, options: Mapping[str, Any], tasks: Sequence[str], *, excess_rank: bool = False) -> int:
        """Parameters of a method for these tasks.

        Args:
            excess_rank: as in LoramuxConfig.

        Raises:
            ConfigError: when the options do not fit each other, the tasks or a linear.
        """
        built = LoramuxConfig(method=method, options=dict(options), tasks=list(tasks)).build()
        try:
            if not excess_rank:
                check_ranks(built, self.linears)
            return count_parameters(built, self.linears, tasks=len(tasks), hidden_size=self.hidden_size)
        except ValueError as error:
            raise ConfigError(f"method {method!r}: {error}") from None

    def matched_rank(self, parameters: int) -> int:
        """The rank at which a plain LoRA has the nearest number of parameters."""
        return matched_lora_rank(parameters, self.linears)


def shapes_of(base: BaseConfig, target_modules: str | tuple[str, ...] = "all-linear") -> BaseShapes:
    """Read the architecture of a base and find the linears that `target_modules` names.

    Raises:
        ConfigError: when the base cannot be found or nothing is matched.
    """
    source = resolve_base(base.model)
    try:
        config = AutoConfig.from_pretrained(source, revision=base.revision or "main", trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"base {base.model!r}: its architecture cannot be read: {reason}") from None
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    one = LoramuxConfig(method="lora", options={"rank": 1}, target_modules=targets, task_type="CAUSAL_LM")
    try:
        hub = hub_of(get_peft_model(model, one))
    except ValueError as error:
        raise ConfigError(f"target modules {targets!r}: {error}") from None
    assert hub is not None
    return BaseShapes(tuple(adapted_linears(hub)), int(model.config.get_text_config().hidden_size))
