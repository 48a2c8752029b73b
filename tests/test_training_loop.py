"""The loop: the same result however a batch is divided, stages, best weights, and stopping when the loss is lost."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_cases import ANSWERS, make_recipe, write_base, write_tasks

from loramux.support.errors import AdapterError, ConfigError, RunError, TrainingDiverged
from loramux.tasks import load_tasks
from loramux.training.recipe import Recipe
from loramux.training.run import TrainedRun, load_run, open_base, train_run

Tensors = dict[str, torch.Tensor]
LAST = "layers.1.mlp.down_proj.loramux_branches.default.0.bank.up"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("training")
    return write_base(root / "base"), write_tasks(root / "tasks")


def run_of(recipe: Recipe, folder: Path, **options) -> TrainedRun:
    return train_run(recipe, folder, **{"evaluate": None, **options})


def weights_of(folder: Path) -> Tensors:
    return load_file(folder / "mixture" / "adapter_model.safetensors")


def assert_same(one: Tensors, other: Tensors, atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "options"),
    [("moa", "{rank: 2}"), ("lora", "{rank: 2}"), ("smora", "{rank: 8, top_k: 2, balance_rate: 0.01}")],
)
def test_accumulation_equals_one_large_batch(places, tmp_path: Path, method: str, options: str) -> None:
    """Answers differ in length between tasks, so a mean of micro-batch means would not do."""
    for parts in (1, 3):
        chosen = (f"method.name={method}", f"method.options={options}", f"train.accumulation={parts}")
        run_of(make_recipe(*places, *chosen), tmp_path / str(parts))
    assert_same(weights_of(tmp_path / "1"), weights_of(tmp_path / "3"), atol=2e-5)


def test_the_recipe_decides_the_weights(places, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_of(make_recipe(*places, f"train.seed={seed}", "method.options={rank: 2, dropout: 0.2}"), tmp_path / name)
    assert_same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert any(not torch.equal(t, weights_of(tmp_path / "c")[n]) for n, t in weights_of(tmp_path / "a").items())


def test_a_run_leaves_losses_per_task_and_opens_again(places, tmp_path: Path) -> None:
    recipe = make_recipe(*places, "train.steps=40", "train.learning_rate=0.02", "train.eval_every=20")
    run = train_run(recipe, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    for task in ANSWERS:
        losses = [line[f"train/loss/{task}"] for line in lines if f"train/loss/{task}" in line]
        assert losses[-1] < 0.5 * losses[0]
        evaluations = [line for line in lines if "eval/metric" in line]
        assert {f"eval/loss/{task}", f"eval/metric/{task}"} <= evaluations[-1].keys()
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(2, 41, 2))
    assert {line["stage"] for line in lines if "train/loss" in line} == {"experts", "router"}
    again = load_run(tmp_path / "run")
    ids = torch.tensor([[1, 5, 6, 7]])
    for task in ANSWERS:
        expected = run.model(input_ids=ids, routing_tasks=task).logits
        torch.testing.assert_close(again.model(input_ids=ids, routing_tasks=task).logits, expected, rtol=0, atol=0)
    assert [task.name for task in again.tasks] == [task.name for task in load_tasks(str(places[1]))]


def test_the_best_weights_of_the_last_stage_are_kept(places, tmp_path: Path) -> None:
    scores = {2: 1.0, 4: 1.0, 6: 1.0, 8: 0.5, 10: 0.7, 12: 0.6}
    settings = ["train.steps=12", "train.eval_every=2", "train.keep_checkpoints=1", "method.options.router_share=0.5"]
    recipe = make_recipe(*places, *settings)
    run_of(recipe, tmp_path / "run", evaluate=lambda _model, step: {"metric": scores[step]})
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000010", "step-00000012"]
    best = load_file(checkpoints / "step-00000010" / "adapter.safetensors")
    assert_same(best, weights_of(tmp_path / "run"))


def test_training_stops_when_evaluations_bring_no_gain(places, tmp_path: Path) -> None:
    seen = []

    def evaluate(_model: torch.nn.Module, step: int) -> dict[str, float]:
        seen.append(step)
        return {"metric": -step}

    recipe = make_recipe(*places, "method.name=lora", "train.steps=40", "train.early_stop=2")
    run_of(recipe, tmp_path / "run", evaluate=evaluate)
    assert seen == [4, 8, 12]
    best = tmp_path / "run" / "checkpoints" / "step-00000004" / "adapter.safetensors"
    assert_same(load_file(best), weights_of(tmp_path / "run"))


def test_a_lost_loss_stops_the_run_and_names_step_tasks_and_examples(places, tmp_path: Path) -> None:
    def poison(model: torch.nn.Module, step: int) -> dict[str, float]:
        if step == 4:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if n.endswith(LAST))[1] = float("inf")
        return {}

    recipe = make_recipe(*places, "method.name=moa", "train.save_every=3")
    message = (
        r"loss is not finite at step 5 \(task 'sound'; training examples sound\[\d+\].*last good .*step-00000003\."
    )
    with pytest.raises(TrainingDiverged, match=message):
        run_of(recipe, tmp_path / "run", evaluate=poison)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    run_of(recipe, tmp_path / "run", resume=True)
    run_of(recipe, tmp_path / "calm")
    assert_same(weights_of(tmp_path / "calm"), weights_of(tmp_path / "run"))


def test_weights_that_are_not_finite_never_become_a_checkpoint(places, tmp_path: Path) -> None:
    def poison(model: torch.nn.Module, step: int) -> dict[str, float]:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if n.endswith("bank.up")).fill_(float("nan"))
        return {}

    with pytest.raises(TrainingDiverged, match=r"bank.up is not finite after step 4; this state is not saved"):
        run_of(make_recipe(*places, "train.save_every=4"), tmp_path / "run", evaluate=poison)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(places, tmp_path: Path) -> None:
    def hook(model: torch.nn.Module, step: int) -> dict[str, float]:
        parameter = next(p for n, p in model.named_parameters() if n.endswith("bank.up"))
        parameter.register_hook(lambda gradient: gradient * float("inf"))
        return {}

    message = r"the gradient is not finite at step 5 \(task 'colour', 'sound', 'home'"
    with pytest.raises(TrainingDiverged, match=message):
        run_of(make_recipe(*places, "method.name=lora"), tmp_path / "run", evaluate=hook)


def test_one_task_can_be_trained_again_without_touching_the_others(places, tmp_path: Path) -> None:
    run_of(make_recipe(*places), tmp_path / "first")
    again = ["train.only_tasks=[home]", "train.weight_decay=0.1", f"train.start_from={tmp_path / 'first'}"]
    run_of(make_recipe(*places, *again), tmp_path / "second")
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    home = [task.name for task in load_tasks(str(places[1]))].index("home")
    experts = [name for name in before if ".bank." in name]
    assert experts
    for name in experts:
        for expert in range(3):
            assert torch.equal(before[name][expert], after[name][expert]) == (expert != home), (name, expert)


def test_what_tasks_share_is_held_while_one_of_them_trains_again(places, tmp_path: Path) -> None:
    method = ["method.name=mtlora", "method.options={rank: 2, task_rank: 2}", "train.weight_decay=0.1"]
    run_of(make_recipe(*places, *method), tmp_path / "first")
    again = [*method, "train.only_tasks=[home]", f"train.start_from={tmp_path / 'first'}"]
    run_of(make_recipe(*places, *again), tmp_path / "second")
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    home = [task.name for task in load_tasks(str(places[1]))].index("home")
    for name, tensor in before.items():
        moved = {row for row in range(len(tensor)) if not torch.equal(tensor[row], after[name][row])}
        assert moved == (set() if ".0.bank." in name else {home}), name
    assert {line["train/answer_tokens"] for line in metrics(tmp_path / "second") if "train/loss/sound" in line} == set()


def test_a_task_can_be_added_later(places, tmp_path: Path) -> None:
    def recipe(*names: str, **train) -> Recipe:
        rows = [f"{{name: {name}, source: {{path: '{places[1].parent / name}'}}}}" for name in names]
        return make_recipe(*places, f"tasks=[{', '.join(rows)}]", *(f"train.{k}={v}" for k, v in train.items()))

    run_of(recipe("sound", "colour"), tmp_path / "two")
    added = recipe("home", "colour", "sound", only_tasks="[home]", start_from=tmp_path / "two")
    run_of(added, tmp_path / "three")
    before, after = weights_of(tmp_path / "two"), weights_of(tmp_path / "three")
    for name in (name for name in before if ".bank." in name):
        assert torch.equal(before[name][0], after[name][2])
        assert torch.equal(before[name][1], after[name][1])
    with pytest.raises(RunError, match="has a task 'sound' that the recipe has not; its expert would be lost"):
        run_of(recipe("home", "colour", start_from=tmp_path / "two"), tmp_path / "fewer")
    wider = recipe("sound", "colour", start_from=tmp_path / "two")
    wider = replace(wider, method=replace(wider.method, options={"rank": 3}))
    with pytest.raises(RunError, match=r"tensor '.*down' has shape \(2, 2, 48\), the model \(2, 3, 48\)"):
        run_of(wider, tmp_path / "wider")
    with pytest.raises(RunError, match="holds no loramux mixture"):
        run_of(recipe("sound", "colour", start_from=tmp_path), tmp_path / "nothing")


def test_experts_that_tasks_share_start_from_the_same_tasks_only(places, tmp_path: Path) -> None:
    """Their rows would be taken for tasks' where there happen to be as many of them."""

    def recipe(method: str, options: str, *names: str, **train) -> Recipe:
        rows = [f"{{name: {name}, source: {{path: '{places[1].parent / name}'}}}}" for name in names]
        settings = [f"tasks=[{', '.join(rows)}]", f"method.name={method}", f"method.options={options}", "train.steps=2"]
        return make_recipe(*places, *settings, *(f"train.{k}={v}" for k, v in train.items()))

    shared, first = ("mtl_lora", "{rank: 2, experts: 2}"), tmp_path / "first"
    run_of(recipe(*shared, "sound", "colour"), first)
    run_of(recipe(*shared, "sound", "colour", start_from=first), tmp_path / "again")
    for names in (("colour", "sound"), ("sound", "colour", "home")):
        with pytest.raises(RunError, match=r"same tasks in the same order can start from it: sound, colour"):
            run_of(recipe(*shared, *names, start_from=first), tmp_path / "-".join(names))
    by_token, routed = ("molora", "{rank: 2, experts: 2, top_k: 1}"), tmp_path / "routed"
    run_of(recipe(*by_token, "sound", "colour"), routed)
    more = recipe(*by_token, "home", "sound", "colour", start_from=routed, learning_rate="1e-9")
    run_of(more, tmp_path / "more")
    assert_same(weights_of(routed), weights_of(tmp_path / "more"), atol=1e-6)


