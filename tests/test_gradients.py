"""How well the gradients of tasks agree: the right figures, the same on any layout, and a run that does not notice."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_cases import ANSWERS, make_recipe, write_base, write_tasks

from loramux.bases import load_base
from loramux.support.errors import ConfigError
from loramux.tasks import load_tasks
from loramux.training.distributed import make_accelerator
from loramux.training.run import build_batches, build_model, train_run
from loramux.training.run_folder import RunFolder

LORA = ["method.name=lora", "train.steps=4"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("gradients")
    return write_base(root / "base"), write_tasks(root / "tasks")


def run_of(places: tuple[Path, Path], folder: Path, *settings: str, every: int | None = 2, **options) -> RunFolder:
    recipe = make_recipe(*places, *settings, f"train.log_gradients={every or 'null'}")
    return train_run(recipe, folder, **{"evaluate": None, **options}).folder


def cosines(run: RunFolder) -> list[list[list[float | None]]]:
    return [line["cosine"] for line in run.gradients()]


def cosine_lines(run: RunFolder) -> dict[int, float]:
    return {line["step"]: line["gradients/cosine"] for line in run.metrics() if "gradients/cosine" in line}


@pytest.mark.parametrize(
    "settings",
    [
        ["method.name=smora", "method.options={rank: 8, top_k: 2, balance_rate: 0.01, dropout: 0.2}"],
        ["method.name=poly", "method.options={rank: 2, skills: 3, sampled: true}", "train.accumulation=2"],
        ["method.name=molora", "method.options={rank: 2, experts: 3}", "train.gradient_checkpointing=true"],
        ["method.name=moa"],
    ],
    ids=lambda settings: settings[0].partition("=")[2],
)
def test_a_run_that_is_looked_at_ends_with_the_same_bits(places, tmp_path: Path, settings: list[str]) -> None:
    """Dropout, sampled gates, balancing counts and optimiser state all go on as if nothing had happened."""
    watched = run_of(places, tmp_path / "watched", *settings)
    calm = run_of(places, tmp_path / "calm", *settings, every=None)
    for file in ("mixture/adapter_model.safetensors", "checkpoints/step-00000008/optimizer.safetensors"):
        one, two = load_file(watched.path / file), load_file(calm.path / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert [line for line in watched.metrics() if "gradients/cosine" not in line] == calm.metrics()
    assert not calm.gradients_file.exists()


@pytest.mark.parametrize(
    ("method", "shared"),
    [
        (["method.name=lora"], ".bank."),
        (["method.name=mtlora", "method.options={rank: 2, task_rank: 2, dropout: 0.0}"], ".default.0.bank."),
    ],
    ids=["lora", "mtlora"],
)
def test_the_cosines_are_those_of_gradients_taken_task_by_task(
    places, tmp_path: Path, method: list[str], shared: str
) -> None:
    """Of all experts that two tasks share: mtlora's second branch has experts of one task each."""
    settings = [*method, "train.batch_size=24", "train.steps=2"]
    recipe, tasks = make_recipe(*places, *settings), load_tasks(str(places[1]))
    base, tokenizer = load_base(recipe.base.model)
    model = build_model(base, recipe, [task.name for task in tasks]).train()
    batches = build_batches(recipe, tasks, tokenizer, base, make_accelerator(recipe.train))
    gradients = []
    for task, batch in batches.of_each_task(0):
        assert batch.tasks.tolist() == [task] * 8
        model.zero_grad()
        model(**batch.inputs, labels=batch.labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for name, p in model.named_parameters() if shared in name]))
    unit = torch.nn.functional.normalize(torch.stack(gradients))
    expected = unit @ unit.T
    run = run_of(places, tmp_path / "run", *settings, every=1)
    torch.testing.assert_close(torch.tensor(cosines(run)[0]), expected, atol=1e-4, rtol=0)
    pairs = [expected[i, j].item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert cosine_lines(run)[1] == pytest.approx(sum(pairs) / 3, abs=1e-4)
    assert run.gradients()[0]["tasks"] == list(ANSWERS)
    assert [line["step"] for line in run.gradients()] == [1, 2]


def test_where_no_expert_is_shared_there_is_no_cosine(places, tmp_path: Path) -> None:
    run = run_of(places, tmp_path / "moa", "method.name=moa")
    for line in cosines(run):
        assert not [value for i, row in enumerate(line) for j, value in enumerate(row) if i != j and value is not None]
    assert len(cosines(run)) == 4
    assert not cosine_lines(run)


def test_a_task_that_the_mixture_leaves_out_has_no_cosine(places, tmp_path: Path) -> None:
    weights = ["mixture.strategy=weights", "mixture.weights={colour: 1, sound: 0, home: 1}"]
    (line,) = cosines(run_of(places, tmp_path / "run", *LORA, *weights, every=4))
    assert line[1] == [None, None, None]
    assert line[0][2] == line[2][0] != None  # noqa: E711
    assert line[0][0] == pytest.approx(1)


def test_two_tasks_that_are_the_same_agree(places, tmp_path: Path) -> None:
    rows = [{"name": name, "source": {"path": str(places[1].parent / "home")}} for name in ("one", "two")]
    (tmp_path / "tasks.yaml").write_text(json.dumps({"tasks": rows}))
    run = run_of((places[0], tmp_path / "tasks.yaml"), tmp_path / "run", *LORA, "train.batch_size=48", every=4)
    assert cosine_lines(run)[4] == pytest.approx(1, abs=1e-5)


def test_accumulation_gives_the_cosines_of_one_large_batch(places, tmp_path: Path) -> None:
    """Two processes do too: test_training_distributed.py."""
    whole = run_of(places, tmp_path / "whole", *LORA)
    parts = run_of(places, tmp_path / "parts", *LORA, "train.accumulation=3")
    torch.testing.assert_close(torch.tensor(cosines(parts)), torch.tensor(cosines(whole)), atol=1e-3, rtol=0)
    assert cosine_lines(parts) == pytest.approx(cosine_lines(whole), abs=1e-3)


def test_a_resumed_run_logs_every_look_once(places, tmp_path: Path) -> None:
    calm = run_of(places, tmp_path / "calm", "method.name=lora", "train.save_every=3")

    def interrupt(model: torch.nn.Module, step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    settings = ("method.name=lora", "train.save_every=3", "train.eval_every=5")
    with pytest.raises(KeyboardInterrupt):
        run_of(places, tmp_path / "killed", *settings, evaluate=interrupt)
    killed = run_of(places, tmp_path / "killed", *settings, resume=True)
    assert killed.gradients_file.read_bytes() == calm.gradients_file.read_bytes()
    assert [line["step"] for line in killed.gradients()] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.log_gradients=0", r"log_gradients \(=0\) must be at least 1"),
        ("train.distributed=fsdp", "log_gradients needs whole weights on every process: set distributed: ddp"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_before_any_step(places, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(*places, "train.log_gradients=2", setting)
