"""What an adapter makes of a few examples: as it is, and after a short trial on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..support.errors import ConfigError
from ..tasks import Encoded, collate
from ..training.answers import Respondent

RATE = 2e-3
"""Peak learning rate of a trial: that of our recipes."""
_BATCH = 16


def losses_of(
    base: PreTrainedModel, adapter: Path, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]
) -> Tensor:
    """Nats per token of each answer, `(rows,)`, by the base with an adapter; the base is bare again afterwards."""
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    try:
        return answer_losses(model, tokenizer, rows)
    finally:
        model.unload()


def trial_losses(
    base: PreTrainedModel,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    steps: int,
    *,
    fresh: bool = False,
) -> Tensor:
    """The same for each half of the examples after `steps` steps of training on the other half.

    Args:
        fresh: start from an untrained LoRA like the adapter instead.

    Raises:
        ConfigError: there is only one example.
    """
    if len(rows) < 2:
        raise ConfigError("a trial needs two examples or more: it trains on one half and judges by the other")
    half = len(rows) // 2
    found = []
    for seen, unseen in ((rows[half:], rows[:half]), (rows[:half], rows[half:])):
        model = fresh_lora(base, adapter) if fresh else PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
        try:
            fine_tune(model, seen, tokenizer.pad_token_id or 0, steps)
            found.append(answer_losses(model.eval(), tokenizer, unseen))
        finally:
            model.unload()
    return torch.cat(found)


def fresh_lora(base: PreTrainedModel, like: Path, seed: int = 0) -> PeftModel:
    """An untrained LoRA of the rank and on the modules of another one."""
    config = LoraConfig.from_pretrained(str(like))
    config.inference_mode = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(base, config)


def fine_tune(model: nn.Module, rows: Sequence[Encoded], pad_id: int, steps: int, rate: float = RATE) -> None:
    """Train what is trainable on answers, a few rows a step in their order, from `rate` down to zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    device = next(model.parameters()).device
    size = min(_BATCH, len(rows))
    model.train()
    for step in range(steps):
        part = [rows[(step * size + number) % len(rows)] for number in range(size)]
        batch: dict[str, Any] = collate([(0, row) for row in part], pad_id)
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "labels")}
        model(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def answer_losses(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]) -> Tensor:
    """Nats per token of each answer, `(rows,)`."""
    respondent, losses = Respondent(model, tokenizer), []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        prompts = [row.input_ids[: row.prompt_length] for row in part]
        answers = [row.input_ids[row.prompt_length :] for row in part]
        scores = respondent.option_scores(prompts, [[answer] for answer in answers])
        losses += [-score / len(answer) for (score,), answer in zip(scores, answers, strict=True)]
    return torch.tensor(losses)
