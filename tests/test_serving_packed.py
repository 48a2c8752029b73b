"""A packed base is the same model, faster; one that cannot be packed is left as it is."""

import pytest
import torch
from engine_cases import save_lora, tiny_base
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from loramux.adapters.lora_folder import read_lora
from loramux.serving.packed import PackedLinear, pack_linears
from loramux.serving.slots import adaptable_linears
from loramux.support.errors import AdapterError

TOKENS = torch.randint(3, 500, (3, 17), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_says_the_same(dtype):
    model = tiny_base()[0].to(dtype)
    plain = logits(model)
    assert pack_linears(model) == len(adaptable_linears(model)) + 1
    torch.testing.assert_close(logits(model), plain, atol=1e-4, rtol=1e-5 if dtype == torch.float32 else 2e-2)


def test_weights_keep_their_shapes_and_embeddings_their_values():
    model, plain = tiny_base()[0], tiny_base()[0]
    pack_linears(model)
    shapes = {name: (weight.shape, weight.dtype) for name, weight in plain.named_parameters()}
    assert {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()}.items() >= shapes.items()
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    for name, linear in adaptable_linears(model).items():
        assert isinstance(linear, PackedLinear)
        assert torch.equal(linear.weight.to_dense(), plain.get_submodule(name).weight)


def test_an_adapter_may_still_carry_a_copy_of_a_packed_weight(tmp_path):
    model = tiny_base()[0]
    head = model.get_output_embeddings().weight.clone()
    weights = save_lora(tmp_path / "lora", model, seed=0) / "adapter_model.safetensors"
    factors = load_file(weights)
    pack_linears(model)
    save_file({**factors, "base_model.model.lm_head.weight": head}, weights)
    assert read_lora(tmp_path / "lora", model).factors
    save_file({**factors, "base_model.model.lm_head.weight": head + 1}, weights)
    with pytest.raises(AdapterError, match="no part of a plain LoRA of this base"):
        read_lora(tmp_path / "lora", model)


def test_biases_are_added():
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    model.transformer.h[0].mlp.c_fc = nn.Linear(32, 128).requires_grad_(False)
    plain = logits(model)
    assert pack_linears(model) == 2  # with the output layer; GPT-2's own are no `nn.Linear`
    torch.testing.assert_close(logits(model), plain)


def test_a_model_that_reads_a_weight_by_itself_is_left_as_it_is():
    config = MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config).eval().requires_grad_(False)
    plain = logits(model)
    assert pack_linears(model) == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert torch.equal(logits(model), plain)


def test_other_precisions_are_left_as_they_are():
    model = tiny_base()[0].to(torch.float64)
    assert pack_linears(model) == 0
