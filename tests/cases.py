"""One row per method. Adding a method means adding its row here; every conformance test then runs over it."""

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loramux.adapters import LoramuxConfig

TASKS = ["who", "where", "when"]

CASES: dict[str, dict] = {
    "alter": {"rank": 4},
    "arrow": {"rank": 4, "top_k": 2},
    "clp": {"rank": 4},
    "comol": {"rank": 4, "experts": 3},
    "distil_gate": {"rank": 4, "hidden": 8},
    "dselect_k": {"rank": 4, "experts": 3, "top_k": 2},
    "hydralora": {"rank": 4, "experts": 3},
    "hyperx": {"rank": 4, "code": 6, "source": 8, "languages": {"who": "en", "where": "en", "when": "de"}},
    "lora": {"rank": 4},
    "loramoe": {"rank": 4, "experts": 4, "knowledge_tasks": ["who"]},
    "loretta": {"rank": 4, "train_rank": 3, "order": 2},
    "madx": {"rank": 4, "language_rank": 4, "languages": {"who": "en", "where": "en", "when": "de"}},
    "mhr": {"rank": 4, "skills": 3, "splits": 4},
    "mixlora": {"rank": 4, "experts": 3, "alpha": 4.0},
    "moa": {"rank": 4},
    "moelora": {"rank": 4, "experts": 3},
    "mola": {"rank": 4, "experts": [2, 4], "top_k": 2},
    "molora": {"rank": 4, "experts": 4, "top_k": 2},
    "mosa": {"rank": 8, "modules": 2},
    "mtl_lora": {"rank": 4, "dropout": 0.0},
    "mtlora": {"rank": 4, "task_rank": 2, "dropout": 0.0},
    "multilora": {"rank": 4, "experts": 3, "dropout": 0.0},
    "palora": {"rank": 4, "shared_rank": 4},
    "poly": {"rank": 4, "skills": 3, "alpha": 4.0},
    "polyhistor": {"rank": 4, "template_width": 8, "code": 6, "hidden": 4},
    "router_retriever": {"rank": 4},
    "scalearn": {"rank": 4},
    "skillnet": {"rank": 4, "skills": {"who": ["a", "b"], "where": ["b"], "when": ["c"]}},
    "smora": {"rank": 16, "top_k": 4, "balance_rate": 1e-3},
    "taps": {"rank": 4},
    "task_aware_moe": {"rank": 4, "experts": 4, "top_k": 2},
    "task_moe": {"rank": 4, "experts": 3},
    "tensorpoly": {"rank": 4, "skills": 3, "order": 2, "alpha": 4.0},
    "tlora": {"rank": 4, "terms": 3, "order": 2, "alpha": 4.0},
    "xlora": {"rank": 4, "router_hidden": 8},
}

# The options at which a method has a single expert that is always fully on: it must then be plain LoRA.
ONE_EXPERT: dict[str, dict] = {
    "alter": {"rank": 4},
    "arrow": {"rank": 4, "top_k": 1},
    "clp": {"rank": 4},
    "comol": {"rank": 4, "experts": 1},
    "distil_gate": {"rank": 4, "hidden": 8},
    "dselect_k": {"rank": 4, "experts": 1, "top_k": 1, "gamma": 1e-3},
    "hydralora": {"rank": 4, "experts": 1},
    "hyperx": {"rank": 4, "code": 6, "source": 8},
    "lora": {"rank": 4},
    "loramoe": {"rank": 4, "experts": 1},
    "loretta": {"rank": 4, "train_rank": 3, "order": 2, "alpha": 4.0},
    "madx": {"rank": 4, "language_rank": 4},
    "mhr": {"rank": 4, "skills": 1, "splits": 4},
    "mixlora": {"rank": 4, "experts": 1, "top_k": 1, "alpha": 4.0},
    "moa": {"rank": 4},
    "moelora": {"rank": 4, "experts": 1},
    "mola": {"rank": 4, "experts": [1], "top_k": 1},
    "molora": {"rank": 4, "experts": 1, "top_k": 1},
    "mosa": {"rank": 4, "modules": 1},
    "mtl_lora": {"rank": 4, "experts": 1, "dropout": 0.0},
    "mtlora": {"rank": 4, "task_rank": 2, "scaling": 1.0, "dropout": 0.0},
    "multilora": {"rank": 4, "experts": 1, "dropout": 0.0},
    "palora": {"rank": 4, "shared_rank": 4},
    "poly": {"rank": 4, "skills": 1, "alpha": 4.0},
    "polyhistor": {"rank": 4, "template_width": 8, "code": 6, "hidden": 4},
    "router_retriever": {"rank": 4},
    "scalearn": {"rank": 4},
    "skillnet": {"rank": 4, "skills": {"only": ["a"]}},
    "smora": {"rank": 4, "top_k": 4, "block_size": 4, "alpha": 4.0},
    "taps": {"rank": 4},
    "task_aware_moe": {"rank": 4, "experts": 1, "top_k": 1},
    "task_moe": {"rank": 4, "experts": 1},
    "tensorpoly": {"rank": 4, "skills": 1, "order": 2, "alpha": 4.0},
    "tlora": {"rank": 4, "terms": 1, "order": 2, "alpha": 4.0},
    "xlora": {"rank": 4},
}


# Methods that mix what the base says after a nonlinearity, with weights that sum to one but for rounding.
MIXES_THE_BASE = {"mixlora"}

# Methods whose routers draw at random in training, and never in evaluation.
RANDOM_IN_TRAINING = {"distil_gate", "mosa", "poly", "task_moe", "xlora"}


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


def with_random_experts(method: str, options: dict | None = None, **config) -> PeftModel:
    """An adapter whose experts are random, and whose routers and cores are as at the start."""
    model = adapted(method, options, **config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bank." in name or "loramux_banks." in name:
                size = 0.1 if ".bank." in name else 0.5
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    batch = a_batch()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **kwargs).logits
