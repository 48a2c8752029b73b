"""Logits at answer positions only: the same loss and gradients as the full computation, on every kind of model."""

import os
from pathlib import Path

import pytest
import torch
from cases import CASES, a_batch, adapted, task_of_rows, tiny_llama, trained
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from loramux.support.errors import ConfigError
from loramux.training.answer_logits import IGNORED, Objective, locate_answers, sum_by_task, task_weights

SHARED = Path(os.environ.get("LORAMUX_SHARED", Path(__file__).parents[2] / "shared")) / "models"


def bert() -> BertLMHeadModel:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    config.is_decoder, config.hidden_dropout_prob, config.attention_probs_dropout_prob = True, 0.0, 0.0
    return BertLMHeadModel(config)


def gpt2() -> GPT2LMHeadModel:
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, **drops))


MODELS = {"llama": tiny_llama, "bert": bert, "gpt2 (tied)": gpt2}


def loss_by_answers(model: torch.nn.Module, batch: dict, **routing: torch.Tensor) -> torch.Tensor:
    answers = locate_answers(batch["labels"])
    objective = Objective(model)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **routing}
    weights = torch.full((len(answers.targets),), 1 / len(answers.targets))
    losses = objective(inputs, batch["labels"], answers, weights, 1.0)
    objective.release()
    return losses.total


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_loss_and_gradients_equal_those_of_full_logits(build) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.train()
    batch = a_batch()
    full = model(**batch).loss
    full.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = loss_by_answers(model, batch)
    ours.backward()
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-5)
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["stories260K", "minilm-l6-causal"])
def test_loss_equals_that_of_full_logits_on_pretrained_models(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("the pretrained development models are not here")
    model = AutoModelForCausalLM.from_pretrained(SHARED / name, dtype=torch.float32)
    batch = a_batch(rows=4, tokens=40)
    torch.testing.assert_close(loss_by_answers(model, batch), model(**batch).loss, rtol=0, atol=1e-5)


def test_an_encoder_decoder_predicts_its_labels_unshifted() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, **sizes))
    batch = a_batch()
    labels = batch["labels"][:, 4:].contiguous()
    answers = locate_answers(labels, shift=False)
    objective = Objective(model)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    losses = objective(inputs, labels, answers, torch.full((len(answers.rows),), 1 / len(answers.rows)), 0.0)
    torch.testing.assert_close(losses.total, model(**inputs, labels=labels).loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", CASES)
def test_every_method_gets_the_gradients_of_its_own_full_loss(method: str) -> None:
    """Auxiliary losses included, and the router is taught from the prompt alone although no labels are passed."""
    batch, tasks = a_batch(), task_of_rows()
    gradients = []
    for full in (True, False):
        model = adapted(method)
        model.train()
        if full:
            model(**batch, routing_tasks=tasks).loss.backward()
        else:
            mask = (batch["attention_mask"] == 1) & ((batch["labels"] != IGNORED).cumsum(-1) == 0)
            objective = Objective(model, model.base_model)
            answers = locate_answers(batch["labels"])
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            inputs |= {"routing_tasks": tasks, "routing_mask": mask}
            weights = torch.full((len(answers.rows),), 1 / len(answers.rows))
            objective(inputs, batch["labels"], answers, weights, 1.0).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss_by_answers(model, a_batch()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_head_sees_answer_positions_only_and_everything_outside_the_objective() -> None:
    model = tiny_llama()
    batch, seen = a_batch(), []
    objective = Objective(model)
    model.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape)))
    answers = locate_answers(batch["labels"])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    objective(inputs, batch["labels"], answers, torch.ones(len(answers.rows)), 0.0)
    logits = model(**inputs).logits
    assert seen == [(1, len(answers.rows), 32), (4, 10, 32)]
    assert logits.shape == (4, 10, 64)


def test_a_batch_without_answers_gives_zero_loss_and_zero_gradients() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    batch = a_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    answers = locate_answers(batch["labels"])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    losses = Objective(model)(inputs, batch["labels"], answers, torch.ones(0), 0.0)
    losses.total.backward()
    assert losses.total.item() == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_answers_are_predicted_one_position_earlier_and_the_first_token_never() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])
    answers = locate_answers(labels)
    assert answers.positions.tolist() == [1, 2, 6]
    assert answers.targets.tolist() == [7, 8, 9]
    assert answers.rows.tolist() == [0, 0, 1]
    assert locate_answers(labels, shift=False).positions.tolist() == [0, 2, 3, 7]


def test_task_reduction_sums_the_mean_loss_of_every_task() -> None:
    """So an expert that sees one task gets the gradient of a run on that task alone."""
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    tasks = torch.tensor([0, 0, 0, 2])
    counts = sum_by_task(torch.ones(4), tasks, 3)
    assert counts.tolist() == [3, 0, 1]
    assert float((losses * task_weights(counts, "task")[tasks]).sum()) == pytest.approx(2.0 + 10.0)
    assert float((losses * task_weights(counts, "token")[tasks]).sum()) == pytest.approx(losses.mean().item())


def test_every_expert_gets_the_gradient_of_a_run_on_its_task_alone() -> None:
    batch, tasks = a_batch(rows=6), torch.tensor([0, 1, 1, 2, 0, 1])
    model = trained("moa")
    model.base_model.set_stage(model.base_model.stages[0])
    model.train()

    def gradients(rows: torch.Tensor, reduction: str) -> dict[str, torch.Tensor]:
        part = {name: tensor[rows] for name, tensor in batch.items()}
        answers = locate_answers(part["labels"])
        counts = sum_by_task(torch.ones(len(answers.rows)), tasks[rows][answers.rows], 3)
        inputs = {k: part[k] for k in ("input_ids", "attention_mask")} | {"routing_tasks": tasks[rows]}
        objective = Objective(model, model.base_model)
        weights = task_weights(counts, reduction)[tasks[rows][answers.rows]]
        objective(inputs, part["labels"], answers, weights, 1.0).total.backward()
        objective.release()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    together = gradients(torch.arange(6), "task")
    for task in range(3):
        alone = gradients((tasks == task).nonzero().flatten(), "token")
        for name, gradient in alone.items():
            assert float(gradient[task].abs().sum()) > 0
            torch.testing.assert_close(together[name][task], gradient[task], rtol=1e-4, atol=1e-6)


def test_row_sums_are_the_losses_of_each_row() -> None:
    model, batch = tiny_llama(), a_batch()
    answers = locate_answers(batch["labels"])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    sums = Objective(model)(inputs, batch["labels"], answers, torch.ones(len(answers.rows)), 0.0).row_sums
    logits = model(**inputs).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_model_without_an_lm_head_is_refused() -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    with pytest.raises(ConfigError, match="has no output embeddings; training on answers needs a causal"):
        Objective(BertForSequenceClassification(config))
