"""Who is used by whom once a model is trained: task x expert routing over the examples of a split."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..adapters import LoramuxModel, method_config, numbered_tasks
from ..routing import Granularity, LayerUsage, RoutingStatistics
from ..tasks import EncodedTask
from .answers import right_padded
from .evaluate import Question, Routing, eval_mode, hub_of, questions, routing_of


@torch.no_grad()
def routing_usage(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EncodedTask],
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 64,
) -> RoutingStatistics | None:
    """Task x expert usage of every router over prompts and reference answers; None for a method without routers.

    A method that routes by task is told the task; every other one decides for itself, from what it would see in use.
    """
    hub = hub_of(model)
    if hub is None or hub.granularity == Granularity.FIXED:
        return None
    routing: Routing = "named" if hub.needs_task else "auto"
    usage = RoutingStatistics([task.name for task in tasks])
    with eval_mode(model):
        for row, task in enumerate(tasks):
            rows = questions(task, split, limit)
            with hub.collect_statistics() as own:
                for start in range(0, len(rows), batch_size):
                    read(model, tokenizer, rows[start : start + batch_size], task.name, routing)
            for name, layer in own.layers.items():
                _add(usage, name, row, layer)
    return usage


def usage_data(hub: LoramuxModel, usage: RoutingStatistics) -> dict[str, Any]:
    """Plain data of usage for JSON, with the names of experts where they have some."""
    return {**usage.to_data(), "experts": expert_names(hub)}


def expert_names(hub: LoramuxModel) -> list[str] | None:
    """The tasks of the experts, where a method has one for each task; None where experts are just numbered."""
    method = hub.peft_config[hub.active_adapters[0]].method
    gates = [method_config(method, tasks=numbered_tasks(count)).branches[-1].gates for count in (2, 3)]
    return list(hub.tasks) if gates == [2, 3] else None


def read(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], task: str, routing: Routing
) -> None:
    """Run examples through the model once; a router of prompts does not see the answers."""
    device = next(model.parameters()).device
    ids, mask = right_padded([q.encoded.input_ids for q in rows], tokenizer.pad_token_id or 0, device)
    lengths = torch.tensor([q.encoded.prompt_length for q in rows], device=device)
    prompt = torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1)
    model(input_ids=ids, attention_mask=mask, routing_mask=prompt, **routing_of(model, task, routing))


def _add(usage: RoutingStatistics, name: str, row: int, own: LayerUsage) -> None:
    """Put all that was counted for one task into its row."""
    layer = usage.layers.setdefault(name, LayerUsage.empty(len(usage.tasks), own.weights.shape[-1], own.groups))
    layer.weights[row] += own.weights.sum(0)
    layer.tokens[row] += own.tokens.sum()
    layer.entropy[row] += own.entropy.sum()
