"""Routers that read a pass of the frozen base first (X-LoRA): what they see, with and without a cache."""

import copy

import pytest
import torch
from cases import CASES, TASKS, a_batch, adapted, logits, task_of_rows, tiny_llama, train_a_little, trained
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from loramux.adapters import LoramuxConfig
from loramux.support.errors import AdapterError, ConfigError

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def mistral():
    """A decoder whose cache forgets all but the last four tokens."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4, head_dim=8)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def scrambled(base, task_type="CAUSAL_LM", targets="all-linear"):
    """A base under X-LoRA whose experts and router are random and large."""
    config = LoramuxConfig(
        method="xlora", options=CASES["xlora"], tasks=TASKS, target_modules=targets, task_type=task_type
    )
    torch.manual_seed(1)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loramux_" in name:
                parameter.normal_(std=1.0 if "routers" in name else 0.2)
    return model


def left_padded():
    ids = a_batch(rows=3)["input_ids"].clone()
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def scales(model):
    """`(layers, batch, tokens, experts)` of the last call."""
    return torch.stack([decision.weights for decision in model.base_model.context.layer_decisions.values()])


@pytest.mark.parametrize("base", [tiny_llama, gpt2, mistral])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generating_with_a_cache_says_what_generating_without_one_says(base, settings):
    model = scrambled(base())
    cached = model.generate(**left_padded(), **GREEDY, **settings, use_cache=True)
    assert torch.equal(cached, model.generate(**left_padded(), **GREEDY, **settings, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**left_padded(), **GREEDY, **settings))


@pytest.mark.parametrize("base", [tiny_llama, gpt2, mistral])
@torch.no_grad()
def test_decoding_by_hand_step_by_step_or_in_pieces_sees_the_whole_sequence(base):
    model = scrambled(base())
    ids = a_batch(rows=2)["input_ids"]
    whole = model(input_ids=ids).logits
    for pieces in ([4, 1, 1, 1, 1, 1, 1], [3, 5, 2]):
        cache, said = None, []
        for piece in ids.split(pieces, dim=1):
            step = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            said.append(step.logits)
        torch.testing.assert_close(torch.cat(said, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_copies_of_a_cache_and_cut_ones_keep_what_the_base_has_read():
    model = scrambled(tiny_llama())
    ids = a_batch(rows=2)["input_ids"]
    prompt = model(input_ids=ids[:, :6], use_cache=True).past_key_values
    prompt.crop(-2)
    copied = copy.deepcopy(prompt)
    copied.batch_repeat_interleave(2)
    step = model(input_ids=ids[:, 4:].repeat_interleave(2, 0), past_key_values=copied)
    torch.testing.assert_close(step.logits[::2], model(input_ids=ids).logits[:, 4:], atol=1e-5, rtol=1e-5)
    again = model(input_ids=ids[:, 4:], past_key_values=prompt)  # the copy took nothing from it
    torch.testing.assert_close(again.logits, step.logits[::2], atol=1e-5, rtol=1e-5)


def test_weights_differ_by_token_and_layer_and_come_from_the_base_alone():
    model = scrambled(tiny_llama())
    batch = a_batch()
    logits(model)
    seen = scales(model)
    assert seen.shape == (14, *batch["input_ids"].shape, 3)
    torch.testing.assert_close(seen.sum(-1), torch.ones(seen.shape[:-1]))
    assert seen[:, 0].flatten(0, 1).unique(dim=0).shape[0] == 14 * 10
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bank." in name:
                parameter.normal_()
    logits(model)
    assert torch.equal(scales(model), seen)


def test_the_best_experts_alone_can_act():
    model = adapted("xlora", {**CASES["xlora"], "top_k": 1}).eval()
    logits(model)
    assert (scales(model).count_nonzero(-1) == 1).all()


def test_experts_train_alone_without_a_first_pass_and_then_the_router_alone():
    model = adapted("xlora")
    hub, passes = model.base_model, []
    model.base_model.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    first, second = hub.stages
    hub.set_stage(first)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_a_little(model, steps=2)
    assert len(passes) == 2
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".bank." in name for name in moved)
    hub.finish_stage(first, prompts=list)
    hub.set_stage(second)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_a_little(model, steps=2)
    assert len(passes) == 2 + 4
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("loramux_routers" in name for name in moved)


def test_the_first_pass_neither_trains_nor_leaves_the_model_changed():
    model = adapted("xlora")
    model.train()
    modes = [module.training for module in model.modules()]
    model(**a_batch(), routing_tasks=task_of_rows()).loss.backward()
    assert [module.training for module in model.modules()] == modes
    assert not any(model.base_model.model._forward_pre_hooks or model.base_model.model._forward_hooks)
    assert not model.base_model.context.bypass


def test_an_encoder_and_a_model_without_a_head_are_read_first_too():
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
    bert = scrambled(bert, task_type="SEQ_CLS", targets=["query", "value"])
    inputs = {key: a_batch()[key] for key in ("input_ids", "attention_mask")}
    assert bert(**inputs).logits.shape == (4, 3)
    assert scales(bert).shape[1:] == (4, 10, 3)
    torch.manual_seed(0)
    bare = scrambled(LlamaModel(tiny_llama().config), task_type="FEATURE_EXTRACTION")
    whole = bare(**inputs).last_hidden_state
    first = bare(input_ids=inputs["input_ids"][:, :7], use_cache=True)
    rest = bare(input_ids=inputs["input_ids"][:, 7:], past_key_values=first.past_key_values).last_hidden_state
    torch.testing.assert_close(rest[:3], whole[:3, 7:], atol=1e-5, rtol=1e-5)


def test_rows_of_a_mixed_batch_are_weighted_by_their_own_tokens():
    model = scrambled(tiny_llama())
    model.add_adapter(
        "second", LoramuxConfig(method="lora", options={"rank": 4}, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.eval()
    names = ["second", "default", "__base__", "default"]
    mixed = logits(model, adapter_names=names)
    alone = logits(model)
    for row in (1, 3):
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[2], logits(tiny_llama())[2])
    said = model.generate(a_batch()["input_ids"], adapter_names=names, num_beams=2, **GREEDY)
    assert torch.equal(said[3], model.generate(a_batch()["input_ids"], num_beams=2, **GREEDY)[3][: said.shape[1]])


@torch.no_grad()
def test_what_the_base_has_not_read_and_caches_it_cannot_use_are_refused():
    model = scrambled(tiny_llama())
    ids = a_batch(rows=2)["input_ids"]
    with model.base_model.bypassed():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="has not read the tokens in past_key_values; start from the prompt"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(AdapterError, match="got a StaticCache: leave cache_implementation out"):
        model.generate(ids, cache_implementation="static", **GREEDY)


def test_models_and_linears_that_a_first_pass_does_not_fit_are_refused():
    with pytest.raises(AdapterError, match="method 'xlora' needs a task_type"):
        adapted("xlora", task_type=None)
    with pytest.raises(AdapterError, match="call the PEFT model"):
        logits(adapted("xlora").base_model.model)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with pytest.raises(AdapterError, match="an encoder-decoder has tokens of two kinds"):
        scrambled(T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)), task_type="SEQ_2_SEQ_LM")
    head = adapted("xlora", target_modules=["lm_head"]).eval()
    with pytest.raises(AdapterError, match="weights for 40 tokens of the first pass, and this layer sees 4; leave it"):
        logits(head, logits_to_keep=1)


def test_settings_without_meaning_are_refused():
    with pytest.raises(ConfigError, match=r"the router's dropout \(=1.5\) must be in \[0, 1\)"):
        trained("xlora", {"router_dropout": 1.5})
    with pytest.raises(ConfigError, match=r"router_share \(=1.0\) must be between 0 and 1"):
        trained("xlora", {"router_share": 1.0})
