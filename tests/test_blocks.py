"""Experts through the feed-forward blocks of the frozen model (MixLoRA): what they compute, and how PEFT sees them."""

import copy
import json

import pytest
import torch
from cases import CASES, TASKS, a_batch, adapted, logits, task_of_rows, tiny_llama, train_a_little, trained
from peft import PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from loramux.adapters import (
    BaseIdentity,
    BranchConfig,
    Dense,
    ExportConfig,
    Linear,
    LoramuxConfig,
    MethodConfig,
    count_parameters,
    export_task,
    method_config,
)
from loramux.adapters.blocks import Block, LoramuxBlock, feed_forward_blocks
from loramux.adapters.fit import fit_factors
from loramux.routing import Argmax, RouterConfig, Softmax, TaskTable, TokenLinear
from loramux.support.errors import AdapterError, ConfigError, ExportRefused

MLP = "model.layers.0.mlp"
SMALL = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def t5():
    torch.manual_seed(0)
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, **tokens)).eval()


def mixlora(base, **config):
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(base, LoramuxConfig(method="mixlora", options=CASES["mixlora"], tasks=TASKS, **settings))


def block_of(model):
    return next(module for module in model.modules() if isinstance(module, LoramuxBlock))


def second(method="lora", **config):
    return LoramuxConfig(
        method=method,
        options={"rank": 4},
        **{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config},
    )


def randomise(model, adapter):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.normal_(std=0.1)


# ------------------------------------------------------------------ what they compute


def test_a_token_goes_through_the_whole_block_once_per_chosen_expert():
    model = trained("mixlora")
    block, base = block_of(model), tiny_llama().model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    router = model.base_model.layers()[f"{MLP}.gate_proj"].branches("default")[0].router
    weights = router(x, None).weights
    assert (weights.count_nonzero(-1) == 2).all()
    expected = torch.zeros_like(x)
    for expert in range(3):
        host = copy.deepcopy(base)
        for name in ("gate_proj", "up_proj", "down_proj"):
            bank = model.base_model.layers()[f"{MLP}.{name}"].branches("default")[0].bank
            getattr(host, name).weight.data += bank.up[expert].T @ bank.down[expert]
        expected += weights[..., expert : expert + 1] * host(x)
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=1e-5)


def test_only_the_block_has_experts_and_one_of_its_linears_its_router():
    layers = adapted("mixlora").base_model.layers()
    for name, layer in layers.items():
        (branch,) = layer.branches("default")
        assert branch.config.bank.experts == (3 if ".mlp." in name else 1)
        assert (branch.router is not None) == name.endswith("mlp.gate_proj")


def test_balance_is_asked_for_and_use_is_counted_once_per_block():
    model = adapted("mixlora", {**CASES["mixlora"], "balance_loss": 1.0})
    model.train()
    with model.base_model.collect_statistics() as statistics:
        model(**a_batch(), routing_tasks=task_of_rows())
    assert len(model.base_model.context.layer_losses) == 2
    assert 0.9 < model.base_model.auxiliary_loss().item() < 1.5  # one where the load is even
    assert set(statistics.layers) == {MLP, "model.layers.1.mlp"}
    assert statistics.layers[MLP].tokens.sum() == 38  # padding does not count


def test_without_adapters_the_block_is_the_block_of_the_base():
    model, base = trained("mixlora"), logits(tiny_llama())
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    with model.base_model.bypassed():
        assert torch.equal(logits(model), base)
    assert block_of(model).act_fn is block_of(model).routed_block.act_fn
    with pytest.raises(AttributeError, match="nothing"):
        _ = block_of(model).nothing


def test_experts_of_tasks_can_train_alone():
    model = adapted("mixlora", {**CASES["mixlora"], "experts": 3})
    hub = model.base_model
    alone = hub.stages[0].__class__(name="experts", train=("experts",), route="task")
    hub.set_stage(alone)
    model.train()
    model(**a_batch(), routing_tasks="where").loss.backward()
    bank = hub.layers()[f"{MLP}.up_proj"].branches("default")[0].bank
    assert [gradient.abs().sum() > 0 for gradient in bank.up.grad] == [False, True, False]


# ------------------------------------------------------------------ where blocks are found


def test_blocks_are_found_by_what_they_hold():
    found = feed_forward_blocks(tiny_llama())
    assert set(found.values()) == {Block(MLP, 32), Block("model.layers.1.mlp", 32)}
    assert len(found) == 6
    assert set(feed_forward_blocks(gpt2()).values()) == {Block(f"transformer.h.{i}.mlp", 32) for i in range(2)}
    halves = (("encoder", 1), ("decoder", 2))
    in_t5 = {f"{half}.block.{i}.layer.{place}.DenseReluDense" for half, place in halves for i in range(2)}
    assert {block.name for block in feed_forward_blocks(t5()).values()} == in_t5
    assert feed_forward_blocks(nn.Module()) == {}
    assert feed_forward_blocks(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})) == {}
    wrapped = adapted("mixlora").base_model
    assert wrapped.blocks == found


