"""The hub: PEFT's tuner for every loramux method. It holds the routing context and what all layers share."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ..routing import (
    Decision,
    Granularity,
    Prototypes,
    RouteObserver,
    Router,
    RoutingContext,
    RoutingStatistics,
    copy_corners,
    own_gates,
    router_name,
    update_selection_biases,
)
from ..routing.context import Observer, resolve_tasks
from ..support.errors import AdapterError
from .banks import Bank, Common
from .blocks import NO_BLOCK, Block, base_name, feed_forward_blocks, unwrap_blocks, wrap_blocks
from .branch import Branch, BranchConfig
from .first_pass import reading_first
from .held import Held, all_but_own_experts, belong_to_tasks
from .joining import NewTask, saved_tensors
from .layer import LoramuxLinear, routes_tokens
from .low_rank import LowRank
from .peft_config import CONTAINERS, PREFIX, LoramuxConfig, register
from .prompt import attention_of, continues, hidden_size, inputs_of, pool_prompt, text_config
from .registry import MethodConfig, StageConfig, method_config

Tasks = Tensor | Sequence[str] | Sequence[int] | Mapping[str, float] | str
TaskOrBlend = str | Mapping[str, float]
"""A task, or shares of tasks `{name: share}` that sum to one."""
ParameterGroups = dict[str, list[tuple[str, nn.Parameter]]]


class LoramuxModel(BaseTuner):
    """A frozen model whose linears carry routed LoRA experts. Reach it as `peft_model.base_model`.

    Forward and generate take two keywords of ours beside the model's own:

    * `routing_tasks`: names or ids of the tasks of the rows, `(batch,)`, or one for all; or a blend of tasks, `{name:
      share}` for all rows or shares `(batch, tasks)`. Required by methods routed by task; overrides the choice of
      methods routed by the prompt, and teaches their router in training.
    * `routing_mask`: `(batch, tokens)`, true where the router may look; by default the real tokens before the first
      label.
    """

    prefix = PREFIX
    tuner_layer_cls = LoramuxLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]
    peft_config: dict[str, LoramuxConfig]  # type: ignore[assignment]

    # ------------------------------------------------------------------ what PEFT calls

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.context = RoutingContext()
        self.blocks = feed_forward_blocks(model)
        self._routed_at: dict[tuple[str, Block], str] = {}
        self.stage: StageConfig | None = None
        self._methods: dict[str, MethodConfig] = {}
        self._adapted: dict[str, list[str]] = {}
        self._blocked_tasks: Tasks | None = None
        self._held: Held | None = None
        self.loramux_routers = nn.ModuleDict()
        self.loramux_banks = nn.ModuleDict()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._check_name(adapter_name)
        config = self.peft_config[adapter_name]
        self._methods[adapter_name] = config.build()
        self._check_tasks_are_named(config, self._methods[adapter_name])
        self._check_hub_is_called(config, self._methods[adapter_name])
        with self._blocks_laid_open():  # so that PEFT finds and saves modules by the names they have in the base
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self._methods[adapter_name].in_blocks and not any(adapter == adapter_name for adapter, _ in self._routed_at):
            raise AdapterError(f"method {config.method!r} {NO_BLOCK}")
        self._add_shared_parts(adapter_name)

    def _create_and_replace(
        self,
        config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        new = not isinstance(target, LoramuxLinear)
        layer = LoramuxLinear(target, current_key, self.context) if new else target
        assert isinstance(layer, LoramuxLinear)
        assert isinstance(config, LoramuxConfig)
        if new:
            layer._active_adapter = self.active_adapters
        self._give_branches(adapter_name, layer)
        if new:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for container in (self.loramux_routers, self.loramux_banks):
            for name, shared in container.items():
                shared.requires_grad_(name in self.active_adapters and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        with self._blocks_laid_open():
            super().delete_adapter(adapter_name)
        del self._methods[adapter_name], self._adapted[adapter_name]
        self._routed_at = {key: layer for key, layer in self._routed_at.items() if key[0] != adapter_name}
        for container in (self.loramux_routers, self.loramux_banks):
            if adapter_name in container:
                del container[adapter_name]

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in CONTAINERS:
            key = key.replace(f"{container}.{adapter_name}.", f"{container}.")
        return base_name(key)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_tokens_are_alike(adapter_names)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_tokens_are_alike(adapter_names)
        with self._blocks_laid_open():
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_tokens_are_alike(self, adapters: list[str] | None) -> None:
        """Before any layer is merged: others of the same adapter could refuse when some are merged already."""
        for adapter in self.active_adapters if adapters is None else adapters:
            if adapter in self._methods and self._methods[adapter].granularity == Granularity.TOKEN:
                raise routes_tokens(adapter)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Honour `adapter_names=[...]`, one adapter (or `"__base__"`) per row."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise AdapterError("adapter_names works in inference only; call model.eval() first")
        unknown = sorted(set(names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise AdapterError(f"unknown adapter {unknown[0]!r}; loaded: {', '.join(self.peft_config)}")
        self.context.adapter_rows = {
            name: torch.tensor([row for row, other in enumerate(names) if other == name])
            for name in dict.fromkeys(names)
        }
        try:
            yield
        finally:
            self.context.adapter_rows = None

    # ------------------------------------------------------------------ running

    def forward(
        self,
        *args: Any,
        routing_tasks: Tasks | None = None,
        routing_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward. In training, auxiliary losses are part of `output.loss` where there is one."""
        self._begin_call(args, kwargs, routing_tasks, routing_mask, recording=self.training)
        with self._reading_first():
            output = self.model(*args, **kwargs)
        self.context.recording = False  # a checkpointed block may run again in the backward pass; it has counted
        loss = getattr(output, "loss", None)
        if loss is not None and (auxiliary := self.context.auxiliary_loss()) is not None:
            output.loss = loss + self._with_gradient(auxiliary)
        return output

    def generate(
        self,
        *args: Any,
        routing_tasks: Tasks | None = None,
        routing_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's generate. Prompts are routed once; every decoding step keeps the decision."""
        self._begin_call(args, kwargs, routing_tasks, routing_mask, recording=False)
        with self._reading_first():
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def routing(self, tasks: Tasks) -> Iterator["LoramuxModel"]:
        """Route every call in the block by `tasks`: a name, one name per row, ids `(batch,)`, or a blend."""
        context = self.context
        before = self._blocked_tasks, context.named_tasks, context.named_decisions
        self._blocked_tasks, context.named_tasks = tasks, self._resolve_tasks(tasks)
        context.named_decisions = {
            (adapter, index): self._decide_for_tasks(adapter, index, branch, named, training=False)
            for adapter, named in context.named_tasks.items()
            for index, branch in self._decided_once(adapter)
        }
        try:
            yield self
        finally:
            self._blocked_tasks, context.named_tasks, context.named_decisions = before

    @contextmanager
    def collect_statistics(self) -> Iterator[RoutingStatistics]:
        """Collect who uses which expert over the calls in the block, by task where tasks are named."""
        statistics = RoutingStatistics(self.tasks or ["all"])
        with self.observing_routes(statistics):
            yield statistics

    @contextmanager
    def observing_routes(self, observer: RouteObserver) -> Iterator[None]:
        """Show `observer` every decision of the routers in the block."""
        self.context.route_observer = observer
        try:
            yield
        finally:
            self.context.route_observer = None

    # ------------------------------------------------------------------ what this hub is

    def method(self, adapter: str | None = None) -> MethodConfig:
        """The method of `adapter` (default: the first active one)."""
        return self._methods[adapter or self.active_adapters[0]]

    @property
    def tasks(self) -> list[str]:
        """Task names of the first active adapter, in the order of their ids."""
        return self._active_configs()[0].tasks

    @property
    def granularity(self) -> Granularity:
        """The finest granularity among the active adapters."""
        return max(self._methods[name].granularity for name in self.active_adapters)

    @property
    def needs_task(self) -> bool:
        """Whether a call without `routing_tasks` is an error."""
        return any(branch.needs_task for branch in self._active_branches())

    @property
    def routes_by_prompt(self) -> bool:
        """Whether a shared router chooses from the prompt when no task is named."""
        return any(b.granularity == Granularity.SEQUENCE for b in self._active_branches())

    @property
    def decides_once(self) -> bool:
        """Whether a router decides once for the whole model."""
        return any(b.is_shared and b.granularity < Granularity.TOKEN for b in self._active_branches())

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        return self.method().stages

    @property
    def experts_belong_to_tasks(self) -> bool:
        """Whether every expert that is routed to is that of one task, in the order of the tasks."""
        alone = all(stage.route == "task" for stage in self.stages)
        return belong_to_tasks(self._branches(), len(self.tasks), alone=alone)

    def layers(self) -> dict[str, LoramuxLinear]:
        """The adapted layers by module name."""
        return {module.name: module for module in self.model.modules() if isinstance(module, LoramuxLinear)}

    def depth_of(self, layer: str) -> float:
        """Where a layer stands: 0 at the first of the model, below 1 at the last; 0 where its name tells nothing."""
        numbers = [int(part) for part in layer.split(".") if part.isdigit()]
        count = getattr(text_config(self.model), "num_hidden_layers", 0)
        return numbers[0] / count if numbers and numbers[0] < count else 0.0

    def routers(self, adapter: str | None = None) -> Iterator[Router]:
        """All routers of `adapter` (default: of all adapters), shared ones first."""
        holders = [(f".{name}.", module) for name, module in self.named_modules() if isinstance(module, Router)]
        for name, router in holders:
            if adapter is None or f".{adapter}." in name:
                yield router

    def common_banks(self, adapter: str) -> dict[int, Common]:
        """What the banks of all layers have in common, by the number of their branch."""
        if adapter not in self.loramux_banks:
            return {}
        shared = cast(nn.ModuleDict, self.loramux_banks[adapter])
        return {int(index): cast(Common, common) for index, common in shared.items()}

    def named_routers(self) -> dict[str, Router]:
        """The routers of the first active adapter, as routing statistics call them: by layer, block, or for all."""
        adapter = self.active_adapters[0]
        named: dict[str, Router] = {}
        for index, branch in self._shared_branches(adapter):
            once = "prompt" if branch.granularity == Granularity.SEQUENCE else "model"
            places = self._adapted[adapter] if branch.granularity == Granularity.TOKEN else [once]
            named |= {router_name(place, index): self._shared_router(adapter, index) for place in places}
        for layer in self.layers().values():
            for own in layer.branches(adapter):
                if own.router is not None:
                    block = self.blocks[layer.name].name if own.config.through_block else None
                    named[block or router_name(layer.name, own.index)] = own.router
        return named

    # ------------------------------------------------------------------ training

    def set_stage(self, stage: StageConfig) -> None:
        """Train only what `stage` names.

        Raises:
            AdapterError: when rows shall go to their own task's expert and experts do not belong to tasks.
        """
        if stage.route == "task" and any(b.router and b.gates != len(self.tasks) for b in self._active_branches()):
            raise AdapterError(f"stage {stage.name!r} routes by task, and there are not as many experts as tasks")
        self.stage = stage
        self.context.own_experts = stage.route == "task"
        for router in self.routers(self.active_adapters[0]):
            router.is_frozen = "router" not in stage.train
        groups = self.grouped_parameters()
        for group, parameters in groups.items():
            trains = ("experts" if group == "experts" else "router") in stage.train
            for _, parameter in parameters:
                parameter.requires_grad_(trains)
        if self._held is not None:
            self._held.freeze()

    def grouped_parameters(self) -> ParameterGroups:
        """All parameters of the active adapters by `experts`, `router` and `task_logits`, trainable or not."""
        groups: ParameterGroups = {"experts": [], "router": [], "task_logits": []}
        routers = {name: module for name, module in self.named_modules() if isinstance(module, Router)}
        owners = {id(p): r for r in routers.values() for p in r.parameters()}
        for name, parameter in self.named_parameters():
            if not self._belongs_to_active_adapter(name):
                continue
            owner = owners.get(id(parameter))
            kind = "experts" if owner is None else "router"
            groups["task_logits" if owner and owner.config.scorer.is_task_logits else kind].append((name, parameter))
        return groups

    def parameter_groups(self) -> ParameterGroups:
        """Trainable parameters by `experts`, `router` and `task_logits`, named as in `named_parameters`."""
        return {
            group: [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
            for group, parameters in self.grouped_parameters().items()
        }

    def auxiliary_loss(self) -> Tensor:
        """The weighted auxiliary losses of the last forward pass in training mode; a zero where there are none.

        Raises:
            AdapterError: when they have no gradient although they should, as under re-entrant checkpointing.
        """
        loss = self.context.auxiliary_loss()
        if loss is None:
            return torch.zeros((), device=next(self.parameters()).device)
        return self._with_gradient(loss)

    def _with_gradient(self, loss: Tensor) -> Tensor:
        router_trains = any(p.requires_grad for router in self.routers() for p in router.parameters())
        if router_trains and torch.is_grad_enabled() and not loss.requires_grad:
            raise AdapterError(
                "the router's auxiliary loss has no gradient: "
                "set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return loss

    def finish_step(self) -> None:
        """Call after every optimiser step: balances the load (over all processes) and restores rows held still."""
        update_selection_biases(self.routers())
        if self._held is not None:
            self._held.restore()

    @torch.no_grad()
    def finish_stage(self, stage: StageConfig, prompts: Callable[[], Iterable[Mapping[str, Tensor]]]) -> None:
        """Do what comes after a stage, and let routers decide again.

        Args:
            prompts: gives batches of every task (`input_ids`, `attention_mask`, `routing_tasks`, `routing_mask`).
        """
        self.context.own_experts = False
        adapter = self.active_adapters[0]
        branches = self._branches()
        experts: list[Bank | Common] = [*(branch.bank for branch in branches), *self.common_banks(adapter).values()]
        if "reset_experts" in stage.after:
            for part in experts:
                part.reset_parameters()
        if "fit_prototypes" in stage.after:
            self._fit_prompt_prototypes(adapter, prompts)
            for branch in branches:
                branch.fit_prototypes()
        if self._held is not None:
            self._held.restore()

    def train_only(self, tasks: Sequence[str] | None) -> None:
        """Let no experts move but these tasks' own, bit for bit, from now on; None lets all train again.

        Routers that learn to choose between experts train on.

        Raises:
            AdapterError: when the method has no experts that belong to tasks, or a name is unknown.
        """
        if tasks is None:
            self._held = None
        else:
            alone = any(stage.route == "task" for stage in self.stages)
            self._held = Held(all_but_own_experts(self._branches(), self.tasks, tasks, alone=alone))

    def hold(self, held: Held | None) -> None:
        """Keep these parts as they are, bit for bit, from now on; None lets everything train again."""
        self._held = held

    def add_task(self, task: str, options: Mapping[str, Any] | None = None) -> NewTask:
        """Give a new task its rows and, where experts belong to tasks, its expert; all others keep their values.

        Args:
            options: options of the method that are said task by task, with what they say of the new one too.

        Returns:
            What is new.

        Raises:
            AdapterError: when the task is there already.
            ConfigError: when the method cannot be built for one task more.
        """
        adapter = self.active_adapters[0]
        config = self.peft_config[adapter]
        if task in config.tasks:
            raise AdapterError(f"adapter {adapter!r} knows task {task!r} already")
        tasks, options = [*config.tasks, task], {**config.options, **(options or {})}
        self._methods[adapter] = method_config(config.method, tasks=tasks, options=options)
        config.tasks, config.options = tasks, options
        self._held = None
        before = {name: tuple(tensor.shape) for name, tensor in saved_tensors(self, adapter).items()}
        for layer in self.layers().values():
            if layer.branches(adapter):
                self._give_branches(adapter, layer)
        self._cast_adapter_dtype(adapter)
        self._add_shared_parts(adapter)
        return NewTask(self, adapter, before)

    @contextmanager
    def using_factors(self, factors: Mapping[str, LowRank]) -> Iterator[None]:
        """Run with these plain LoRA factors, by layer name, in the place of the adapters."""
        self.context.static_factors = factors
        try:
            yield
        finally:
            self.context.static_factors = None

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Run the frozen base alone."""
        self.context.bypass = True
        try:
            yield
        finally:
            self.context.bypass = False

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Call `observer(layer, x, delta, counts)` for every adapted layer that runs in the block, where `counts` says
        how much each token counts, or is None where all count alike."""
        self.context.observer = observer
        try:
            yield
        finally:
            self.context.observer = None

    # ------------------------------------------------------------------ inside

    def _begin_call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tasks: Tasks | None,
        mask: Tensor | None,
        *,
        recording: bool,
    ) -> None:
        """Set the context up for one call: tasks, token mask, and the decisions made once for the model."""
        context = self.context
        if recording and self.stage is None:
            update_selection_biases(self.routers())  # other trainers set no stage and never call finish_step
        inputs = inputs_of(args, kwargs)
        if context.adapter_rows is not None and inputs is not None:
            named = sum(len(rows) for rows in context.adapter_rows.values())
            if named != len(inputs):
                raise AdapterError(f"adapter_names names {named} rows, the batch has {len(inputs)}")
        tasks = self._blocked_tasks if tasks is None else tasks
        context.layer_losses, context.shared_losses, context.recording = [], [], recording
        context.token_mask = None if inputs is None else attention_of(inputs, kwargs).bool()
        context.tasks = {} if tasks is None else self._resolve_tasks(tasks, inputs)
        if context.bypass or context.static_factors is not None:
            return
        if self.decides_once and not (continues(kwargs) and not context.tasks):
            self._decide(inputs, kwargs, mask)

    def _resolve_tasks(self, tasks: Tasks, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Task ids per adapter, one per row."""
        device = inputs.device if inputs is not None else "cpu"
        resolved = {}
        for adapter, rows in self._served_rows(inputs):
            names = self.peft_config[adapter].tasks
            if not names:
                continue
            ids = resolve_tasks(tasks, names, device)
            if inputs is not None:
                ids = ids.expand(len(inputs), *ids.shape[1:]) if len(ids) == 1 else ids
                if len(ids) != len(inputs):
                    raise AdapterError(f"routing_tasks names {len(ids)} rows, the batch has {len(inputs)}")
            resolved[adapter] = ids if rows is None else ids[rows.to(ids.device)]
        return resolved

    def _served_rows(self, inputs: Tensor | None) -> list[tuple[str, Tensor | None]]:
        """The adapters of this call and, in a mixed batch, the rows of each."""
        rows = self.context.adapter_rows
        if rows is None or inputs is None:
            return [(name, None) for name in self.active_adapters if name in self.peft_config]
        return [(name, index) for name, index in rows.items() if name in self.peft_config]

    def _decide(self, inputs: Tensor | None, kwargs: dict[str, Any], mask: Tensor | None) -> None:
        """Make the decisions that hold for the whole model and, in training, note what they cost."""
        self.context.decisions = {}
        pooled: Tensor | None = None
        for adapter, rows in self._served_rows(inputs):
            tasks = self.context.tasks.get(adapter)
            for index, branch in self._decided_once(adapter):
                if tasks is not None or branch.granularity == Granularity.TASK:
                    decision = self._decide_for_tasks(adapter, index, branch, tasks, training=self.training)
                    self.context.decisions[adapter, index] = decision
                    self._note_shared(index, branch, decision, tasks, reads_prompt=False)
                if branch.granularity == Granularity.SEQUENCE and (tasks is None or self._learns_labels(branch)):
                    if inputs is None:
                        raise AdapterError("routing by the prompt needs input_ids or inputs_embeds")
                    pooled = self._pool_prompt(inputs, kwargs, mask) if pooled is None else pooled
                    features = pooled if rows is None else pooled[rows.to(pooled.device)]
                    decision = self._shared_router(adapter, index)(features, tasks)
                    if tasks is None:
                        self.context.decisions[adapter, index] = decision
                    self._note_shared(index, branch, decision, tasks, reads_prompt=True)

    def _decide_for_tasks(
        self, adapter: str, index: int, branch: BranchConfig, tasks: Tensor | None, *, training: bool
    ) -> Decision:
        """What a shared router decides where the tasks are named; one that reads prompts is overridden by them."""
        if branch.granularity == Granularity.SEQUENCE:
            assert tasks is not None
            return own_gates(tasks, branch.gates)
        router = self._shared_router(adapter, index)
        return router(torch.empty(0), tasks) if training else router.settled(tasks)

    def _note_shared(
        self, index: int, branch: BranchConfig, decision: Decision, tasks: Tensor | None, *, reads_prompt: bool
    ) -> None:
        """Note a shared decision for losses and statistics."""
        assert branch.router is not None
        learns = self.context.recording and (reads_prompt or branch.granularity == Granularity.TASK)
        if learns and (tasks is not None or not branch.router.learns_labels):
            loss = branch.router.loss(decision, None, tasks)
            if loss is not None:
                self.context.shared_losses.append(loss)
        if self.context.route_observer is not None and (reads_prompt or branch.granularity == Granularity.TASK):
            where = router_name("prompt" if reads_prompt else "model", index)
            self.context.route_observer.add(where, decision.weights, None, tasks, branch.router.groups)

    def _learns_labels(self, branch: BranchConfig) -> bool:
        in_stage = self.stage is None or "router" in self.stage.train
        return bool(self.context.recording and in_stage and branch.router and branch.router.learns_labels)

    def _shared_branches(self, adapter: str) -> Iterator[tuple[int, BranchConfig]]:
        """The branches whose router is shared by the whole model, with their index."""
        for index, branch in enumerate(self._methods[adapter].branches):
            if branch.is_shared:
                yield index, branch

    def _decided_once(self, adapter: str) -> Iterator[tuple[int, BranchConfig]]:
        """Those of them whose decision holds for all layers and tokens."""
        return ((i, branch) for i, branch in self._shared_branches(adapter) if branch.granularity < Granularity.TOKEN)

    @contextmanager
    def _reading_first(self) -> Iterator[None]:
        """Before every call of the model in the block, let the base read its tokens where routers want that."""
        if not any(branch.is_shared and branch.granularity == Granularity.TOKEN for branch in self._active_branches()):
            yield
            return
        with reading_first(self.model, self._decide_for_tokens):
            yield

    def _decide_for_tokens(self, hidden_states: Callable[[], Tensor]) -> None:
        """Make the decisions of all layers from what the base says of the tokens of this call."""
        context = self.context
        context.layer_decisions = {}
        if context.bypass or context.static_factors is not None:
            return
        waiting = [
            (adapter, index)
            for adapter in context.adapter_rows or self.active_adapters
            for index, branch in (self._shared_branches(adapter) if adapter in self._methods else ())
            if branch.granularity == Granularity.TOKEN and not (context.own_experts and adapter in context.tasks)
        ]
        if not waiting:
            return
        with self.bypassed():
            hidden = hidden_states()
        for adapter, index in waiting:
            mixed = context.adapter_rows is not None
            x = hidden[context.rows_of(adapter, len(hidden)).to(hidden.device)] if mixed else hidden
            router, tasks = self._shared_router(adapter, index), context.tasks.get(adapter)
            decisions = router(x, tasks)
            for number, layer in enumerate(self._adapted[adapter]):
                decision = decisions.mapped(itemgetter(number))
                context.layer_decisions[adapter, index, layer] = decision
                context.record(router_name(layer, index), router, decision, x, tasks)

    def _shared_router(self, adapter: str, index: int) -> Router:
        shared = self.loramux_routers[adapter]
        assert isinstance(shared, nn.ModuleDict)
        router = shared[str(index)]
        assert isinstance(router, Router)
        return router

    def _fit_prompt_prototypes(self, adapter: str, prompts: Callable[[], Iterable[Mapping[str, Tensor]]]) -> None:
        """Set the prototypes of shared routers to the mean pooled prompt of each task."""
        scorers = [self._shared_router(adapter, index).scorer for index, _ in self._shared_branches(adapter)]
        prototypes = [scorer for scorer in scorers if isinstance(scorer, Prototypes)]
        if not prototypes:
            return
        sums = torch.zeros(len(self.tasks), hidden_size(self.model), device=self.model.device)
        for batch in prompts():
            pooled = nn.functional.normalize(self._pool_prompt(batch["input_ids"], dict(batch), batch["routing_mask"]))
            sums.index_add_(0, batch["routing_tasks"].to(sums.device), pooled)
        for scorer in prototypes:
            scorer.directions.copy_(nn.functional.normalize(sums))

    def _pool_prompt(self, inputs: Tensor, kwargs: dict[str, Any], mask: Tensor | None) -> Tensor:
        with self.bypassed():
            return pool_prompt(self.model, inputs, kwargs, mask)

    def _add_shared_parts(self, adapter: str) -> None:
        """Build what the whole model shares, after its layers."""
        tasks, width = len(self.peft_config[adapter].tasks), hidden_size(self.model)
        layers = [layer for layer in self.layers().values() if layer.branches(adapter)]
        self._adapted[adapter] = [layer.name for layer in layers]
        routers = nn.ModuleDict()
        for index, branch in self._shared_branches(adapter):
            assert branch.router is not None
            routers[str(index)] = Router(branch.router, width, tasks, branch.gates, len(layers))
        for key in routers if adapter in self.loramux_routers else ():
            cast(Router, routers[key]).take_over(self._shared_router(adapter, int(key)))
        self._keep_shared(self.loramux_routers, adapter, routers)
        shapes = [(layer.in_features, layer.out_features) for layer in layers]
        built = {str(i): b.bank.common(shapes) for i, b in enumerate(self._methods[adapter].branches)}
        banks = nn.ModuleDict({index: common for index, common in built.items() if common is not None})
        for index, common in self.common_banks(adapter).items():
            copy_corners(common, banks[str(index)])
        self._keep_shared(self.loramux_banks, adapter, banks)
        for index, common in self.common_banks(adapter).items():
            for layer in layers:
                layer.branches(adapter)[index].bank.share(common)

    def _keep_shared(self, container: nn.ModuleDict, adapter: str, shared: nn.ModuleDict) -> None:
        if len(shared):
            on_meta = any(p.is_meta for p in shared.parameters())  # loading fills in the real values
            container[adapter] = shared if on_meta else shared.to(self.model.device)
            shared.requires_grad_(adapter in self.active_adapters and not self.peft_config[adapter].inference_mode)

    def _give_branches(self, adapter: str, layer: LoramuxLinear) -> None:
        """Build the branches of a layer; the first of the linears in a block holds the block's router."""
        config, method, block = self.peft_config[adapter], self._methods[adapter], self.blocks.get(layer.name)
        branches = method.at(self.depth_of(layer.name), in_block=block is not None)
        if not (config.excess_rank or config.inference_mode):
            layer.check_ranks(branches)
        width = None
        if block is not None and method.in_blocks:
            holds_router = self._routed_at.setdefault((adapter, block), layer.name) == layer.name
            width = block.width if holds_router else None
        layer.update_layer(adapter, branches, len(config.tasks), config.inference_mode, width)

    @contextmanager
    def _blocks_laid_open(self) -> Iterator[None]:
        """Modules are where the base has them, and feed-forward blocks are wrapped again afterwards where needed."""
        unwrap_blocks(self.model)
        try:
            yield
        finally:
            routed = [
                self.blocks[name].name
                for name, layer in self.layers().items()
                if any(branch.config.through_block for adapter in self._methods for branch in layer.branches(adapter))
            ]
            wrap_blocks(self.model, dict.fromkeys(routed), self.context)

    def _check_tasks_are_named(self, config: LoramuxConfig, method: MethodConfig) -> None:
        by_task = any(stage.route == "task" for stage in method.stages) or any(b.needs_task for b in method.everywhere)
        if not config.tasks and (by_task or method.granularity == Granularity.SEQUENCE):
            raise AdapterError(
                f"method {config.method!r} tells tasks apart and none is named: LoramuxConfig(tasks=['one', 'other']), "
                "or in a recipe the file that holds them (tasks: tasks.yaml)"
            )

    def _check_hub_is_called(self, config: LoramuxConfig, method: MethodConfig) -> None:
        first = [b for b in method.branches if b.is_shared and b.granularity == Granularity.TOKEN]
        if config.task_type is None and (first or method.granularity in (Granularity.TASK, Granularity.SEQUENCE)):
            raise AdapterError(
                f"method {config.method!r} needs a task_type (such as CAUSAL_LM): without one PEFT calls the model "
                "past its router"
            )
        if first and getattr(self.model.config, "is_encoder_decoder", False):
            raise AdapterError(
                f"method {config.method!r} weights experts token by token from one pass of the base; an "
                "encoder-decoder has tokens of two kinds. Use a decoder or an encoder"
            )

    def _branches(self) -> list[Branch]:
        """Those of the first active adapter, at all layers."""
        return [branch for layer in self.layers().values() for branch in layer.branches(self.active_adapters[0])]

    def _check_name(self, adapter: str) -> None:
        """PEFT loses tensors silently when an adapter is called like a part of the model."""
        parts = {part for name, _ in self.model.named_modules() if PREFIX not in name for part in name.split(".")}
        if not adapter or "." in adapter or adapter.isdigit() or adapter in parts:
            raise AdapterError(
                f"{adapter!r} cannot be an adapter name: use a word without dots that is no number and no module's name"
            )

    def _belongs_to_active_adapter(self, name: str) -> bool:
        return any(f"{container}.{adapter}." in name for adapter in self.active_adapters for container in CONTAINERS)

    def _active_configs(self) -> list[LoramuxConfig]:
        return [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]

    def _active_branches(self) -> list[BranchConfig]:
        names = list(self.context.adapter_rows) if self.context.adapter_rows else self.active_adapters
        return [branch for name in names if name in self._methods for branch in self._methods[name].everywhere]


register(LoramuxModel)
