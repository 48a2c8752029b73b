"""Whether the tasks that were there still answer as they did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.fidelity import answer_logits
from ..tasks import EncodedTask
from .evaluate import hub_of
from .exports import labelled_batches
from .run import TrainedRun
from .usage import routing_usage

ROUNDING = 1e-4
"""The largest difference of a logit that counts as rounding; also the bound of exact exports."""


@dataclass(frozen=True)
class Moved:
    """How far the answers of a task have moved, over the answer tokens of some of its validation examples.

    Attributes:
        bit_equal: whether every logit is what it was, to the last bit.
        max_logit_difference: the largest absolute difference.
        same_top_token: share of tokens with the same most likely answer.
    """

    bit_equal: bool
    max_logit_difference: float
    same_top_token: float


@torch.no_grad()
def logits_of(run: TrainedRun, tasks: Sequence[EncodedTask]) -> dict[str, Tensor]:
    """`(answer tokens, vocabulary)` of every task's validation examples, each routed as its task, on the CPU."""
    hub = hub_of(run.model)
    assert hub is not None
    found = {}
    for task in tasks:
        with hub.routing(task.name):
            batches = labelled_batches(run, task, "validation")
            found[task.name] = torch.cat([answer_logits(hub, batch).cpu() for batch in batches])
    return found


def compare_logits(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Moved]:
    """How far each task has moved."""
    return {
        task: Moved(
            bit_equal=torch.equal(old, after[task]),
            max_logit_difference=float((old - after[task]).abs().max()),
            same_top_token=float((old.argmax(-1) == after[task].argmax(-1)).double().mean()),
        )
        for task, old in before.items()
    }


@dataclass(frozen=True)
class Drawn:
    """Where a router of prompts sends validation prompts once a task has joined.

    Attributes:
        own: share of the new task's prompts that go to its own expert.
        others: share of the other tasks' prompts that go there too.
    """

    own: float
    others: float


def drawn_prompts(run: TrainedRun, tasks: Sequence[EncodedTask]) -> Drawn | None:
    """Which prompts find the expert of the last task; None without a router that picks experts by the prompt."""
    hub = hub_of(run.model)
    if hub is None or not hub.routes_by_prompt:
        return None
    usage = routing_usage(run.model, run.tokenizer, tasks, split="validation")
    assert usage is not None
    (prompts,) = usage.layers.values()
    shares = prompts.weights[:, -1] / prompts.tokens
    others = prompts.weights[:-1, -1].sum() / prompts.tokens[:-1].sum()
    return Drawn(own=float(shares[-1]), others=float(others))