@pytest.mark.parametrize(
    "base",
    [
        BertForSequenceClassification(BertConfig(**SMALL, num_labels=2)),
        OPTForCausalLM(OPTConfig(**SMALL, word_embed_proj_dim=16, ffn_dim=8)),
        MambaForCausalLM(MambaConfig(**SMALL)),
    ],
    ids=lambda base: type(base).__name__,
)
def test_models_without_a_module_for_it_and_mixers_of_tokens_have_none_and_are_refused(base):
    assert feed_forward_blocks(base) == {}
    with pytest.raises(AdapterError, match="method 'mixlora' sends tokens through experts'"):
        mixlora(base, task_type=None, excess_rank=True)  # Mamba has linears of rank one


@pytest.mark.parametrize(("base", "task_type"), [(gpt2, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
def test_other_architectures_train_and_generate(base, task_type):
    model = mixlora(base(), task_type=task_type)
    batch = a_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["input_ids"][:, :4].contiguous() if task_type == "SEQ_2_SEQ_LM" else batch["labels"]
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.eval().generate(**inputs, num_beams=2, max_new_tokens=4).shape[0] == 4


# ------------------------------------------------------------------ how PEFT sees them


def test_tensors_are_saved_by_the_names_they_have_in_the_base(tmp_path):
    model = trained("mixlora")
    model.save_pretrained(tmp_path)
    saved = load_peft_weights(tmp_path, device="cpu")
    assert f"base_model.model.{MLP}.up_proj.loramux_branches.0.bank.up" in saved
    assert not any("routed_block" in name for name in saved)
    assert len(saved) == sum("loramux_" in name for name, _ in model.named_parameters())


def test_adapters_join_and_leave_a_model_with_wrapped_blocks(tmp_path):
    model = trained("mixlora")
    first = logits(model)
    model.add_adapter("second", second())
    model.add_adapter("third", second("molora", tasks=["x"]))
    for name in ("second", "third"):
        randomise(model, name)
    assert torch.equal(logits(model), first)
    model.set_adapter("third")
    third = logits(model.eval())
    model.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "second" / "adapter_config.json").read_text())["target_modules"]
    assert not any("routed_block" in name for name in names)
    alone = PeftModel.from_pretrained(tiny_llama(), tmp_path / "third").eval()
    assert torch.equal(logits(alone), third)
    alone.load_adapter(tmp_path, "mix")
    alone.set_adapter("mix")
    assert torch.equal(logits(alone), first)
    alone.set_adapter("default")
    assert torch.equal(logits(alone), third)
    alone.delete_adapter("mix")
    assert not any(isinstance(module, LoramuxBlock) for module in alone.modules())
    assert torch.equal(logits(alone), third)


def test_a_plain_lora_beside_it_runs_in_every_expert():
    model = trained("mixlora")
    model.add_adapter("second", second())
    randomise(model, "second")
    model.base_model.set_adapter(["default", "second"])
    both = logits(model.eval())
    with torch.no_grad():
        for layer in model.base_model.layers().values():  # the plain one goes into the base instead
            layer.get_base_layer().weight += layer.get_delta_weight("second")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)


def test_merging_is_refused_before_anything_is_merged_and_unloading_leaves_the_base():
    model = trained("mixlora")
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match="routes every token by itself"):
            merge()
        assert torch.equal(logits(model), before)
    base = model.unload()
    assert [name for name, _ in base.named_modules()] == [name for name, _ in tiny_llama().named_modules()]
    assert torch.equal(logits(base), logits(tiny_llama()))


def test_a_copy_of_the_model_routes_by_its_own_router():
    model = trained("mixlora")
    before = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), before)
    randomise(copied, "default")
    assert not torch.equal(logits(copied), before)
    assert torch.equal(logits(model), before)


def test_what_a_block_cannot_do_is_refused():
    model = trained("mixlora")
    ids = a_batch()["input_ids"]
    with pytest.raises(AdapterError, match="adapter_names cannot mix it with others"):
        model(input_ids=ids, adapter_names=["default", "__base__", "default", "default"])
    model.add_adapter("again", second("mixlora", tasks=TASKS))
    model.add_adapter("tasks", second("moa", tasks=TASKS))
    for other in ("again", "tasks"):
        model.base_model.set_adapter(["default", other])
        with pytest.raises(AdapterError, match="must be the only routed one that is active"):
            logits(model, routing_tasks="who")
    model.set_adapter("default")
    with pytest.raises(AdapterError, match=r"up_proj: adapter 'default' routes the feed-forward block around this lin"):
        block_of(model).up_proj(torch.randn(1, 2, 32))
    with pytest.raises(AdapterError, match="takes more than one input"):
        block_of(model)(torch.randn(1, 2, 32), 0.5)
    block_of(model).routed_block.forward = lambda x: (x, x)
    with pytest.raises(AdapterError, match="says more than one tensor"):
        logits(model)


