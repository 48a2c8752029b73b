"""What users of PEFT already do, done with our adapters."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from cases import CASES, TASKS, a_batch, adapted, logits, task_of_rows, tiny_llama, train_a_little, trained
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from loramux.adapters import LoramuxConfig
from loramux.support.errors import AdapterError, ConfigError

FRESH_READER = """
import sys, torch
import loramux.adapters
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
ways = {
    "from_pretrained": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter"),
    "low_cpu_mem": lambda: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("base"), "adapter", low_cpu_mem_usage=True
    ),
    "auto_peft": lambda: AutoPeftModelForCausalLM.from_pretrained("adapter"),
}
if sys.argv[1] == "token":
    ways["transformers"] = lambda: _loaded(AutoModelForCausalLM.from_pretrained("base"))
    ways["auto_model"] = lambda: AutoModelForCausalLM.from_pretrained("adapter")
def _loaded(model):
    model.load_adapter("adapter")
    return model
inputs = torch.load("batch.pt", weights_only=True)
with torch.no_grad():
    torch.save({name: load().eval()(**inputs).logits for name, load in ways.items()}, "logits.pt")
"""


@pytest.mark.parametrize(("method", "kind"), [("smora", "token"), ("moa", "prompt")])
def test_a_fresh_process_gets_equal_logits_by_every_way_of_loading(method, kind, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = trained(method)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(tmp_path / "adapter")
    torch.save({key: a_batch()[key] for key in ("input_ids", "attention_mask")}, tmp_path / "batch.pt")
    subprocess.run([sys.executable, "-c", FRESH_READER, kind], check=True, cwd=tmp_path)
    loaded = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert len(loaded) == (5 if kind == "token" else 3)
    for name, value in loaded.items():
        assert torch.equal(value, logits(model)), name


def test_the_saved_folder_holds_every_tensor_of_the_live_adapter(tmp_path):
    model = trained("moa")
    model.save_pretrained(tmp_path)
    saved = load_peft_weights(tmp_path, device="cpu")
    live = {name: p for name, p in model.named_parameters() if "loramux_" in name}
    assert {name.replace(".default.", ".") for name in live} == set(saved)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORAMUX"
    assert config["tasks"] == TASKS
    assert config["options"]["label_loss"] == 1.0  # defaults are written down


def test_disabling_gives_the_base_back():
    model = trained("smora")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(trained("smora").unload()), logits(tiny_llama()))


def test_several_adapters_of_different_methods_live_side_by_side(tmp_path):
    model = trained("moa")
    first = logits(model, routing_tasks="who")
    other = LoramuxConfig(
        method="smora", options=CASES["smora"], tasks=["x"], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model.add_adapter("second", other)
    model.set_adapter("second")
    train_a_little(model, tasks=1)
    second = logits(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert torch.equal(logits(model, routing_tasks="who"), first)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".default." in name for name in trainable)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    again.set_adapter("second")
    assert torch.equal(logits(again.eval()), second)
    again.delete_adapter("second")
    assert torch.equal(logits(again, routing_tasks="who"), first)


def test_two_adapters_active_at_once_add_up():
    model = trained("lora")
    one = logits(model)
    model.add_adapter("zero", LoramuxConfig(method="lora", target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "zero"])
    torch.testing.assert_close(logits(model), one)


def test_rows_of_one_batch_can_name_their_adapters(tmp_path):
    model = trained("moa")
    model.add_adapter(
        "second", LoramuxConfig(method="lora", options={"rank": 4}, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.normal_(std=0.1)
    model.eval()
    batch = a_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    names = ["default", "second", "__base__", "default"]
    mixed = model(**inputs, adapter_names=names, routing_tasks=["who", "who", "who", "where"]).logits
    torch.testing.assert_close(mixed[0], logits(model, routing_tasks="who")[0])
    torch.testing.assert_close(mixed[3], logits(model, routing_tasks="where")[3])
    torch.testing.assert_close(mixed[2], logits(tiny_llama())[2])
    routed = model(**inputs, adapter_names=names).logits
    torch.testing.assert_close(routed[3], logits(model)[3])
    model.set_adapter("second")
    torch.testing.assert_close(mixed[1], logits(model)[1])
    generated = model.generate(inputs["input_ids"], adapter_names=names, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[1], model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)[1])
    with pytest.raises(AdapterError, match="adapter_names names 2 rows, the batch has 4"):
        model(**inputs, adapter_names=["default", "second"])
    with pytest.raises(AdapterError, match="unknown adapter 'third'"):
        model(**inputs, adapter_names=["third"] * 4)
    model.train()
    with pytest.raises(AdapterError, match="works in inference only"):
        model(**inputs, adapter_names=names)


@pytest.mark.parametrize("name", ["0", "layers", "q_proj", "a.b"])
def test_adapter_names_that_make_peft_lose_tensors_are_refused(name):
    config = LoramuxConfig(method="lora", target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match="cannot be an adapter name"):
        get_peft_model(tiny_llama(), config, adapter_name=name)


def test_weights_can_be_swapped_on_the_live_model(tmp_path):
    trained("smora").save_pretrained(tmp_path)
    model = adapted("smora").eval()
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    set_peft_model_state_dict(model, load_peft_weights(tmp_path, device="cpu"))
    assert addresses == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert torch.equal(logits(model), logits(trained("smora")))


def test_injection_without_a_peft_model(tmp_path):
    trained("smora").save_pretrained(tmp_path)
    config = LoramuxConfig(method="smora", options=CASES["smora"], tasks=TASKS, target_modules="all-linear")
    model = inject_adapter_in_model(config, tiny_llama())
    set_peft_model_state_dict(model, load_peft_weights(tmp_path, device="cpu"))
    assert torch.equal(logits(model.eval()), logits(trained("smora")))


def test_targets_can_be_chosen_as_in_lora():
    chosen = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    assert list(adapted("lora", **chosen).base_model.layers()) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert len(adapted("lora", exclude_modules=["k_proj"]).base_model.layers()) == 12
    assert len(adapted("lora", target_modules=None).base_model.layers()) == 4  # PEFT's default for Llama
    with pytest.raises(ValueError, match="nope"):
        adapted("lora", target_modules=["nope"])
    with pytest.raises(AdapterError, match="cannot adapt a Embedding"):
        adapted("lora", target_modules=["embed_tokens"])


def test_configs_survive_copies_and_files(tmp_path):
    config = LoramuxConfig(method="smora", options={"rank": 32}, tasks=TASKS, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    for other in (PeftConfig.from_pretrained(tmp_path), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is LoramuxConfig
        assert other.build() == config.build()
        assert other.peft_type == config.peft_type == "LORAMUX"
    with pytest.raises(AdapterError, match="tasks must be a list of names, got 'who'"):
        LoramuxConfig(method="moa", tasks="who")
    with pytest.raises(AdapterError, match="options a mapping"):
        LoramuxConfig(method="moa", options=[1])
    with pytest.raises(ConfigError, match="must be at most 65536"):
        LoramuxConfig(method="lora", options={"rank": 10**9})
    with pytest.raises(ConfigError, match="must be finite"):
        LoramuxConfig(method="lora", options={"alpha": float("inf")})
    with pytest.raises(AdapterError, match="different names"):
        LoramuxConfig(method="lora", tasks=["a", "a"])
    with pytest.raises(ConfigError, match="unknown method"):
        LoramuxConfig(method="lore")


def test_the_prompt_decides_once_and_decoding_keeps_the_decision():
    model = trained("moa")
    prompts = a_batch(rows=3)["input_ids"]
    with model.base_model.collect_statistics() as statistics:
        model.generate(prompts, max_new_tokens=6, do_sample=False)
    assert statistics.layers["prompt"].tokens.sum() == 3
    chosen = model.base_model.context.decisions["default", 0].weights.argmax(-1)
    named = model.generate(prompts, routing_tasks=chosen, max_new_tokens=6, do_sample=False)
    assert torch.equal(named, model.generate(prompts, max_new_tokens=6, do_sample=False))


def test_a_manual_decoding_loop_keeps_the_prompts_decision():
    model = trained("moa")
    prompt = a_batch(rows=2)["input_ids"]
    with torch.no_grad():
        first = model(input_ids=prompt, use_cache=True)
        decision = model.base_model.context.decisions["default", 0].weights.clone()
        model(input_ids=prompt[:, :1], past_key_values=first.past_key_values, use_cache=True)
    assert torch.equal(model.base_model.context.decisions["default", 0].weights, decision)


def test_a_row_that_is_all_answer_is_read_whole_so_the_router_still_learns():
    model = adapted("moa")
    model.train()
    ids = a_batch()["input_ids"]
    model(input_ids=ids, labels=ids, routing_tasks=task_of_rows()).loss.backward()
    assert model.base_model.loramux_routers.default["0"].scorer.weight.grad.abs().sum() > 0


def test_autocast_does_not_blur_the_routing():
    router = next(trained("smora").base_model.routers())
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x, None).weights, router(x, None).weights.float())
        scores = router.scorer(x, None)
    assert torch.equal(scores, router.scorer(x, None))


def test_left_padding_and_answers_do_not_reach_the_prompt_router():
    model = trained("moa")
    ids = a_batch(rows=1)["input_ids"]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    model(input_ids=ids)
    plain = model.base_model.context.decisions["default", 0].weights.clone()
    scores = []
    for call in ({"input_ids": padded, "attention_mask": mask}, {"input_ids": ids}):
        scores.append(model.base_model._pool_prompt(call["input_ids"], call, None))
    torch.testing.assert_close(*scores)
    labels = ids.clone()
    labels[:, :5] = -100
    changed = ids.clone()
    changed[:, 5:] = 7
    pooled = [model.base_model._pool_prompt(x, {"labels": labels}, None) for x in (ids, changed)]
    torch.testing.assert_close(*pooled)
    assert plain.sum() == 1


def test_the_prompt_router_learns_the_labels_and_its_loss_never_touches_the_experts():
    model = adapted("moa", {**CASES["moa"], "label_loss": 10.0})
    hub = model.base_model
    hub.set_stage(hub.stages[1])
    model.train()
    batch = a_batch()
    model(**batch, routing_tasks=task_of_rows())
    hub.auxiliary_loss().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"base_model.loramux_routers.default.0.scorer.weight"}
    hub.set_stage(hub.stages[0])
    model(**batch, routing_tasks=task_of_rows())
    assert hub.auxiliary_loss().item() == 0  # stage one has no router


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("nobody", "unknown task 'nobody'"),
        (["who", "where"], "names 2 rows, the batch has 4"),
        (torch.tensor([9] * 4), "task id 9 is outside"),
    ],
)
def test_wrong_tasks_are_refused_before_the_model_runs(tasks, message):
    with pytest.raises(AdapterError, match=message):
        logits(trained("moa"), routing_tasks=tasks)


def test_calling_past_the_hub_says_what_to_do():
    with pytest.raises(AdapterError, match="call the PEFT model"):
        logits(adapted("moa").base_model.model)
    with pytest.raises(AdapterError, match="method 'moa' needs a task_type"):
        adapted("moa", task_type=None)


def test_padding_on_the_left_does_not_change_what_an_absolute_position_model_shows_the_router():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    config = LoramuxConfig(method="moa", tasks=TASKS, target_modules=["c_attn"], task_type="CAUSAL_LM")
    hub = get_peft_model(base, config).base_model
    ids = a_batch(rows=1)["input_ids"]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    pooled = [hub._pool_prompt(x, {"attention_mask": (x != 0).long()}, None) for x in (ids, padded)]
    torch.testing.assert_close(*pooled)


def test_reentrant_checkpointing_would_lose_the_auxiliary_loss_and_is_refused():
    model = adapted("molora")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model.train()
    with pytest.raises(AdapterError, match="use_reentrant"):
        model(**a_batch())


@pytest.mark.parametrize("method", ["smora", "moa"])
def test_torch_compile_takes_an_adapted_layer_as_one_graph(method):
    model = trained(method)
    logits(model, routing_tasks=task_of_rows())  # leaves the routing of this batch in the context
    layer = model.base_model.layers()["model.layers.0.mlp.up_proj"]
    x = torch.randn(4, 10, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_a_compiled_model_gives_equal_logits():
    model = trained("smora")
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), expected, atol=1e-5, rtol=1e-5)


def test_trainer_saves_resumes_and_gets_the_auxiliary_loss(tmp_path):
    batch = a_batch(rows=16)
    rows = {"input_ids": batch["input_ids"].tolist(), "labels": batch["input_ids"].tolist()}
    data = Dataset.from_dict({**rows, "routing_tasks": task_of_rows(16).tolist()})

    def run(steps: int, resume: bool) -> torch.Tensor:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False, logging_strategy="no", learning_rate=1e-2, seed=0,
            lr_scheduler_type="constant",
        )  # fmt: skip
        model = adapted("molora")
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        assert model.base_model.context.layer_losses  # the balance loss took part
        return logits(model.eval())

    straight = run(4, resume=False)
    torch.testing.assert_close(run(4, resume=f"{tmp_path}/checkpoint-2"), straight)


def steps(model: PeftModel, count: int, **batch) -> list[float]:
    """Losses of a few steps with one fixed dropout mask."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_a_sequence_classifier_on_an_encoder_trains_through_the_same_skin(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=64, num_labels=3, **sizes)
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    state = copy.deepcopy(base.state_dict())
    ours = {"method": "moa", "options": {"rank": 4}, "tasks": TASKS, "target_modules": ["query", "value"]}
    model = get_peft_model(base, LoramuxConfig(**ours, task_type="SEQ_CLS"))
    batch = a_batch(rows=6)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    losses = steps(model, 20, **inputs, labels=torch.arange(6) % 3, routing_tasks=task_of_rows(6))
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    fresh = BertForSequenceClassification(config)
    fresh.load_state_dict(state)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_an_encoder_decoder_trains_and_generates_through_the_same_skin():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, **tokens))
    ours = {"method": "moa", "options": {"rank": 4}, "tasks": TASKS, "target_modules": ["q", "v"]}
    model = get_peft_model(base, LoramuxConfig(**ours, task_type="SEQ_2_SEQ_LM"))
    batch = a_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    losses = steps(model, 20, **inputs, labels=batch["input_ids"][:, :4].contiguous(), routing_tasks=task_of_rows())
    assert losses[-1] < losses[0]
    assert model.generate(**inputs, num_beams=2, max_new_tokens=4).shape[0] == 4


def test_gpt2s_transposed_linears_are_adapted_and_merged():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    reference = logits(base)
    model = get_peft_model(
        base, LoramuxConfig(method="lora", options={"rank": 4}, target_modules=["c_attn"], task_type="CAUSAL_LM")
    )
    assert torch.equal(logits(model.eval()), reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loramux_" in name:
                parameter.normal_(std=0.1)
    routed = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), routed, atol=1e-5, rtol=1e-5)
