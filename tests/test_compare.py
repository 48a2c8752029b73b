"""Several methods side by side: the plain LoRA of each one's size always among them, nothing run twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from training_cases import make_recipe, write_base, write_tasks

from loramux.adapters import adapted_linears, adapter_parameters, matched_lora_rank
from loramux.bases import load_base
from loramux.support.errors import ConfigError, RunError
from loramux.training.compare import compare_methods, make_plan
from loramux.training.comparison import Comparison, draw_comparison, spread, summary_table, task_table
from loramux.training.main_job import matched_lora_recipe
from loramux.training.recipe import BaselineConfig, Recipe, load_recipe
from loramux.training.run import build_model
from loramux.training.run_folder import RunFolder

OPTIONS = {"moa": {"rank": 2}, "smora": {"rank": 8, "top_k": 2}}
OPTIONS_OF_MOA = {"moa": OPTIONS["moa"]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("inputs")
    base, tasks = write_base(folder / "base"), write_tasks(folder / "tasks")
    return make_recipe(base, tasks, "train.steps=4", "evaluate.limit=4", "export.enabled=false", "method.options={}")


@pytest.fixture(scope="module")
def compared(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two routed methods over two seeds and two learning rates."""
    folder = tmp_path_factory.mktemp("comparison")
    compare_methods(
        recipe, folder, methods=["smora", "moa"], seeds=[0, 1], learning_rates=[1e-5, 2e-2], options=OPTIONS
    )
    return folder


def test_every_method_meets_the_plain_lora_of_its_own_size(recipe: Recipe) -> None:
    made = make_plan(recipe, methods=["smora", "moa"], seeds=[0], learning_rates=[], options=OPTIONS)
    by_label = {contender.label: contender for contender in made.contenders}
    assert by_label["moa"].matched == "lora r6"
    assert set(by_label) == {"moa", "smora", by_label["moa"].matched, by_label["smora"].matched}
    for contender in made.contenders:
        if contender.matched is not None:
            lora = by_label[contender.matched].parameters
            per_rank = lora // contender.matched_rank
            assert abs(lora - contender.parameters) <= per_rank / 2
    assert made.learning_rates == dict.fromkeys(by_label, (recipe.train.learning_rate,))


def test_methods_of_nearly_one_size_share_a_plain_lora() -> None:
    options = {"moa": {"rank": 8}, "multilora": {"experts": 3, "rank": 21}, "smora": {"rank": 43}, "poly": {"rank": 8}}
    made = make_plan(load_recipe(), methods=list(options), seeds=[0], learning_rates=[], options=options)
    by_label = {contender.label: contender for contender in made.contenders}
    assert {name: by_label[name].matched for name in options} == {
        **dict.fromkeys(["moa", "multilora", "smora"], "lora r64"),
        "poly": "lora r32",
    }
    assert set(by_label) == {*options, "lora r64", "lora r32"}


def test_nobody_chose_the_rank_of_a_matched_lora_so_it_may_be_more_than_a_linear_can_hold(recipe: Recipe) -> None:
    options = {"moa": {"rank": 8}}
    made = make_plan(recipe, methods=["moa"], seeds=[0], learning_rates=[], options=options)
    assert [contender.label for contender in made.contenders] == ["lora r24", "moa"]
    base, _ = load_base(recipe.base.model)
    model = build_model(base, matched_lora_recipe(recipe, 24), ["colour", "sound", "home"])
    assert adapter_parameters(model.base_model) == made.contenders[0].parameters
    allowed = replace(recipe, method=replace(recipe.method, excess_rank=True))
    made = make_plan(allowed, methods=["moa"], seeds=[0], learning_rates=[], options={"moa": {"rank": 17}})
    assert [contender.label for contender in made.contenders] == ["lora r51", "moa"]


