"""Experts through the feed-forward blocks of the frozen model: tokens are mixed after the nonlinearity (MixLoRA)."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..routing import Decision, Router, RoutingContext, own_gates
from ..support.errors import AdapterError
from .layer import LoramuxLinear

NO_BLOCK = (
    "sends tokens through experts' feed-forward blocks, and no adapted linear stands in one: a block is a module of "
    "its own in every layer, outside of attention, of linears, norms and activations"
)
_ATTENTION = ("attn", "attention")
_INSIDE = ".routed_block"


@dataclass(frozen=True)
class Block:
    """A feed-forward block by name, and the width of what it reads."""

    name: str
    width: int


def feed_forward_blocks(model: nn.Module) -> dict[str, Block]:
    """The block of every linear that stands in one.

    In each numbered layer of the model it is the smallest module that holds all linears outside of attention, provided
    that it treats every token by itself as far as its parts show.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    layers: dict[str, list[str]] = defaultdict(list)
    for name in linears:
        layer = _numbered_layer(name)
        if layer and not _names_attention(name.removeprefix(layer)):
            layers[layer].append(name)
    blocks: dict[str, Block] = {}
    for layer, names in layers.items():
        common = os.path.commonpath([name.rpartition(".")[0].replace(".", "/") for name in names]).replace("/", ".")
        if common.startswith(f"{layer}.") and _treats_tokens_alone(model.get_submodule(common)):
            first: Any = linears[names[0]]
            width = first.in_features if isinstance(first, nn.Linear) else first.nx
            blocks |= dict.fromkeys(names, Block(common, width))
    return blocks


class LoramuxBlock(nn.Module):
    """Wraps a feed-forward block of the frozen model, whose linears carry experts.

    A router at its input chooses experts for every token; the block runs once per expert on the tokens that chose it,
    and what it says is mixed by the router's weights. It is the block itself where no active adapter routes it.

    Args:
        block: the module, its linears adapted; one of them holds the router.
        name: the module's name in the base model.
        context: shared with the hub and the linears.
    """

    def __init__(self, block: nn.Module, name: str, context: RoutingContext) -> None:
        super().__init__()
        self.routed_block = block
        self.name = name
        self.context = context
        self._linears = tuple(module for module in block.modules() if isinstance(module, LoramuxLinear))

    def __getattr__(self, name: str) -> Any:
        """What the model asks of the block beside running it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("routed_block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`(..., width)` to what the block says of it.

        Raises:
            AdapterError: when the block is not a map of single tokens, or adapters ask for it that cannot share it.
        """
        routers = self._active_routers()
        if not routers:
            return self.routed_block(hidden_states, *args, **kwargs)
        if len(routers) > 1 or self._routes_otherwise() or self.context.adapter_rows is not None:
            raise AdapterError(
                f"{self.name}: adapter {next(iter(routers))!r} sends tokens through this block once per expert, so it "
                "must be the only routed one that is active, and adapter_names cannot mix it with others"
            )
        if args or kwargs:
            raise AdapterError(f"{self.name}: takes more than one input, so its tokens cannot be sent through alone")
        ((adapter, router),) = routers.items()
        weights = self._decide(adapter, router, hidden_states)
        return self._mixed(adapter, hidden_states, weights.flatten(0, -2))

    def _routes_otherwise(self) -> bool:
        """Whether active adapters route single linears of the block, which then see neither rows nor whole rows."""
        active = [
            branch.config
            for linear in self._linears
            for adapter in linear.active_adapters
            for branch in linear.branches(adapter)
        ]
        return any(config.router is not None and not config.through_block for config in active)

    def _active_routers(self) -> dict[str, Router]:
        """The routers of the active adapters, by adapter; none where the base or plain LoRAs run."""
        context = self.context
        if context.bypass or context.static_factors is not None:
            return {}
        return {
            adapter: branch.router
            for linear in self._linears
            if not (linear.disable_adapters or linear.merged)
            for adapter in context.adapter_rows or linear.active_adapters
            for branch in linear.branches(adapter)
            if branch.config.through_block and branch.router is not None
        }

    def _decide(self, adapter: str, router: Router, x: Tensor) -> Tensor:
        """Weights `(..., experts)` of tokens `x (..., width)`."""
        tasks = self.context.tasks.get(adapter)
        if self.context.own_experts and tasks is not None:
            own = own_gates(tasks, router.gates).weights
            rows = own.repeat_interleave(x.shape[:-1].numel() // len(own), dim=0)
            return rows.reshape(*x.shape[:-1], -1)
        decision = router(x, tasks)
        self.context.record(self.name, router, decision, x, tasks)
        return decision.weights

    def _mixed(self, adapter: str, x: Tensor, weights: Tensor) -> Tensor:
        """The block's words on `x (..., width)`, mixed by `weights (tokens, experts)`."""
        tokens = x.reshape(-1, x.shape[-1])
        mask = self.context.mask_for(x)
        counts = weights.detach() if mask is None else weights.detach() * mask.reshape(-1, 1)
        total: Tensor | None = None
        for expert, choice in enumerate(torch.eye(weights.shape[-1], dtype=weights.dtype, device=x.device)):
            rows = weights[:, expert].nonzero().squeeze(-1)
            if not len(rows) and not self.training:  # in training every expert keeps its place in the graph
                continue
            decision = Decision(choice[None], choice[None], choice[None], active=1)
            with self.context.running(adapter, decision, counts[rows, expert].unsqueeze(0)):
                said = self.routed_block(tokens[rows].unsqueeze(0))
            if not isinstance(said, Tensor):
                raise AdapterError(f"{self.name}: says more than one tensor, so its experts cannot be mixed")
            part = weights[rows, expert, None] * said.squeeze(0)
            if total is None:
                total = part.new_zeros(len(tokens), part.shape[-1])
            total = total.index_add(0, rows, part)
        assert total is not None
        return total.to(said.dtype).reshape(*x.shape[:-1], -1)


def wrap_blocks(model: nn.Module, blocks: Iterable[str], context: RoutingContext) -> None:
    """Put a `LoramuxBlock` in the place of each of these modules of the model."""
    for name in blocks:
        _replace(model, name, LoramuxBlock(model.get_submodule(name), name, context))


def unwrap_blocks(model: nn.Module) -> None:
    """Put every wrapped module back."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, LoramuxBlock)}
    for name, module in wrapped.items():
        _replace(model, name, module.routed_block)


def base_name(name: str) -> str:
    """What a module or a tensor is called where no block is wrapped."""
    return name.replace(_INSIDE, "")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _numbered_layer(name: str) -> str:
    """The beginning of a name up to its first number; empty where there is none."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _names_attention(name: str) -> bool:
    return any(mark in name.lower() for mark in _ATTENTION)


def _treats_tokens_alone(module: nn.Module) -> bool:
    def is_plain(part: nn.Module) -> bool:
        holds_nothing = not any(True for _ in part.parameters(recurse=False))
        return isinstance(part, nn.Linear | Conv1D) or "norm" in type(part).__name__.lower() or holds_nothing

    return all(is_plain(part) and not _names_attention(name) for name, part in module.named_modules())
