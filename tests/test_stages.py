"""Stage plans: what trains, on which examples, what happens in between, and that a kill changes nothing of it."""

import json
from pathlib import Path

import pytest
import torch
from cases import CASES, TASKS, a_batch, adapted, task_of_rows, tiny_llama, with_random_experts
from peft import PeftModel
from safetensors.torch import load_file
from training_cases import NOUNS, make_recipe, write_base, write_tasks

from loramux.adapters import StageConfig, method_config
from loramux.support.errors import AdapterError, ConfigError
from loramux.tasks import Encoded, Mixture
from loramux.training.answer_logits import Objective, locate_answers, symmetric_kl
from loramux.training.assess import encode_tasks
from loramux.training.batches import MixtureBatches
from loramux.training.evaluate import evaluate_tasks
from loramux.training.run import TrainedRun, train_run
from loramux.training.schedule import StageSpan, draw_preferences, stage_spans

Tensors = dict[str, torch.Tensor]
ALONE = ["alter", "arrow", "scalearn"]
RESET = ["method.name=task_moe", "method.options={rank: 2, experts: 2, route_share: 0.5}"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("stages")
    return write_base(root / "base"), write_tasks(root / "tasks")


def run_of(places: tuple[Path, Path], folder: Path, *settings: str, **options) -> TrainedRun:
    return train_run(make_recipe(*places, *settings), folder, **{"evaluate": None, **options})


def weights_of(folder: Path) -> Tensors:
    return load_file(folder / "mixture" / "adapter_model.safetensors")


class Snapshots:
    """An evaluation that keeps the adapter as it was after each step."""

    def __init__(self) -> None:
        self.at: dict[int, Tensors] = {}

    def __call__(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        self.at[step] = {n: p.detach().clone() for n, p in model.named_parameters() if "loramux_" in n}
        return {}

    def moved(self, start: int, stop: int) -> set[str]:
        """Which kinds of parameters differ between two steps: `bank`, `router`."""
        names = [n for n, value in self.at[start].items() if not torch.equal(value, self.at[stop][n])]
        return {kind for kind in ("bank", "router") for n in names if f".{kind}" in n}


# ---------------------------------------------------------------------- who trains


@pytest.mark.parametrize("method", ALONE)
def test_experts_that_train_alone_get_the_gradient_of_their_own_task_only(method):
    """And it is that of a plain LoRA in their place, whatever the router would have said."""
    model = with_random_experts(method, CASES[method])
    hub = model.base_model
    hub.set_stage(hub.stages[0])
    model.train()
    batch = a_batch()
    model(**batch, routing_tasks="where").loss.backward()
    plain = with_random_experts("lora", {"rank": 4})
    for layer, own in zip(hub.layers().values(), plain.base_model.layers().values(), strict=True):
        expert, lora = layer.branches("default")[0].bank, own.branches("default")[0].bank
        lora.down.data.copy_(expert.down.data[1:2])
        lora.up.data.copy_(expert.up.data[1:2])
    plain(**batch).loss.backward()
    for layer, own in zip(hub.layers().values(), plain.base_model.layers().values(), strict=True):
        expert, lora = layer.branches("default")[0].bank, own.branches("default")[0].bank
        for stacked, alone in ((expert.down, lora.down), (expert.up, lora.up)):
            torch.testing.assert_close(stacked.grad[1], alone.grad[0])
            assert (stacked.grad[[0, 2]] == 0).all()
    assert all(p.grad is None for router in hub.routers() for p in router.parameters())


def test_rows_of_different_tasks_train_different_experts_side_by_side():
    model = with_random_experts("alter")
    model.base_model.set_stage(model.base_model.stages[0])
    batch, tasks = a_batch(), task_of_rows()
    whole = model(**batch, routing_tasks=tasks).logits
    for row, task in enumerate(tasks):
        alone = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], routing_tasks=task).logits
        torch.testing.assert_close(whole[row], alone[row], atol=1e-5, rtol=1e-5)


def test_routing_by_task_needs_an_expert_for_each():
    hub = adapted("molora").base_model
    with pytest.raises(AdapterError, match="stage 'alone' routes by task, and there are not as many experts as tasks"):
        hub.set_stage(StageConfig(name="alone", route="task"))


