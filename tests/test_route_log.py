"""What a run tells about its routers while it trains: counted once, the same however a batch is divided."""

import json
import re
from pathlib import Path

import pytest
import torch
from cases import adapted
from training_cases import make_recipe, write_base, write_tasks

from loramux.bases import load_base
from loramux.routing import LayerUsage
from loramux.tasks import load_tasks
from loramux.training import route_log
from loramux.training.distributed import make_accelerator
from loramux.training.route_log import may_collapse
from loramux.training.run import build_batches, build_model, train_run

MOLORA = ["method.name=molora", "method.options={rank: 2, experts: 5, top_k: 2, balance_loss: 0}"]
FIGURES = ("routing/effective_experts", "routing/fewest_experts", "routing/entropy")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("routes")
    return write_base(root / "base"), write_tasks(root / "tasks")


def lines_of(places: tuple[Path, Path], folder: Path, *settings: str, **options) -> list[dict]:
    train_run(make_recipe(*places, *settings), folder, **{"evaluate": None, **options})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_log_line_tells_what_the_routers_decided_on_the_batches_since_the_last_one(places, tmp_path: Path) -> None:
    still = [*MOLORA, "train.steps=2", "train.log_every=1", "train.learning_rate=1e-9", "train.accumulation=2"]
    recipe, tasks = make_recipe(*places, *still), load_tasks(str(places[1]))
    base, tokenizer = load_base(recipe.base.model)
    model = build_model(base, recipe, [task.name for task in tasks])
    batches = build_batches(recipe, tasks, tokenizer, base, make_accelerator(recipe.train))
    with model.base_model.collect_statistics() as seen, torch.no_grad():
        for batch in batches.at(1):
            model(**batch.inputs)
    effective = {name: layer.effective_experts() for name, layer in seen.layers.items()}
    entropies = [layer.mean_entropy() for layer in seen.layers.values()]
    line = lines_of(places, tmp_path / "run", *still)[1]
    assert len(effective) == 14
    assert line["routing/effective_experts"] == pytest.approx(sum(effective.values()) / 14, rel=1e-4)
    assert line["routing/fewest_experts"] == pytest.approx(min(effective.values()), rel=1e-4)
    assert effective[line["routing/fewest_experts_in"]] == pytest.approx(min(effective.values()), abs=1e-3)
    assert line["routing/entropy"] == pytest.approx(sum(entropies) / 14, rel=1e-4)


@pytest.mark.parametrize("setting", ["train.accumulation=3", "train.gradient_checkpointing=true"])
def test_the_figures_are_the_same_however_a_step_is_computed(places, tmp_path: Path, setting: str) -> None:
    """A block that is computed a second time in the backward pass has decided once."""
    whole = lines_of(places, tmp_path / "whole", *MOLORA)
    other = lines_of(places, tmp_path / "other", *MOLORA, setting)
    for one, two in zip(whole, other, strict=True):
        assert [two[key] for key in FIGURES] == pytest.approx([one[key] for key in FIGURES], rel=1e-3)


def test_every_log_line_has_them_once_a_router_decides(places, tmp_path: Path) -> None:
    """The router of moa is idle in the first stage, and a plain LoRA has none."""
    for line in lines_of(places, tmp_path / "moa", "method.name=moa"):
        assert ("routing/effective_experts" in line) == (line["stage"] == "router")
    assert "routing" not in str(lines_of(places, tmp_path / "lora", "method.name=lora"))


def test_groups_of_gates_are_counted_one_by_one(places, tmp_path: Path) -> None:
    mhr = ["method.name=mhr", "method.options={skills: 3, splits: 4, rank: 2}"]
    (line,) = lines_of(places, tmp_path / "run", *mhr, "train.steps=2")
    assert line["routing/effective_experts"] == pytest.approx(3.0, abs=0.01)  # of three, not of twelve
    assert line["routing/entropy"] == pytest.approx(torch.log(torch.tensor(3.0)).item(), abs=0.01)


