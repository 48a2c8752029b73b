"""How far an exported adapter is from the routed model it came from."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .hub import LoramuxModel, TaskOrBlend
from .low_rank import LowRank

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Fidelity:
    """Exported against routed, over the answer tokens of held-out examples.

    Attributes:
        tokens: answer tokens compared.
        token_kl: mean divergence of the next-token distributions, in nats.
        base_kl: the same for the base without any adapter, as a scale.
        top1_agreement: share of tokens with the same most likely answer.
        max_logit_difference: largest absolute difference of a logit.
    """

    tokens: int
    token_kl: float
    base_kl: float
    top1_agreement: float
    max_logit_difference: float

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_fidelity(
    hub: LoramuxModel, task: TaskOrBlend, factors: Mapping[str, LowRank], batches: Iterable[Batch]
) -> Fidelity:
    """Compare `factors` with the routed model on one task's examples (`input_ids`, `attention_mask`, `labels`)."""
    kl, base_kl, agree, worst, tokens = 0.0, 0.0, 0, 0.0, 0
    for batch in batches:
        with hub.routing(task):
            routed = answer_logits(hub, batch)
        with hub.using_factors(factors):
            exported = answer_logits(hub, batch)
        with hub.bypassed():
            base = answer_logits(hub, batch)
        kl += float(token_kl(routed, exported).sum())
        base_kl += float(token_kl(routed, base).sum())
        agree += int((routed.argmax(-1) == exported.argmax(-1)).sum())
        worst = max(worst, float((routed - exported).abs().max()))
        tokens += len(routed)
    tokens = max(tokens, 1)
    return Fidelity(tokens, kl / tokens, base_kl / tokens, agree / tokens, worst)


def answer_logits(hub: LoramuxModel, batch: Batch) -> Tensor:
    """`(answer tokens, vocabulary)`: the logits that predict the labelled tokens, in float32."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if hub.model.config.is_encoder_decoder:
        return hub(**inputs, labels=batch["labels"]).logits[batch["labels"] != -100].float()
    logits = hub(**inputs).logits
    return logits[:, :-1][batch["labels"][:, 1:] != -100].float()


def token_kl(target: Tensor, logits: Tensor) -> Tensor:
    """`(tokens,)`: KL(target || logits) of next-token distributions, in nats."""
    reference, other = F.log_softmax(target, -1), F.log_softmax(logits, -1)
    return (reference.exp() * (reference - other)).sum(-1)