@pytest.mark.parametrize(
    ("method", "share", "first", "second"),
    [
        ("alter", "gate_share", {"bank"}, {"bank", "router"}),
        ("scalearn", "scale_share", {"bank"}, {"router"}),
        ("task_moe", "route_share", {"bank", "router"}, {"bank"}),
    ],
)
def test_a_stage_moves_what_it_names_and_nothing_else(places, tmp_path, method, share, first, second):
    seen = Snapshots()
    settings = [f"method.name={method}", f"method.options={{rank: 2, {share}: 0.5}}", "train.eval_every=1"]
    run_of(places, tmp_path / "run", *settings, "train.weight_decay=0.1", "train.steps=6", evaluate=seen)
    assert seen.moved(1, 3) == first
    assert seen.moved(4, 6) == second
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = [stage.name for stage in method_config(method, tasks=TASKS, options={share: 0.5}).stages]
    assert [line["stage"] for line in lines if "stage" in line] == [stages[0], stages[1], stages[1]]


def test_a_router_that_is_frozen_draws_nothing_at_random():
    model = with_random_experts("task_moe", {"rank": 4, "route_share": 0.5})
    hub = model.base_model
    batch = a_batch()

    def logits() -> torch.Tensor:
        return model(input_ids=batch["input_ids"], routing_tasks=task_of_rows()).logits

    settled = logits()
    model.train()
    hub.set_stage(hub.stages[0])
    assert not torch.equal(logits(), settled)
    hub.set_stage(hub.stages[1])
    assert torch.equal(logits(), settled)


# ---------------------------------------------------------------------- what happens in between


def test_experts_start_anew_between_stages_and_routes_stay(places, tmp_path):
    seen = Snapshots()
    run_of(places, tmp_path / "run", *RESET, "train.eval_every=1", "train.learning_rate=0.02", evaluate=seen)
    up = next(name for name in seen.at[4] if name.endswith("mlp.down_proj.loramux_branches.default.0.bank.up"))
    grown, anew = seen.at[4][up].abs().max(), seen.at[5][up].abs().max()
    assert anew == pytest.approx(0.02, rel=1e-3)  # one step of Adam away from zero
    assert grown > 2 * anew
    assert seen.moved(4, 5) == {"bank"}


@pytest.fixture(scope="module")
def retriever(places, tmp_path_factory) -> TrainedRun:
    folder = tmp_path_factory.mktemp("retriever") / "run"
    return run_of(places, folder, "method.name=router_retriever", evaluate="validation")


def test_prompts_find_the_expert_of_their_task_without_any_training_of_the_router(retriever):
    scores = evaluate_tasks(retriever.model, retriever.tokenizer, encode_tasks(retriever), routing="auto", title=None)
    assert [found["routing_accuracy"] for found in scores.values()] == [1.0, 1.0, 1.0]


def test_prompt_prototypes_are_the_mean_prompts_of_the_tasks(retriever):
    hub, tokenizer = retriever.model.base_model, retriever.tokenizer
    directions = next(iter(hub.routers())).scorer.directions
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3))
    for task, direction in zip(encode_tasks(retriever), directions, strict=True):
        prompts = [torch.tensor([row.input_ids[: row.prompt_length]]) for row in task.splits["train"]]
        with retriever.model.disable_adapter(), torch.no_grad():
            hidden = [hub.model.model(input_ids=prompt).last_hidden_state[0].mean(0) for prompt in prompts]
        mean = sum(h / h.norm() for h in hidden)
        torch.testing.assert_close(direction, mean / mean.norm(), atol=1e-5, rtol=1e-4)
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize("method", ["router_retriever", "arrow"])
def test_prototypes_are_saved_with_the_adapter_and_loaded_by_stock_peft(method, tmp_path):
    model = with_random_experts(method)
    hub = model.base_model
    batch = {**a_batch(), "routing_tasks": task_of_rows(), "routing_mask": a_batch()["attention_mask"]}
    hub.finish_stage(hub.stages[-1], lambda: [batch])
    fitted = {n: b for n, b in model.named_buffers() if n.endswith("directions")}
    assert fitted
    assert all((buffer.norm(dim=-1) - 1).abs().max() < 1e-5 for buffer in fitted.values())
    model.eval().save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path, **options)
        buffers = dict(again.named_buffers())
        assert all(torch.equal(buffers[name], buffer) for name, buffer in fitted.items())
        assert torch.equal(
            again(input_ids=batch["input_ids"]).logits, model.eval()(input_ids=batch["input_ids"]).logits
        )


