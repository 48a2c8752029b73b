"""A new task joins a finished run: every way leaves a run, is measured beside the anchors, and keeps its promise."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from training_cases import make_recipe, write_base, write_tasks

from loramux.adapters import even_blend
from loramux.adapters.held import Held
from loramux.cli.main import build_parser
from loramux.support.config import parse
from loramux.support.errors import AdapterError, ConfigError, DataError
from loramux.training.adapt import adapt_run
from loramux.training.adapt_models import hub_in, plain_lora, with_shots
from loramux.training.adapt_report import Adaptation, Outcome
from loramux.training.adapt_ways import WAYS, AdaptConfig
from loramux.training.assess import encode_tasks
from loramux.training.run import load_run, train_run

OLD, NEW = ["colour", "sound"], "home"
OPTIONS = {
    "arrow": "{rank: 2, top_k: 1}",
    "madx": "{rank: 2, language_rank: 2, languages: {colour: en, sound: en}}",
    "mhr": "{rank: 2, skills: 3, splits: 4}",
    "moa": "{rank: 2}",
    "mtl_lora": "{rank: 2}",
    "poly": "{rank: 2, skills: 3}",
    "router_retriever": "{rank: 2}",
    "scalearn": "{rank: 2}",
    "task_aware_moe": "{rank: 2, experts: 2, top_k: 1}",
}
ABLE = {
    "madx": ["mean_expert", "new_expert"],
    "mhr": ["row", "row_and_experts", "mean_expert"],
    "moa": ["mean_expert", "new_expert"],
    "mtl_lora": ["row", "row_and_experts", "mean_expert"],
    "poly": ["row", "row_and_experts", "mean_expert"],
    "router_retriever": ["mean_expert", "prototype", "new_expert"],
    "scalearn": ["row", "row_and_experts", "mean_expert", "new_expert"],
    "task_aware_moe": ["row", "row_and_experts", "mean_expert"],
}
METHOD_OPTIONS = {"madx": {"languages": "de"}}
every_method = pytest.mark.parametrize("method", ABLE)

Adapted = Callable[[str], tuple[Path, Adaptation]]

STOCK_READER = """
import sys
sys.modules["loramux"] = None  # any import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
inputs = torch.load("batch.pt", weights_only=True)
for number, folder in enumerate(sys.argv[1:]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), folder).eval()
    with torch.no_grad():
        torch.save(model(**inputs).logits, f"{number}.pt")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_base(folder / "base")
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> Callable[[str], Path]:
    """A run of a method on the old tasks."""

    @cache
    def run(method: str) -> Path:
        rows = [f"{{name: {name}, source: {{path: '{place / 'tasks' / name}'}}, max_new_tokens: 2}}" for name in OLD]
        chosen = [f"method.name={method}", f"method.options={OPTIONS[method]}", f"tasks=[{', '.join(rows)}]"]
        settings = ["base.known_as=someone/tiny", "train.weight_decay=0.1", "train.learning_rate=0.01"]
        recipe = make_recipe(place / "base", place / "tasks" / "tasks.yaml", *chosen, *settings)
        train_run(recipe, place / "runs" / method, evaluate=None)
        return place / "runs" / method

    return run


@pytest.fixture(scope="module")
def adapted(place: Path, runs: Callable[[str], Path]) -> Adapted:
    """What came of all ways of a method, and where."""

    @cache
    def adapt(method: str) -> tuple[Path, Adaptation]:
        to = place / "adapted" / method
        settings = AdaptConfig(shots=8, steps=4, method_options=METHOD_OPTIONS.get(method, {}))
        return to, adapt_run(runs(method), place / "tasks" / NEW, to, settings)

    return adapt


def outcome_of(adaptation: Adaptation, way: str) -> Outcome:
    return next(outcome for outcome in adaptation.outcomes if outcome.way.name == way)


@torch.no_grad()
def answers(run: Path, task: str) -> torch.Tensor:
    """Logits of a run, whose task is named, on prompts of its own base."""
    ids = torch.arange(3, 21).reshape(3, 6)
    return load_run(run, tasks=[]).model(input_ids=ids, attention_mask=torch.ones_like(ids), routing_tasks=task).logits


