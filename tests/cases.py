"""One row per method. Adding a method means adding its row here; every conformance test then runs over it."""

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loramux.adapters import LoramuxConfig

TASKS = ["who", "where", "when"]

CASES: dict[str, dict] = {
    "hydralora": {"rank": 4, "experts": 3},
    "lora": {"rank": 4},
    "moa": {"rank": 4},
    "molora": {"rank": 4, "experts": 4, "top_k": 2},
    "multilora": {"rank": 4, "experts": 3, "dropout": 0.0},
    "smora": {"rank": 16, "top_k": 4, "balance_rate": 1e-3},
}

# The options at which a method has a single expert that is always fully on: it must then be plain LoRA.
ONE_EXPERT: dict[str, dict] = {
    "hydralora": {"rank": 4, "experts": 1},
    "lora": {"rank": 4},
    "moa": {"rank": 4},
    "molora": {"rank": 4, "experts": 1, "top_k": 1},
    "multilora": {"rank": 4, "experts": 1, "dropout": 0.0},
    "smora": {"rank": 4, "top_k": 4, "block_size": 4, "alpha": 4.0},
}


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers with grouped-query attention, so that projections have different shapes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(method: str, options: dict | None = None, tasks: list[str] | None = None, **config) -> PeftModel:
    """A tiny base with `method` on all its linears."""
    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    config = LoramuxConfig(
        method=method,
        options=CASES[method] if options is None else options,
        tasks=list(TASKS if tasks is None else tasks),
        **settings,
    )
    return get_peft_model(tiny_llama(), config)


def a_batch(rows: int = 4, tokens: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, the second half of which is the answer, with padding at the end of the last row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def task_of_rows(rows: int = 4, tasks: int = len(TASKS)) -> torch.Tensor:
    return torch.arange(rows) % tasks


def train_a_little(model: PeftModel, steps: int = 3, tasks: int = len(TASKS), lr: float = 1e-2) -> list[float]:
    """A few optimiser steps on one batch; returns the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**a_batch(), routing_tasks=task_of_rows(tasks=tasks)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.finish_step()
        losses.append(loss.item())
    model.eval()
    return losses


def trained(method: str, options: dict | None = None, **config) -> PeftModel:
    """An adapter whose every part has moved away from its initial value."""
    model = adapted(method, options, **config)
    train_a_little(model, tasks=len(model.base_model.tasks) or 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loramux_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    batch = a_batch()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **kwargs).logits