def test_token_prototypes_are_the_first_right_singular_vectors_of_the_experts():
    """Arrow, Ostapenko et al. 2024, section 3.2."""
    model = with_random_experts("arrow")
    model.base_model.finish_stage(model.base_model.stages[-1], lambda: ())
    for layer in model.base_model.layers().values():
        branch = layer.branches("default")[0]
        for expert in range(len(TASKS)):
            delta = branch.bank.up[expert].T @ branch.bank.down[expert]
            first = torch.linalg.svd(delta, full_matrices=False).Vh[0]
            assert (branch.router.scorer.directions[expert] @ first).abs().item() == pytest.approx(1.0, abs=1e-4)


def test_samples_are_the_same_on_every_process_and_of_every_task(places, tmp_path):
    run = run_of(places, tmp_path / "run", "method.name=lora", "train.steps=1")
    tasks = encode_tasks(run)

    mixture = Mixture({task.name: task.lengths for task in tasks}, run.recipe.mixture, batch_size=6, seed=0)

    def rows(process: int, count: int) -> list:
        batches = MixtureBatches(tasks, mixture, pad_id=0, process=process, processes=2)
        return [batch.rows for batch in batches.samples(count)]

    assert rows(0, 10) == rows(1, 10)
    assert [row for batch in rows(0, 10) for row in batch] == [(t, e) for t in range(3) for e in range(10)]
    assert sum(len(batch) for batch in rows(0, 10**6)) == sum(len(task.splits["train"]) for task in tasks)
    assert all(len(batch) <= 6 for batch in rows(0, 10))


# ---------------------------------------------------------------------- preferences


def span_of(preferences: str, steps: int = 400) -> StageSpan:
    return StageSpan(StageConfig(preferences=preferences), 100, 100 + steps)


@pytest.mark.parametrize("preferences", ["annealed", "uniform"])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_a_preference_is_a_blend_and_depends_on_seed_and_step_alone(preferences, tasks):
    span = span_of(preferences)
    for step in (100, 300, 499):
        torch.manual_seed(step)  # no global state takes part, which differs between processes
        drawn = draw_preferences(tasks, span, step, seed=7)
        assert drawn.shape == (tasks,)
        assert (drawn >= 0).all()
        assert drawn.sum().item() == pytest.approx(1.0, abs=1e-5)
        torch.manual_seed(0)
        assert torch.equal(draw_preferences(tasks, span, step, seed=7), drawn)
        if tasks > 1:
            assert not torch.equal(draw_preferences(tasks, span, step, seed=8), drawn)
            assert not torch.equal(draw_preferences(tasks, span, step + 1, seed=7), drawn)


def test_annealed_preferences_go_from_the_centre_to_the_corners_and_uniform_ones_stay():
    def largest(preferences: str, start: int) -> float:
        """The mean largest share over forty steps."""
        span = span_of(preferences)
        draws = [draw_preferences(4, span, step, seed=0) for step in range(start, start + 40)]
        return float(torch.stack(draws).max(-1).values.mean())

    assert largest("annealed", 100) < 0.5  # where even shares have 0.25
    assert largest("annealed", 100) < largest("annealed", 250) < largest("annealed", 460)
    assert largest("annealed", 460) > 0.65
    # The largest of four shares of a uniform draw from the simplex is (1 + 1/2 + 1/3 + 1/4) / 4 on average.
    assert largest("uniform", 100) == pytest.approx(25 / 48, abs=0.06)
    assert largest("uniform", 460) == pytest.approx(25 / 48, abs=0.06)


