"""The state of one forward pass that adapted layers read.

It lives on one object shared by the hub and its layers, not in hooks and not in keyword arguments: it is still there
when gradient checkpointing recomputes a block during the backward pass, and through every step of `generate`. It
describes the latest call, so under checkpointing each forward pass wants its backward pass before the next one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..support.errors import AdapterError
from .decision import Decision, Granularity
from .losses import masked_mean
from .router import Router
from .statistics import RouteObserver

Observer = Callable[[str, Tensor, Tensor, Tensor | None], None]


@dataclass
class RoutingContext:
    """What the layers need to know about the current call.

    Attributes:
        tasks: per adapter, task ids `(batch,)` or blends of tasks `(batch, tasks)` of the latest call.
        named_tasks: per adapter, the tasks that a surrounding `hub.routing` block names.
        decisions: per adapter and branch, what was decided once for the whole model, on `(batch, gates)`.
        layer_decisions: per adapter, branch and layer, what was decided for the tokens of this call before it began.
        named_decisions: the same as `decisions` for the tasks that a surrounding `hub.routing` block names.
        token_mask: `(batch, tokens)`, true for real tokens.
        adapter_rows: for mixed batches, the rows each adapter serves.
        own_experts: every row goes to the expert of its own task, whatever routers would say.
        bypass: run the frozen base alone.
        static_factors: plain LoRA factors per layer that stand in for the adapters.
        running_experts: per adapter, the expert that a feed-forward block runs through right now, on `(1, gates)`.
        observer: called with layer name, input and delta of every adapted layer, and how much each token counts.
        route_observer: sees every decision.
        recording: whether this pass counts for losses and balance; off when a checkpointed block is recomputed.
        layer_losses, shared_losses: weighted auxiliary losses of this pass, of each layer's and of shared routers.
    """

    tasks: dict[str, Tensor] = field(default_factory=dict)
    named_tasks: dict[str, Tensor] = field(default_factory=dict)
    decisions: dict[tuple[str, int], Decision] = field(default_factory=dict)
    layer_decisions: dict[tuple[str, int, str], Decision] = field(default_factory=dict)
    named_decisions: dict[tuple[str, int], Decision] = field(default_factory=dict)
    token_mask: Tensor | None = None
    adapter_rows: dict[str, Tensor] | None = None
    own_experts: bool = False
    bypass: bool = False
    recording: bool = False
    layer_losses: list[Tensor] = field(default_factory=list)
    shared_losses: list[Tensor] = field(default_factory=list)
    running_experts: dict[str, Decision] = field(default_factory=dict)
    observer: Observer | None = None
    route_observer: RouteObserver | None = None
    static_factors: Mapping[str, Any] | None = None
    _counts: Tensor | None = None

    def auxiliary_loss(self) -> Tensor | None:
        """The mean of the layers' losses plus the shared routers' losses; None where there are none."""
        parts = [torch.stack(self.layer_losses).mean()] if self.layer_losses else []
        return torch.stack([*parts, *self.shared_losses]).sum() if parts or self.shared_losses else None

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The token mask when it describes `x` `(..., features)`, else None (a decoding step sees one token)."""
        fits = self.token_mask is not None and self.token_mask.shape == x.shape[:-1]
        return self.token_mask if fits else None

    def shared_decision(self, adapter: str, branch: int) -> Decision:
        """What was decided once for the whole model, on `(batch, gates)`.

        Raises:
            AdapterError: when nothing was decided, because the model was called past its hub.
        """
        if (adapter, branch) not in self.decisions:
            raise AdapterError(
                f"adapter {adapter!r} is routed by the prompt, but no prompt was routed: call the PEFT model (with a "
                "task_type), not the model inside it"
            )
        return self.decisions[adapter, branch]

    def layer_decision(self, adapter: str, branch: int, layer: str, x: Tensor) -> Decision:
        """What was decided beforehand for the tokens `x (..., features)` of a layer, on `(..., gates)`.

        Raises:
            AdapterError: when nothing was decided, or the layer sees other tokens than the model was called with.
        """
        if (adapter, branch, layer) not in self.layer_decisions:
            raise AdapterError(
                f"adapter {adapter!r} is routed by a first pass of the base, and there was none: call the PEFT model "
                "(with a task_type), not the model inside it"
            )
        decision = self.layer_decisions[adapter, branch, layer]
        if decision.weights.shape[:-1].numel() != x.shape[:-1].numel():
            raise AdapterError(
                f"{layer}: adapter {adapter!r} has weights for {decision.weights.shape[:-1].numel()} tokens of the "
                f"first pass, and this layer sees {x.shape[:-1].numel()}; leave it out of target_modules"
            )
        return decision

    @contextmanager
    def running(self, adapter: str, expert: Decision, counts: Tensor) -> Iterator[None]:
        """A feed-forward block runs through one expert of an adapter.

        Args:
            counts: `(1, tokens)`, how much the expert counts for the tokens that run.
        """
        self.running_experts[adapter], self._counts = expert, counts
        try:
            yield
        finally:
            del self.running_experts[adapter]
            self._counts = None

    def running_expert(self, adapter: str, layer: str) -> Decision:
        """The expert that the feed-forward block of a layer runs through, on `(1, gates)`.

        Raises:
            AdapterError: when the layer runs without its block.
        """
        if adapter not in self.running_experts:
            raise AdapterError(
                f"{layer}: adapter {adapter!r} routes the feed-forward block around this linear, and the model runs "
                "the linear without it; leave it out of target_modules"
            )
        return self.running_experts[adapter]

    def counts_for(self, x: Tensor) -> Tensor | None:
        """How much each token of `x (..., features)` counts for the layer that sees it, `(...)`; None if all alike."""
        return self.mask_for(x) if self._counts is None else self._counts

    def rows_of(self, adapter: str, batch: int) -> Tensor:
        """The rows of a batch that an adapter serves in a mixed batch; beams of a row lie next to each other."""
        assert self.adapter_rows is not None
        repeats = batch // sum(len(rows) for rows in self.adapter_rows.values())
        rows = self.adapter_rows[adapter]
        return (rows.unsqueeze(-1) * repeats + torch.arange(repeats, device=rows.device)).flatten()

    def record(self, layer: str, router: Router, decision: Decision, x: Tensor, tasks: Tensor | None) -> None:
        """Note a per-layer decision for losses, balance and statistics."""
        mask = self.mask_for(x)
        if self.route_observer is not None and router.granularity > Granularity.FIXED:
            self.route_observer.add(layer, decision.weights, mask, tasks, router.config.groups)
        if not router.training:
            return
        mask = mask if router.granularity == Granularity.TOKEN else None
        # Computed in the recomputation of a checkpointed block too, which must repeat the forward pass exactly.
        loss = router.config.loss(decision, mask, tasks)
        if self.recording:
            if loss is not None:
                self.layer_losses.append(loss)
            router.count_load(decision.weights, mask)


