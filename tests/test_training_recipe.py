"""Recipes: what is wrong is named by file and key, and paths mean what their writer meant."""

from pathlib import Path

import pytest
import yaml

from loramux.bases import BaseIdentity
from loramux.support.errors import ConfigError
from loramux.training.recipe import Recipe, dump_recipe, load_recipe, public_recipe


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_no_file_gives_the_default_job() -> None:
    recipe = load_recipe()
    assert recipe == Recipe()
    assert (recipe.base.model, recipe.tasks) == ("loramux/tiny", "default")


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "train: {steps: 7, seed: 3}\nmethod: {name: smora, options: {rank: 16}}\n")
    recipe = load_recipe(file, ["train.steps=9", "method.options.top_k=2"])
    assert (recipe.train.steps, recipe.train.seed) == (9, 3)
    assert recipe.method.options == {"rank": 16, "top_k": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", r"--set: train.learning_rat: unknown key; did you mean 'learning_rate'\?"),
        ("trian.steps=1", r"unknown key; did you mean 'train'\?"),
        ("train.steps=many", r"train.steps: .*integer.*\(got 'many'\)"),
        ("train.steps=0", r"steps \(=0\) must be at least 1"),
        ("train.eval_every=0", r"eval_every \(=0\) must be at least 1"),
        ("train.warmup_ratio=1", r"warmup_ratio \(=1.0\) must be in \[0, 1\)"),
        ("train.learning_rate=0", r"learning_rate \(=0.0\) must be above 0 and finite"),
        ("train.learning_rate=.nan", r"learning_rate \(=nan\) must be above 0 and finite"),
        ("train.clip=-1", r"clip \(=-1.0\) must be above 0 and finite"),
        ("train.weight_decay=-1", r"weight_decay \(=-1.0\) must be 0 or more"),
        ("train.seed=-1", r"train: seed \(=-1\) must be in \[0, 2\*\*32\)"),
        ("train.seed=4294967296", r"seed \(=4294967296\) must be in"),
        ("baseline.learning_rate=0", r"baseline: learning_rate \(=0.0\) must be above 0 and finite"),
        ("baseline.learning_rate=.inf", r"learning_rate \(=inf\) must be above 0 and finite"),
        ("evaluate.limit=0", r"evaluate: limit \(=0\) must be at least 1"),
        ("evaluate.during_limit=-2", r"during_limit \(=-2\) must be at least 1"),
        ("evaluate.batch_size=0", r"batch_size \(=0\) must be at least 1"),
        ("train.schedule=sine", r"train.schedule: .*'cosine', 'linear' or 'constant'.*\(got 'sine'\)"),
        ("mixture.strategy=fair", r"mixture.strategy"),
        ("base.dtype=int8", r"base.dtype"),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, [override])


def test_a_wrong_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "train: {stepz: 7}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: train.stepz: unknown key; did you mean 'steps'\?"):
        load_recipe(file)


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine.yaml: a recipe is a mapping of keys, not list"):
        load_recipe(write(tmp_path / "mine.yaml", "- train\n"))


def test_paths_in_a_file_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job" / "base").mkdir(parents=True)
    (tmp_path / "job" / "tasks.yaml").write_text("tasks: []")
    file = write(tmp_path / "job" / "r.yaml", "tasks: tasks.yaml\nbase: {model: base}\n")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(file)
    assert recipe.tasks == str(tmp_path / "job" / "tasks.yaml")
    assert recipe.base.model == str(tmp_path / "job" / "base")


def test_paths_in_overrides_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "here.yaml").write_text("tasks: []")
    file = write(tmp_path / "job" / "r.yaml", "tasks: default\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(file, ["tasks=here.yaml"]).tasks == str(tmp_path / "here.yaml")


def test_sources_of_inline_tasks_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    file = write(tmp_path / "r.yaml", "tasks: [{name: who, source: {path: rows.jsonl}}]\n")
    recipe = load_recipe(file)
    assert isinstance(recipe.tasks, list)
    assert recipe.tasks[0]["source"]["path"] == str(tmp_path / "rows.jsonl")


def test_a_hub_id_stays_as_it_is() -> None:
    assert load_recipe(None, ["base.model=owner/name"]).base.model == "owner/name"


def test_what_is_written_reads_back_the_same_and_holds_no_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text("tasks: []")
    file = write(tmp_path / "r.yaml", "tasks: tasks.yaml\ntrain: {trackers: [tensorboard], clip: null}\n")
    recipe = load_recipe(file)
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    text = dump_recipe(recipe, folder)
    assert yaml.safe_load(text)["tasks"] == "../../tasks.yaml"
    assert load_recipe(write(folder / "recipe.yaml", text)) == recipe


def test_what_is_published_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    sources = [{"path": "../alice/rows.jsonl"}, {"dataset": "./alice/set"}, {"dataset": str(tmp_path / "alice/own")}]
    listed = [{"name": f"t{i}", "source": source} for i, source in enumerate(sources)]
    listed.append({"name": "glue", "source": {"dataset": "nyu-mll/glue", "name": "sst2"}})
    places = {"base": {"model": "./alice/base", "known_as": "someone/tiny"}, "train": {"start_from": "../runs/first"}}
    file = write(tmp_path / "r.yaml", yaml.safe_dump({"tasks": listed, **places}))
    text = public_recipe(load_recipe(file), BaseIdentity("someone/tiny", "abc"))
    shown = yaml.safe_load(text)
    assert (shown["base"]["model"], shown["base"]["revision"]) == ("someone/tiny", "abc")
    assert shown["train"]["start_from"] == "first"
    expected = [{"path": "rows.jsonl"}, {"dataset": "set"}, {"dataset": "own"}, listed[-1]["source"]]
    assert [task["source"] for task in shown["tasks"]] == expected
    assert "alice" not in text
    assert yaml.safe_load(public_recipe(Recipe(), BaseIdentity("loramux/tiny")))["tasks"] == "default"