def test_more_of_a_task_in_the_preference_means_less_of_its_loss(places, tmp_path):
    """PaLoRA: one model spans the trade-offs between tasks that want different answers to the same prompts."""
    for task, answer in (("one", "red"), ("two", "blue")):
        (tmp_path / task).mkdir()
        rows = "".join(json.dumps({"prompt": f"the {noun} is", "completion": answer}) + "\n" for noun in NOUNS)
        for split in ("train", "validation"):
            (tmp_path / task / f"{split}.jsonl").write_text(rows)
    listed = ", ".join(f"{{name: {task}, source: {{path: '{tmp_path / task}'}}}}" for task in ("one", "two"))
    settings = [f"tasks=[{listed}]", "method.name=palora", "method.options={rank: 2, shared_rank: 2}"]
    run = run_of(places, tmp_path / "run", *settings, "train.steps=40", "train.learning_rate=0.02")
    for task in encode_tasks(run):
        other = {"one": "two", "two": "one"}[task.name]
        losses = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            with run.model.base_model.routing({task.name: share, other: 1 - share}), torch.no_grad():
                losses.append(sum(loss_of(run, row) for row in task.splits["train"]))
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.5 * losses[0]


def loss_of(run: TrainedRun, row: Encoded) -> float:
    ids = torch.tensor([row.input_ids])
    return run.model(input_ids=ids, labels=ids.masked_fill(~torch.tensor([row.trained]), -100)).loss.item()


# ---------------------------------------------------------------------- consistency


def losses_of(model: PeftModel, consistency: float, seed: int = 0) -> tuple[torch.Tensor, Tensors]:
    model.base_model.set_stage(StageConfig(consistency=consistency))
    batch = a_batch()
    answers = locate_answers(batch["labels"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inputs["routing_tasks"] = task_of_rows()
    objective = Objective(model, model.base_model)
    model.zero_grad()
    torch.manual_seed(seed)
    losses = objective(inputs, batch["labels"], answers, torch.full((len(answers.rows),), 0.1), 1.0)
    losses.total.backward()
    objective.release()
    return losses.auxiliary, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_consistency_is_the_divergence_of_two_passes_with_other_draws():
    model = with_random_experts("mosa").train()
    one, two = losses_of(model, 1.0)[0], losses_of(model, 2.0)[0]
    assert one > 0
    torch.testing.assert_close(two, 2 * one)
    assert losses_of(model, 0.0)[0] == 0
    assert losses_of(with_random_experts("lora").train(), 1.0)[0].item() == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_symmetric_and_zero_for_equals():
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 9)
    torch.testing.assert_close(symmetric_kl(first, second), symmetric_kl(second, first))
    assert symmetric_kl(first, first + 3.0).item() == pytest.approx(0, abs=1e-6)
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    both = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean") + torch.nn.functional.kl_div(
        p, q, log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(symmetric_kl(first, second), both / 2)


def test_two_passes_under_gradient_checkpointing_have_the_gradient_of_two_without():
    plain = losses_of(with_random_experts("mosa").train(), 1.0)
    model = with_random_experts("mosa").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(losses_of(model, 1.0), plain)


# ---------------------------------------------------------------------- steps and kills


def test_stages_share_the_steps_and_none_goes_without():
    stages = method_config("alter", tasks=TASKS, options={"gate_share": 0.25}).stages
    assert [(span.start, span.stop) for span in stage_spans(stages, 40)] == [(0, 30), (30, 40)]
    with pytest.raises(ConfigError, match=r"train.steps \(=1\) leaves no step for stage 'gates'; raise it"):
        stage_spans(stages, 1)


class Killed(Exception):
    """The run ends here."""


@pytest.mark.parametrize(("save_every", "killed_at"), [(4, 5), (3, 7)])
def test_a_run_killed_around_the_end_of_a_stage_resumes_to_the_same_weights(places, tmp_path, save_every, killed_at):
    """Its last checkpoint is of the stage's last step, or of a step after the experts were made new."""

    def kill(_model: torch.nn.Module, step: int) -> dict[str, float]:
        if step == killed_at:
            raise Killed
        return {}

    settings = [*RESET, "train.steps=8", f"train.save_every={save_every}", "train.eval_every=1"]
    run_of(places, tmp_path / "calm", *settings)
    with pytest.raises(Killed):
        run_of(places, tmp_path / "killed", *settings, evaluate=kill)
    run_of(places, tmp_path / "killed", *settings, resume=True)
    calm, killed = weights_of(tmp_path / "calm"), weights_of(tmp_path / "killed")
    assert all(torch.equal(tensor, killed[name]) for name, tensor in calm.items())