def prompt_mask(attention_mask: Tensor, labels: Tensor | None) -> Tensor:
    """`(batch, tokens)`: the real tokens before the first trained one (labels of -100 are not trained).

    A row that is trained from its first token on has no prompt; all its real tokens count.
    """
    mask = attention_mask.bool()
    if labels is None:
        return mask
    prompt = mask & ((labels != -100).cumsum(-1) == 0)
    return torch.where(prompt.any(-1, keepdim=True), prompt, mask)  # where all is answer, all is read


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of `(batch, tokens, width)` over the tokens of `mask`, in float32."""
    return torch.stack([masked_mean(row, keep) for row, keep in zip(hidden.float(), mask, strict=True)])


def resolve_tasks(tasks: object, names: list[str], device: torch.device | str = "cpu") -> Tensor:
    """Task ids `(batch,)`, or blends of tasks `(batch, tasks)`.

    Args:
        tasks: names or ids of the rows, or one for all; a blend as `{name: share}`, or shares `(batch, tasks)`.

    Raises:
        AdapterError: for a name or an id that is not among `names`, or shares that are negative or do not sum to one.
    """
    if isinstance(tasks, Mapping):
        ids = task_ids(list(tasks), names, device)
        shares = torch.zeros(1, len(names), device=device)
        shares[0, ids] = torch.tensor(list(tasks.values()), dtype=torch.float32, device=device)
        return _checked_shares(shares)
    if isinstance(tasks, Tensor) and tasks.is_floating_point():
        shares = tasks.to(device).reshape(-1, tasks.shape[-1])
        if shares.shape[-1] != len(names):
            raise AdapterError(f"a blend of tasks has {len(names)} shares, one per task; got {shares.shape[-1]}")
        return _checked_shares(shares)
    return task_ids(tasks, names, device)


def _checked_shares(shares: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        if not bool((shares >= 0).all()):  # NaN is not at least zero either
            raise AdapterError(f"the shares of a blend of tasks must not be negative, got {shares.tolist()}")
        if not bool(((shares.sum(-1) - 1).abs() <= 1e-4).all()):
            raise AdapterError(f"the shares of a blend of tasks must sum to one, got {shares.sum(-1).tolist()}")
    return shares


def task_ids(tasks: object, names: list[str], device: torch.device | str = "cpu") -> Tensor:
    """Task ids `(batch,)` from names, one name, or ids.

    Raises:
        AdapterError: for a name or an id that is not among `names`.
    """
    if isinstance(tasks, Tensor):
        ids = tasks.to(device=device, dtype=torch.long).reshape(-1)
        if ids.numel() and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= len(names):
                raise AdapterError(f"task id {low if low < 0 else high} is outside 0..{len(names) - 1}")
        return ids
    listed: list[Any] = [tasks] if isinstance(tasks, str | int) else list(tasks)  # type: ignore[call-overload]
    if all(isinstance(task, int) for task in listed):
        return task_ids(torch.tensor(listed), names, device)
    unknown = [task for task in listed if task not in names]
    if unknown:
        raise AdapterError(f"unknown task {unknown[0]!r}; this adapter knows: {', '.join(names)}")
    return torch.tensor([names.index(task) for task in listed], device=device)