def test_plain_loras_take_the_baselines_own_rate_unless_rates_are_tried(recipe: Recipe) -> None:
    recipe = replace(recipe, baseline=BaselineConfig(learning_rate=0.5))
    made = make_plan(recipe, methods=["moa"], seeds=[0], learning_rates=[], options=OPTIONS_OF_MOA)
    assert made.learning_rates == {"lora r6": (0.5,), "moa": (recipe.train.learning_rate,)}
    made = make_plan(recipe, methods=["moa"], seeds=[0], learning_rates=[0.1, 0.2], options=OPTIONS_OF_MOA)
    assert made.learning_rates == {"lora r6": (0.1, 0.2), "moa": (0.1, 0.2)}


def test_the_recipes_options_are_the_defaults_of_its_own_method(recipe: Recipe) -> None:
    own = replace(recipe, method=replace(recipe.method, name="moa", options={"rank": 3, "dropout": 0.1}))
    made = make_plan(own, methods=["moa", "molora"], seeds=[0], learning_rates=[], options={"moa": {"rank": 2}})
    chosen = {contender.label: contender.options for contender in made.contenders}
    assert (chosen["moa"], chosen["molora"]) == ({"rank": 2, "dropout": 0.1}, {})


def test_a_plain_lora_with_options_of_its_own_stands_beside_the_matched_one(recipe: Recipe) -> None:
    options = {**OPTIONS_OF_MOA, "lora": {"rank": 6, "alpha": 12, "dropout": 0.0}}
    made = make_plan(recipe, methods=["lora", "moa"], seeds=[0], learning_rates=[], options=options)
    chosen = {contender.label: contender.options for contender in made.contenders}
    assert chosen["lora r6"] == {"rank": 6}
    assert chosen["lora r6 alpha 12"] == {"rank": 6, "alpha": 12}
    assert len(chosen) == 3