@every_method
def test_all_that_a_hub_can_do_stands_in_one_table_beside_the_anchors(adapted, method):
    folder, adaptation = adapted(method)
    assert [outcome.way.name for outcome in adaptation.outcomes] == ["base", "scratch", *ABLE[method]]
    assert set(adaptation.left_out) == set(WAYS) - set(ABLE[method])
    data = json.loads((folder / "adapt.json").read_text())
    assert [way["way"] for way in data["ways"]] == ["base", "scratch", *ABLE[method]]
    assert data["facts"]["shots"] == 8
    assert data["facts"]["training_examples"] == 24
    page = (folder / "adapt.md").read_text()
    for outcome in adaptation.outcomes:
        assert re.search(
            rf"^\| {outcome.way.name} .* \| +{re.escape(outcome.told_of_others())} \|$", page, re.MULTILINE
        )
        assert outcome.scores["loss"] > 0
    for way in adaptation.left_out:
        assert re.search(rf"^Left out: .*\b{way}\b.* \(method '{method}': ", page, re.MULTILINE)


@every_method
def test_what_lies_on_the_disk_answers_old_tasks_as_the_run_does_unless_it_says_so(adapted, runs, method):
    folder, adaptation = adapted(method)
    before = {task: answers(runs(method), task) for task in OLD}
    for outcome in adaptation.outcomes:
        if outcome.way.adapter == "hub":
            moved = max(float((answers(folder / outcome.way.name, task) - before[task]).abs().max()) for task in OLD)
            told = outcome.told_of_others()
            if outcome.way.moves_others:
                assert moved > 1e-4
                assert told.startswith("moved: ")
            elif method == "scalearn":  # all tasks sum over all experts, and the new one has weight zero
                assert moved < 1e-5
                assert told.startswith(("bit-equal", "equal to rounding"))
            else:
                assert moved == 0
                assert told == "bit-equal"


@every_method
def test_every_way_that_trains_learns_and_counts_what_it_trains(adapted, method):
    _, adaptation = adapted(method)
    base = outcome_of(adaptation, "base")
    for outcome in adaptation.outcomes[1:]:
        assert outcome.scores["loss"] != base.scores["loss"]
        if outcome.way.name != "prototype":
            assert outcome.parameters > 0
            assert outcome.seconds > 0
    largest = max(outcome.parameters for outcome in adaptation.outcomes[2:])
    one_rank = 1856 // 2  # of a LoRA on all linears of this base
    assert abs(outcome_of(adaptation, "scratch").parameters - largest) <= one_rank / 2


def test_a_row_is_a_handful_of_numbers(adapted):
    layers, skills, splits = 14, 3, 4
    assert outcome_of(adapted("mhr")[1], "row").parameters == layers * skills * splits
    assert outcome_of(adapted("poly")[1], "row").parameters == layers * skills
    matrix, heads = 2 * 2, 3
    assert outcome_of(adapted("mtl_lora")[1], "row").parameters == layers * (matrix + heads)


def test_rows_and_factors_have_rates_that_suit_them(adapted):
    adaptation = adapted("mhr")[1]
    rates = {outcome.way.name: outcome.learning_rate for outcome in adaptation.outcomes}
    assert rates == {"base": None, "scratch": 0.01, "row": 0.5, "row_and_experts": 0.01, "mean_expert": 0.01}


def test_rates_and_ways_can_be_chosen(runs, place, tmp_path):
    settings = AdaptConfig(ways=("row", "mean_expert"), steps=2, learning_rates={"all": 0.02, "row": 0.3})
    adaptation = adapt_run(runs("mhr"), place / "tasks" / NEW, tmp_path / "to", settings)
    rates = {outcome.way.name: outcome.learning_rate for outcome in adaptation.outcomes}
    assert rates == {"base": None, "scratch": 0.02, "row": 0.3, "mean_expert": 0.02}
    assert adaptation.left_out == {}
    assert adaptation.facts["shots"] == 24