def test_earlier_experts_must_be_whole_and_of_the_same_method_and_base(places, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    run_of(make_recipe(base, places[1]), tmp_path / "first")
    again = make_recipe(base, places[1], f"train.start_from={tmp_path / 'first'}")
    smora = replace(again, method=replace(again.method, name="smora", options={"rank": 8}))
    with pytest.raises(RunError, match=r"mixture: trained with method 'moa', not 'smora'; .*\(train.start_from\)"):
        run_of(smora, tmp_path / "method")
    write_base(base, seed=5)
    for start in ("first", "first/mixture"):
        other = make_recipe(base, places[1], f"train.start_from={tmp_path / start}")
        with pytest.raises(RunError, match=r"first: trained on another base model than .*its weights differ"):
            run_of(other, tmp_path / "other" / start)
    write_base(base)
    shutil.copytree(tmp_path / "first" / "mixture", tmp_path / "alone")
    for mixture, start in (("first/mixture", "first"), ("alone", "alone")):
        file = tmp_path / mixture / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        damaged = make_recipe(base, places[1], f"train.start_from={tmp_path / start}")
        with pytest.raises(RunError, match=rf"{mixture}/adapter_model.safetensors: its content was changed"):
            run_of(damaged, tmp_path / "damaged" / start)
    shutil.rmtree(tmp_path / "first" / "mixture")
    with pytest.raises(RunError, match="first: the run is not finished"):
        run_of(again, tmp_path / "unfinished")


def test_only_tasks_needs_experts_that_belong_to_tasks(places, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="only a method with one expert per task"):
        run_of(make_recipe(*places, "method.name=lora", "train.only_tasks=[home]"), tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"train.only_tasks: no task 'hom'; did you mean 'home'\?"):
        run_of(make_recipe(*places, "train.only_tasks=[hom]"), tmp_path / "typo")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("method.name=mao", r"unknown method 'mao'; did you mean 'moa'\?"),
        ("method.target_modules=[nowhere]", r"method.target_modules \(=\('nowhere',\)\): .*not found"),
        ("train.precision=fp16", "fp16 needs a GPU"),
        ("train.trackers=[tensorbord]", r"unknown tracker 'tensorbord'; did you mean 'tensorboard'\?"),
        ("train.accumulation=7", "batch of 6 examples cannot be divided over 1 processes x 7 micro-batches"),
    ],
)
def test_what_cannot_be_trained_is_refused(places, tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(make_recipe(*places, setting), tmp_path / "run")


def test_a_launcher_that_shards_by_itself_is_refused(places, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"told to shard \(ACCELERATE_USE_FSDP\); .*say train.distributed: fsdp"):
        run_of(make_recipe(*places), tmp_path / "run")


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights(places, tmp_path: Path) -> None:
    for name in ("false", "true"):
        settings = ["method.name=lora", "train.steps=3", f"train.compile={name}"]
        run_of(make_recipe(*places, *settings), tmp_path / name)
    assert_same(weights_of(tmp_path / "false"), weights_of(tmp_path / "true"), atol=1e-4)


def test_gradient_checkpointing_trains_the_same_weights(places, tmp_path: Path) -> None:
    for name in ("false", "true"):
        run_of(make_recipe(*places, f"train.gradient_checkpointing={name}"), tmp_path / name)
    assert_same(weights_of(tmp_path / "false"), weights_of(tmp_path / "true"), atol=1e-6)


def test_bf16_computes_roughly_and_keeps_adapters_in_float32(places, tmp_path: Path) -> None:
    for name in ("fp32", "bf16"):
        settings = ["method.name=lora", "train.steps=3", "train.batch_size=3", f"train.precision={name}"]
        run_of(make_recipe(*places, *settings), tmp_path / name)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "bf16").values()} == {torch.float32}
    exact, rough = (metrics(tmp_path / name)[-1]["train/loss"] for name in ("fp32", "bf16"))
    assert exact != rough
    assert exact == pytest.approx(rough, rel=0.05)


def test_tensorboard_gets_the_losses_of_every_task(places, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_of(make_recipe(*places, "train.trackers=[tensorboard]"), tmp_path / "run")
    folder = next((tmp_path / "run" / "trackers").rglob("events*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    for task in ANSWERS:
        logged = {event.step: event.value for event in events.Scalars(f"train/loss/{task}")}
        written = {line["step"]: line[f"train/loss/{task}"] for line in metrics(tmp_path / "run")}
        assert logged == pytest.approx(written, rel=1e-6)


def test_a_model_of_few_weights_takes_one_thread_unless_the_user_says_otherwise(places, monkeypatch) -> None:
    before = torch.get_num_threads()
    try:
        for said, threads in (("2", 2), (None, 1)):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if said:
                monkeypatch.setenv("OMP_NUM_THREADS", said)
            torch.set_num_threads(2)
            open_base(make_recipe(*places))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
