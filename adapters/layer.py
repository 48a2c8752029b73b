"""One adapted linear: the frozen layer plus the branches of the active adapters."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..routing import Decision, Granularity, RoutingContext
from ..support.errors import AdapterError
from .branch import Branch, BranchConfig, add_product
from .low_rank import LowRank


class LoramuxLinear(nn.Module, BaseTunerLayer):
    """Wraps a frozen linear. (PEFT finds wrapped linears for "all-linear" by the word in the class name.)

    Args:
        base_layer: `nn.Linear` (quantised subclasses included) or transformers' `Conv1D`.
        name: the module's name in the base model.
        context: shared with the hub; tells the layer how the current call is routed.

    Raises:
        AdapterError: for any other kind of module.
    """

    adapter_layer_names = ("loramux_branches",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str, context: RoutingContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.context = context
        self.loramux_branches = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_factors: list[LowRank] = []
        self.in_features, self.out_features = _features(self.get_base_layer(), name)

    def update_layer(
        self,
        adapter: str,
        branches: Sequence[BranchConfig],
        tasks: int,
        inference_mode: bool = False,
        block_width: int | None = None,
    ) -> None:
        """Give `adapter` its branches here; where it had some, their values stay in the leading rows.

        Args:
            block_width: see `Branch`.

        Raises:
            AdapterError: when a branch cannot serve a linear of these sizes.
        """
        before = self.branches(adapter)
        with self._named_in_errors():
            self.loramux_branches[adapter] = nn.ModuleList(
                Branch(branch, self.in_features, self.out_features, tasks, index, block_width)
                for index, branch in enumerate(branches)
            )
        for old, new in zip(before, self.branches(adapter), strict=False):
            new.take_over(old)
        self._move_adapter_to_device_of_base_layer(adapter)
        for buffer in self.loramux_branches[adapter].buffers():
            buffer.data = buffer.data.float()  # a half-precision selection bias would lose its small steps
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def check_ranks(self, branches: Iterable[BranchConfig]) -> None:
        """Raise AdapterError when experts have a higher rank than this layer can hold."""
        with self._named_in_errors():
            for branch in branches:
                branch.check_rank(self.in_features, self.out_features)

    def branches(self, adapter: str) -> list[Branch]:
        """The branches of `adapter` here; empty when it does not adapt this layer."""
        return list(self.loramux_branches[adapter]) if adapter in self.loramux_branches else []  # type: ignore[call-overload]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged or self.context.bypass:
            return output
        if self.context.static_factors is not None:
            return self._add_static(output, x)
        adapted = self._add_rows(output, x) if self.context.adapter_rows else self._add_active(output, x)
        if self.context.observer is not None:
            self.context.observer(self.name, x, adapted - output, self.context.counts_for(x))
        return adapted

    def factors(self, adapter: str) -> LowRank:
        """The plain LoRA this layer is under the task named by the surrounding `hub.routing(tasks=...)`, if any.

        Raises:
            AdapterError: when there is no such LoRA, because the weights depend on the input.
        """
        tasks = self.context.named_tasks.get(adapter)
        pairs = [
            branch.materialise(self._constant_decision(branch, adapter, tasks), tasks)
            for branch in self.branches(adapter)
        ]
        return LowRank(torch.cat([down[0] for down, _ in pairs]), torch.cat([up[0] for _, up in pairs]).T)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`(out_features, in_features)`; raises as `factors` does."""
        return self.factors(adapter).delta()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return all(branch.config.router is None for branch in self.branches(adapter_name))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.loramux_branches]
        base: Any = self.get_base_layer()
        if names and not (type(base) is nn.Linear or isinstance(base, Conv1D)):
            raise AdapterError(f"{self.name}: cannot merge into a {type(base).__name__}; load the base unquantised")
        for name in names:
            factors = self.factors(name)
            merged = base.weight + self._oriented(factors.delta()).to(base.weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise AdapterError(f"{self.name}: merging adapter {name!r} gives values that are not finite")
            base.weight.data = merged
            self.merged_adapters.append(name)
            self._merged_factors.append(factors)

    @torch.no_grad()
    def unmerge(self) -> None:
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            self.merged_adapters.pop()
            base.weight.data = base.weight - self._oriented(self._merged_factors.pop().delta()).to(base.weight.dtype)

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise AdapterError(f"{self.name}: {error}") from None

    def _oriented(self, delta: Tensor) -> Tensor:
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def _constant_decision(self, branch: Branch, adapter: str, tasks: Tensor | None) -> Decision | None:
        granularity = branch.config.granularity
        if granularity == Granularity.TOKEN:
            raise routes_tokens(adapter)
        if granularity > Granularity.FIXED and (tasks is None or len(tasks) != 1):
            raise AdapterError(
                f"adapter {adapter!r} has a different weight update for each task: merge it inside "
                "`with hub.routing(tasks='NAME'):`"
            )
        if branch.config.router is None:
            return None
        if branch.router is None:
            return self.context.named_decisions[adapter, branch.index]
        return branch.router.settled(tasks)

    def _add_active(self, output: Tensor, x: Tensor) -> Tensor:
        for adapter in self.active_adapters:
            for branch in self.branches(adapter):
                output = branch.add_to(output, x, self.context, adapter, self.name)
        return output

    def _add_rows(self, output: Tensor, x: Tensor) -> Tensor:
        """Serve each row of a mixed batch by the adapter it names."""
        adapted = output.clone()
        for adapter in self.context.adapter_rows or {}:
            index = self.context.rows_of(adapter, len(x)).to(x.device)
            part = output[index]
            for branch in self.branches(adapter):
                part = branch.add_to(part, x[index], self.context, adapter, self.name)
            adapted = adapted.index_copy(0, index, part)
        return adapted

    def _add_static(self, output: Tensor, x: Tensor) -> Tensor:
        assert self.context.static_factors is not None
        factors: LowRank = self.context.static_factors[self.name]
        hidden = nn.functional.linear(x.to(factors.down.dtype), factors.down)
        return add_product(output, hidden, factors.up.T)


def routes_tokens(adapter: str) -> AdapterError:
    """Why an adapter is not one weight update."""
    return AdapterError(
        f"adapter {adapter!r} routes every token by itself, so it is not one weight update and cannot be merged; "
        "`loramux export` fits and measures a plain LoRA per task"
    )


def _features(layer: nn.Module, name: str) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    raise AdapterError(f"{name}: cannot adapt a {type(layer).__name__}; target_modules must name linear layers")