def test_sizes_are_those_of_the_built_model(recipe: Recipe) -> None:
    made = make_plan(recipe, methods=["lora"], seeds=[0], learning_rates=[], options={"lora": {"rank": 3}})
    (contender,) = made.contenders
    base, _ = load_base(recipe.base.model)
    plain = replace(recipe, method=replace(recipe.method, name="lora", options={"rank": 3}))
    model = build_model(base, plain, ["colour", "sound", "home"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hub = model.base_model
    assert contender.parameters == trained == adapter_parameters(hub)
    assert matched_lora_rank(trained, adapted_linears(hub)) == contender.matched_rank == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["moa", "moa"]}, "methods: moa, moa names one twice"),
        ({"seeds": [1, 1]}, "seeds: 1, 1 names one twice"),
        ({"methods": []}, "methods: name at least one"),
        ({"methods": ["smroa"]}, "unknown method 'smroa'; did you mean 'smora'?"),
        ({"options": {"smora": {}}}, "options for 'smora', which is not among the methods: moa"),
        ({"options": {"moa": {"rnak": 2}}}, "unknown option 'rnak'; did you mean 'rank'?"),
        ({"methods": ["lora"], "options": {"lora": {"alhpa": 2}}}, "'lora': unknown option 'alhpa'; did you mean 'alp"),
        ({"methods": ["lora"], "options": {"lora": {"rank": 0}}}, "method 'lora': rank: .*greater than 0"),
        ({"options": {"moa": {"rank": 17}}}, "method 'moa': experts of rank 17 are more than a linear of 32 x 16 can"),
        ({"methods": ["lora"], "options": {"lora": {"rank": 17}}}, "method 'lora': experts of rank 17 are more than"),
        ({"seeds": [0, -1]}, r"seeds: seed \(=-1\) must be in \[0, 2\*\*32\)"),
        ({"learning_rates": [0.1, 0.0]}, r"learning rates: learning_rate \(=0.0\) must be above 0 and finite"),
        ({"learning_rates": [-0.1]}, r"learning_rate \(=-0.1\) must be above 0 and finite"),
        ({"learning_rates": [float("nan")]}, r"learning_rate \(=nan\) must be above 0 and finite"),
        ({"learning_rates": [0.1, 0.1]}, "learning rates: 0.1, 0.1 names one twice"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_before_anything_runs(
    recipe: Recipe, changes: dict, message: str
) -> None:
    settings = {"methods": ["moa"], "seeds": [0], "learning_rates": [], "options": {}, **changes}
    with pytest.raises(ConfigError, match=message):
        make_plan(recipe, **settings)


@pytest.mark.parametrize("setting", ["train.start_from=runs/moa", "train.only_tasks=[home]"])
def test_methods_that_would_not_train_alike_are_not_compared(recipe: Recipe, setting: str) -> None:
    partly = make_recipe(Path(recipe.base.model), Path(str(recipe.tasks)), setting)
    with pytest.raises(ConfigError, match=r"train.start_from, train.only_tasks: every method is trained in full"):
        make_plan(partly, methods=["moa"], seeds=[0], learning_rates=[], options={})


def test_every_contender_gets_its_own_learning_rate_by_validation(compared: Path) -> None:
    data = json.loads((compared / "comparison.json").read_text())
    for entry in data["chosen"]:
        tried = {float(rate): score for rate, score in entry["tried"].items()}
        assert tried.keys() == {1e-5, 2e-2}
        assert tried[entry["learning_rate"]] == max(tried.values())
        assert list(entry["runs"]) == ["0", "1"]


def test_the_tables_are_made_of_the_runs_own_results(compared: Path) -> None:
    comparison = Comparison.load(compared)
    head, lines = summary_table(comparison)
    assert [line[0] for line in lines] == ["base", *(entry.label for entry in comparison.chosen)]
    assert head[:6] == ["method", "parameters", "rate", "mean", "worst task", "vs matched LoRA"]
    smora = next(entry for entry in comparison.chosen if entry.label == "smora")
    files = [json.loads((compared / run / "results.json").read_text()) for run in smora.runs.values()]
    means = [file["summary"]["auto"]["mean"] for file in files]
    assert comparison.means("smora") == pytest.approx(means)
    assert lines[[line[0] for line in lines].index("smora")][3] == spread(means)
    assert [line[0] for line in task_table(comparison)[1]] == ["colour", "sound", "home"]


def test_scores_over_seeds_come_with_their_spread() -> None:
    assert spread([0.5]) == "50.0"
    assert spread([0.4, 0.6]) == "50.0 +- 14.1"
    assert spread([]) == "-"


def test_a_second_call_runs_nothing_again(recipe: Recipe, compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = (compared / "comparison.md").read_text()
    compare_methods(
        recipe, compared, methods=["smora", "moa"], seeds=[0, 1], learning_rates=[1e-5, 2e-2], options=OPTIONS
    )
    assert "run 1 of" not in capsys.readouterr().out
    assert (compared / "comparison.md").read_text() == table


@pytest.fixture
def copy(compared: Path) -> Path:
    """Beside the original, so that relative paths in its recipes still hold."""
    folder = compared.parent / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(compared, folder, ignore=shutil.ignore_patterns("checkpoints"))


def test_only_weights_that_can_be_kept_count_when_a_rate_is_chosen(recipe: Recipe, copy: Path) -> None:
    """A run of moa keeps the best weights of its last stage, here of its last step."""
    before = Comparison.load(copy).chosen
    for file in (copy / "runs" / "moa").glob("lr-1e-05-*/metrics.jsonl"):
        file.write_text('{"step": 3, "eval/metric": 2.0}\n' + file.read_text())
    compare_methods(recipe, copy, methods=["smora", "moa"], seeds=[0, 1], learning_rates=[1e-5, 2e-2], options=OPTIONS)
    assert Comparison.load(copy).chosen == before


def test_runs_of_another_recipe_are_not_taken_for_finished(recipe: Recipe, copy: Path) -> None:
    longer = replace(recipe, train=replace(recipe.train, steps=6))
    with pytest.raises(RunError, match=r"lora-r6.lr-1e-05-seed-0: made by another recipe \(train.steps was 4, now 6\)"):
        compare_methods(longer, copy, methods=["moa"], learning_rates=[1e-5], options=OPTIONS_OF_MOA)


def test_runs_on_other_examples_are_not_mixed_into_one_table(recipe: Recipe, copy: Path, tmp_path: Path) -> None:
    changed = replace(recipe, tasks=str(shutil.copytree(Path(recipe.tasks).parent, tmp_path / "tasks") / "tasks.yaml"))
    for run in (RunFolder(file.parent) for file in copy.rglob("recipe.yaml")):
        run._write_recipe(replace(run.read_recipe(), tasks=changed.tasks))
    (tmp_path / "tasks" / "home" / "test.jsonl").write_text('{"prompt": "home of the cat", "completion": "land"}\n')
    made = compare_methods(changed, copy, methods=["moa"], learning_rates=[1e-5], options=OPTIONS_OF_MOA)
    for label in ("lora r6", "moa"):
        assert made.results[label][0].run["examples_per_task"] == {"colour": 4, "sound": 4, "home": 1}
    train = tmp_path / "tasks" / "home" / "train.jsonl"
    train.write_text(train.read_text().replace("home", "house", 1))
    with pytest.raises(RunError, match=r"lora-r6/lr-1e-05-seed-0: begun on other tasks \(home changed\)"):
        compare_methods(changed, copy, methods=["moa"], learning_rates=[1e-5], options=OPTIONS_OF_MOA)


@pytest.mark.parametrize("changes", [{"limit": 2}, {"split": "validation"}], ids=["limit", "split"])
def test_runs_measured_otherwise_are_measured_again(
    recipe: Recipe, copy: Path, capsys: pytest.CaptureFixture[str], changes: dict
) -> None:
    changed = replace(recipe, evaluate=replace(recipe.evaluate, **changes))
    made = compare_methods(changed, copy, methods=["moa"], learning_rates=[1e-5], options=OPTIONS_OF_MOA)
    for label in ("lora r6", "moa"):
        (results,) = made.results[label]
        assert changes.items() <= results.run["evaluate"].items()
        assert set(results.run["examples_per_task"].values()) == {changes.get("limit", 4)}
    assert "run 1 of" not in capsys.readouterr().out
    figures = (copy / "runs" / "moa" / "lr-1e-05-seed-0" / "results.json").stat().st_mtime_ns
    compare_methods(changed, copy, methods=["moa"], learning_rates=[1e-5], options=OPTIONS_OF_MOA)
    assert (copy / "runs" / "moa" / "lr-1e-05-seed-0" / "results.json").stat().st_mtime_ns == figures


def test_the_report_is_made_anew_from_the_run_folders(compared: Path, tmp_path: Path) -> None:
    table = (compared / "comparison.md").read_text()
    moved = tmp_path / "elsewhere"
    shutil.copytree(compared, moved, ignore=shutil.ignore_patterns("*.png", "*.md", "checkpoints"))
    assert [path.name for path in draw_comparison(moved)] == ["scores.png", "losses.png"]
    assert (moved / "comparison.md").read_text() == table
    assert (moved / "routing" / "moa" / "routing.png").is_file()
    assert (moved / "routing" / "smora" / "routing" / "layer-0.png").is_file()


def test_the_table_names_the_tasks_that_have_no_test_split(compared: Path, tmp_path: Path) -> None:
    assert "test split, seeds 0, 1" in (compared / "comparison.md").read_text()
    moved = shutil.copytree(compared, tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoints"))
    for file in moved.rglob("results.json"):
        results = json.loads(file.read_text())
        results["run"]["split_per_task"]["home"] = "validation"
        file.write_text(json.dumps(results))
    draw_comparison(moved)
    assert "test split (validation for: home), seeds 0, 1" in (moved / "comparison.md").read_text()


def test_a_folder_that_holds_no_comparison_is_named(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no comparison.json there; run `loramux compare"):
        Comparison.load(tmp_path)
    (tmp_path / "comparison.json").write_text('{"chosen": [{"contender": {}}]}')
    with pytest.raises(RunError, match=r"comparison.json: not a comparison"):
        Comparison.load(tmp_path)
