"""Adapters on disk for the tiny Llama, and a store for them."""

from pathlib import Path

import torch
from cases import tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from loramux.serving.factors import FactorLayout
from loramux.serving.slots import layout_of
from loramux.serving.store import AdapterStore, StoreLimits

BASE_NAMES = ("somebody/tiny",)


def write_lora(folder: Path, seed: int = 0, rank: int = 4, **options) -> Path:
    """An adapter by stock PEFT, random in A and B."""
    settings = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    base = tiny_llama()
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=rank, **settings))
    model.peft_config["default"].base_model_name_or_path = BASE_NAMES[0]
    model.save_pretrained(folder)
    return folder


def make_store(root: Path, base: LlamaForCausalLM | None = None, **limits) -> AdapterStore:
    base = tiny_llama() if base is None else base
    return AdapterStore(layout_of(base), base, BASE_NAMES, [root], StoreLimits(**limits))


def deltas(layout: FactorLayout, flat: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """What factors in memory add to each linear, `(out_features, in_features)`."""
    return {
        name: ups[index].T @ downs[index]
        for group, downs, ups in layout.views(flat, rank)
        for index, name in enumerate(group.names)
    }