def test_every_way_leaves_a_run_that_the_next_task_can_join(adapted, place, tmp_path):
    folder, _ = adapted("mhr")
    again = load_run(folder / "row")
    assert [task.name for task in again.tasks] == [*OLD, NEW]
    assert not (folder / "row" / "checkpoints").exists()
    shutil.copytree(place / "tasks" / "sound", tmp_path / "noise")
    settings = AdaptConfig(ways=("row",), shots=4, steps=2)
    adaptation = adapt_run(folder / "row", tmp_path / "noise", tmp_path / "to", settings)
    assert list(outcome_of(adaptation, "row").others) == [*OLD, NEW]


def test_stock_peft_reads_the_new_task_in_a_process_without_loramux(adapted, place, tmp_path):
    ways = [(method, way) for method in ("mhr", "moa", "router_retriever") for way in ["scratch", *ABLE[method]]]
    folders = [adapted(method)[0] / way for method, way in ways]
    (tmp_path / "base").symlink_to(place / "base")
    ids = torch.arange(3, 21).reshape(3, 6)
    torch.save({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "batch.pt")
    exports = [str(folder / "exports" / NEW) for folder in folders]
    subprocess.run([sys.executable, "-c", STOCK_READER, *exports], check=True, cwd=tmp_path)
    for number, folder in enumerate(folders):
        stock = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert (stock - answers(folder, NEW)).abs().max() < 1e-4, folder


def test_a_hub_that_routes_tokens_is_not_exported_and_its_loras_are(adapted):
    folder, adaptation = adapted("task_aware_moe")
    assert outcome_of(adaptation, "row").export is None
    assert not (folder / "row" / "exports").exists()
    assert outcome_of(adaptation, "mean_expert").export.how == "exact"


def test_the_mean_expert_starts_as_the_even_blend_of_all(runs):
    expected = even_blend(hub_in(load_run(runs("moa"), tasks=[]).model))
    learner = plain_lora(load_run(runs("moa"), tasks=[]), WAYS["mean_expert"], NEW, 0, seed=0)
    assert learner.method.options == {"rank": 4}  # two experts of rank 2
    for name, layer in hub_in(learner.model).layers().items():
        torch.testing.assert_close(layer.factors("default").delta(), expected[name].delta())


def test_a_prototype_takes_the_experts_its_prompts_are_nearest_to_and_trains_nothing(adapted):
    folder, adaptation = adapted("router_retriever")
    outcome = outcome_of(adaptation, "prototype")
    assert (outcome.parameters, outcome.learning_rate) == (0, None)
    routers = [load_run(folder / way, tasks=[]).model.base_model.routers() for way in ("prototype", "new_expert")]
    directions = [next(router).scorer.directions for router in routers]
    assert torch.equal(*directions)
    torch.testing.assert_close(directions[0].norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("method", ["moa", "router_retriever"])
def test_it_is_told_which_prompts_find_the_new_expert(adapted, method):
    folder, adaptation = adapted(method)
    drawn = outcome_of(adaptation, "new_expert").drawn
    assert 0 <= drawn.own <= 1
    assert 0 <= drawn.others <= 1
    assert "where no task is named, the router sends" in (folder / "adapt.md").read_text()


def test_shots_are_drawn_by_the_seed(runs):
    task = encode_tasks(load_run(runs("mhr")))[0]
    drawn = [with_shots(task, 8, seed).examples["train"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 8
    assert with_shots(task, 8, 0).examples["test"] == task.examples["test"]
    assert len(with_shots(task, None, 0).examples["train"]) == 24


def test_the_same_seed_gives_the_same_hub(adapted, runs, place, tmp_path):
    settings = AdaptConfig(ways=("row",), shots=8, steps=4)
    adapt_run(runs("poly"), place / "tasks" / NEW, tmp_path / "to", settings)
    files = [
        folder / "row" / "mixture" / "adapter_model.safetensors" for folder in (tmp_path / "to", adapted("poly")[0])
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_way_that_breaks_its_promise_fails_loudly_and_leaves_the_figures(runs, place, tmp_path, monkeypatch):
    monkeypatch.setattr(Held, "restore", lambda self: None)  # weight decay then moves the experts of all tasks
    message = r"new_expert moved task 'colour', which it must not: logits differ by up to .*; see .*adapt.md"
    with pytest.raises(AdapterError, match=message):
        adapt_run(runs("moa"), place / "tasks" / NEW, tmp_path / "to", AdaptConfig(ways=("new_expert",), steps=4))
    ways = json.loads((tmp_path / "to" / "adapt.json").read_text())["ways"]
    assert not ways[2]["others"]["colour"]["bit_equal"]
    assert ways[2]["others_told"].startswith("moved: ")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "mhr",
            {"ways": ["new_expert"]},
            r"--ways new_expert: method 'mhr': it gives the task no expert of its own; it ",
        ),
        (
            "moa",
            {"ways": ["row"]},
            r"--ways row: method 'moa': nothing in it says, task by .* can: mean_expert, new_exp",
        ),
        ("moa", {"ways": ["prototype"]}, "method 'moa': it has no router that finds experts by prototypes of prompts"),
        (
            "arrow",
            {"ways": ["new_expert"]},
            "tokens of all tasks choose among all its experts, so a new one would move",
        ),
        ("mhr", {"method_options": {"skils": 3}}, "--method-option skils: no option of 'mhr'; did you mean 'skills'?"),
        ("mhr", {"method_options": {"rank": 3}}, r"--method-option rank: the run gives it for all tasks at once \(2\)"),
        (
            "madx",
            {},
            r"method 'madx' wants languages of 'home': --method-option languages=... \(colour: en, sound: en\)",
        ),
    ],
)
def test_what_a_hub_cannot_do_is_refused_with_the_reason(runs, place, tmp_path, method, settings, message):
    with pytest.raises(ConfigError, match=message):
        adapt_run(runs(method), place / "tasks" / NEW, tmp_path / "to", parse(AdaptConfig, settings, where="settings"))


def test_a_task_that_cannot_join_is_refused(adapted, runs, place, tmp_path):
    with pytest.raises(ConfigError, match="one task joins at a time, and here are colour, sound, home"):
        adapt_run(runs("mhr"), place / "tasks" / "tasks.yaml", tmp_path / "to", AdaptConfig())
    with pytest.raises(ConfigError, match="mhr has a task 'sound'; give the new one another name"):
        adapt_run(runs("mhr"), place / "tasks" / "sound", tmp_path / "to", AdaptConfig())
    with pytest.raises(DataError, match="--shots 25: task 'home' has 24 training examples"):
        adapt_run(runs("mhr"), place / "tasks" / NEW, tmp_path / "to", AdaptConfig(shots=25))
    with pytest.raises(ConfigError, match="exists and is not empty; name a new folder"):
        adapt_run(runs("mhr"), place / "tasks" / NEW, adapted("mhr")[0], AdaptConfig())
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": ["rwo"]}, "ways: no way 'rwo'; did you mean 'row'?"),
        ({"learning_rates": {"scrach": 0.1}}, "learning_rates: no way 'scrach'; did you mean 'scratch'?"),
        ({"learning_rates": {"row": 0.0}}, "learning_rates: row=0.0 must be above 0 and finite"),
        ({"shots": 0}, r"shots \(=0\) must be at least 1"),
        ({"steps": 0}, r"steps \(=0\) must be at least 1"),
        ({"seed": -1}, r"seed \(=-1\) must be in \[0, 2\*\*32\)"),
    ],
)
def test_settings_are_checked_before_anything_runs(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse(AdaptConfig, settings, where="settings")


def test_the_commands_in_the_documentation_are_understood(repository):
    page = (repository / "docs" / "adapting.md").read_text()
    lines = [shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("loramux ")]
    shown = [build_parser().parse_args(words[1:]) for words in lines]
    assert [parsed.command for parsed in shown] == ["train", "adapt"]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == {"base", "scratch", *WAYS}