def test_trackers_get_the_figures_without_the_name(places, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = lines_of(places, tmp_path / "run", *MOLORA, "train.trackers=[tensorboard]")
    events = EventAccumulator(str(next((tmp_path / "run" / "trackers").rglob("events*")).parent))
    events.Reload()
    for figure in FIGURES:
        logged = [event.value for event in events.Scalars(figure)]
        assert logged == pytest.approx([line[figure] for line in lines], rel=1e-6)


# ---------------------------------------------------------------------- collapse

SMORA = ["method.name=smora", "train.steps=40", "train.log_every=10", "train.save_every=30", "train.batch_size=3"]
TOP_1 = "method.options={rank: 8, top_k: 1, balance_rate: 1.0e-9}"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps are enough to speak of a collapse."""
    monkeypatch.setattr(route_log, "COLLAPSED_FOR", 20)


def collapse(model: torch.nn.Module, step: int) -> dict[str, float]:
    """Send all tokens of one layer to the same ranks, by a bias that training never moves back."""
    for name, buffer in model.named_buffers():
        if "layers.0.mlp.up_proj" in name and name.endswith("selection_bias"):
            buffer[:2] = torch.tensor([2e6, 1e6])
    return {}


def test_a_collapse_is_told_once_per_run_with_the_knobs_to_turn(
    places, tmp_path: Path, soon: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(model: torch.nn.Module, step: int) -> dict[str, float]:
        if step == 32:
            raise KeyboardInterrupt
        return collapse(model, step)

    with pytest.raises(KeyboardInterrupt):
        lines_of(places, tmp_path / "run", *SMORA, TOP_1, evaluate=interrupt)
    lines = lines_of(places, tmp_path / "run", *SMORA, TOP_1, evaluate=collapse, resume=True)
    fewest = [line["routing/fewest_experts"] for line in lines if "routing/fewest_experts" in line]
    assert fewest[1:] == [pytest.approx(1.0)] * 3
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("routers have collapsed") == 1
    assert re.search(
        r"for 20 steps nearly all tokens .* of 8 experts, at model.layers.0.mlp.up_proj.*To use more", told
    )
    knobs = "raise method.options.balance_rate (now 1e-09) or lower train.router_learning_rate (now 0.002)"
    assert f"To use more of them, {knobs}" in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([TOP_1], True),
        ([TOP_1, "train.steps=16"], False),  # not for long enough
        ([TOP_1.replace("8", "3")], False),  # too few to speak of a collapse
        ([TOP_1.replace("top_k: 1", "top_k: 2")], True),  # two at a time, and always the same two
        ([TOP_1.replace("top_k: 1", "top_k: 2").replace("8", "6")], False),  # two of six may be what it takes
    ],
)
def test_what_counts_as_a_collapse(
    places, tmp_path: Path, soon: None, capsys: pytest.CaptureFixture[str], settings: list[str], told: bool
) -> None:
    lines_of(places, tmp_path / "run", *SMORA, *settings, evaluate=collapse)
    assert ("routers have collapsed" in capsys.readouterr().out) == told


def test_only_routers_that_learn_to_choose_among_many_experts_token_by_token_can_collapse() -> None:
    """One expert per task or per text may be the point, and a router without training cannot be told to do better."""
    options = {"mola": {"rank": 4, "experts": [3, 6]}, "comol": {"rank": 4, "experts": 5}}
    watched = {}
    for method in ("molora", "mola", "comol", "task_aware_moe", "moa", "poly", "arrow", "distil_gate", "palora"):
        hub = adapted(method, options.get(method), tasks=["a", "b", "c", "d", "e"]).base_model
        watched[method] = sum(may_collapse(router) for router in hub.named_routers().values())
    every = dict.fromkeys(("molora", "comol", "task_aware_moe"), 14)
    assert watched == {**dict.fromkeys(("moa", "poly", "arrow", "distil_gate", "palora"), 0), **every, "mola": 7}


def test_statistics_of_an_unseen_layer_are_empty() -> None:
    assert LayerUsage.empty(2, 3).effective_experts() == 0
    assert LayerUsage.empty(2, 3).mean_entropy() == 0