def test_settings_without_meaning_are_refused():
    through = RouterConfig(scorer=TokenLinear(), normaliser=Softmax(), per_block=True)
    by_task = RouterConfig(scorer=TaskTable(), normaliser=Softmax())
    with pytest.raises(ValueError, match="belong to in_blocks"):
        MethodConfig(branches=(BranchConfig(bank=Dense(experts=2), router=through),))
    with pytest.raises(ValueError, match="routed by the block's router or not at all"):
        MethodConfig(branches=(), in_blocks=(BranchConfig(bank=Dense(experts=2), router=by_task),))
    with pytest.raises(ValueError, match="decides token by token, and for that block alone"):
        RouterConfig(scorer=TaskTable(), normaliser=Argmax(), per_block=True)
    with pytest.raises(ConfigError, match=r"top_k \(=3\) must be at most experts \(=2\)"):
        method_config("mixlora", tasks=TASKS, options={"experts": 2, "top_k": 3})
    with pytest.raises(ValueError, match="no adapted linear stands in one"):
        count_parameters(method_config("mixlora", tasks=TASKS), [Linear(32, 48)], tasks=3, hidden_size=32)


def test_parameters_are_those_of_the_experts_and_one_router_per_block():
    config = method_config("mixlora", tasks=TASKS, options=CASES["mixlora"])
    block = Block(MLP, 32)
    linears = [Linear(32, 32), Linear(32, 48, block=block), Linear(32, 48, block=block), Linear(48, 32, block=block)]
    assert count_parameters(config, linears, tasks=3, hidden_size=32) == 4 * 64 + 3 * 3 * 4 * 80 + 3 * 32


# ------------------------------------------------------------------ exports


def batches(count, rows=32):
    return [a_batch(rows=rows, seed=seed) for seed in range(100, 100 + count)]


def test_a_fit_weighs_what_an_expert_does_by_how_much_it_counts():
    """The delta of a linear is fitted to the mean over the experts of every token, padding left out."""
    model = trained("mixlora")
    hub, seen = model.base_model, batches(2)
    sums = {}

    def observe(layer, x, delta, counts):
        if layer == f"{MLP}.gate_proj":
            weight = counts.unsqueeze(-1)
            sums["x"] = sums.get("x", 0) + (weight * x).sum((0, 1))
            sums["delta"] = sums.get("delta", 0) + (weight * delta).sum((0, 1))
            sums["count"] = sums.get("count", 0) + counts.sum()

    with hub.observing(observe), torch.no_grad():
        for batch in seen:
            hub(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert sums["count"].item() == pytest.approx(2 * (32 * 10 - 2), rel=1e-4)
    pair = fit_factors(hub, "who", seen, rank=32)[f"{MLP}.gate_proj"]
    assert torch.nn.functional.cosine_similarity(pair.delta() @ sums["x"], sums["delta"], dim=0) > 0.9


def test_an_export_is_measured_and_refused_or_written_as_a_lora_that_others_read(tmp_path):
    model = trained("mixlora")
    arguments = {"base": BaseIdentity("somebody/tiny-base", "abc"), "calibration": batches(4), "held_out": batches(4)}
    strict = ExportConfig(max_kl=1e-9, distil_steps=0)
    with pytest.raises(ExportRefused, match="nats per token is over the bound"):
        export_task(model, "who", tmp_path / "strict", settings=strict, **arguments)
    report = export_task(model, "who", tmp_path / "who", allow_lossy=True, **arguments)
    assert report.fidelity.token_kl < 0.75 * report.fidelity.base_kl
    config = json.loads((tmp_path / "who" / "adapter_config.json").read_text())
    assert {"gate_proj", "q_proj"} <= set(config["target_modules"])
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "who").eval()
    held = arguments["held_out"][0]
    with torch.no_grad():
        ours = model(input_ids=held["input_ids"], attention_mask=held["attention_mask"]).logits
        theirs = stock(input_ids=held["input_ids"], attention_mask=held["attention_mask"]).logits
        plain = tiny_llama()(input_ids=held["input_ids"], attention_mask=held["attention_mask"]).logits
    assert (theirs - ours).norm() < (plain - ours).norm()
    assert load_file(tmp_path / "who" / "adapter_model.safetensors")


def test_training_moves_the_router_by_what_the_experts_say():
    model = trained("mixlora", {**CASES["mixlora"], "balance_loss": 0.0})
    router = next(model.base_model.routers())
    before = router.scorer.weight.detach().clone()
    train_a_little(model)
    assert not torch.equal(router.scorer.weight, before)
