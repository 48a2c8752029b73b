"""What a run leaves to be read: one table, its data, its pictures, and exports that do what the table says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from training_cases import make_recipe, write_base, write_tasks

from loramux.adapters import ExportConfig
from loramux.support.errors import ConfigError, RunError
from loramux.training.assess import MARKDOWN, draw_report, encode_tasks, read_results
from loramux.training.exports import export_run, identity_of
from loramux.training.main_job import evaluate_job, matched_lora_recipe, new_run_folder, train_job
from loramux.training.report import Results, TaskInfo, gain, header, markdown_table, percent, rows, show, to_markdown
from loramux.training.run import load_run, train_run

PICTURES = ["losses.png", "routing.png", "scores.png"]


def some_results(**scores: dict[str, float]) -> Results:
    """A table of two tasks, given per column as {"who": score, "where": score}."""
    tasks = [TaskInfo("who", "accuracy", "says | who"), TaskInfo("where", "accuracy")]
    columns = {c: {t: {"accuracy": v, "loss": 1.0} for t, v in found.items()} for c, found in scores.items()}
    return Results(title="moa", run={"split": "test", "options": {"rank": 4}}, tasks=tasks, scores=columns)


def test_the_table_shows_scores_gains_mean_and_worst_task() -> None:
    results = some_results(
        named={"who": 0.9, "where": 0.5}, base={"who": 0.1, "where": 0.0}, lora={"who": 0.9, "where": 0.25}
    )
    assert header(results) == ["task", "metric", "base", "matched LoRA", "task named", "vs base", "vs LoRA"]
    assert rows(results) == [
        ["who", "accuracy", "10.0", "90.0", "90.0", "+80.0", "0.0"],
        ["where", "accuracy", "0.0", "25.0", "50.0", "+50.0", "+25.0"],
        ["mean", "", "5.0", "57.5", "70.0", "+65.0", "+12.5"],
        ["worst task", "", "0.0", "25.0", "50.0", "+50.0", "+25.0"],
    ]


def test_gains_are_of_the_named_task_and_of_the_router_where_naming_changes_nothing() -> None:
    scores = {"who": 0.5, "where": 0.5}
    assert some_results(auto=scores, named=scores).main_column == "named"
    assert some_results(auto=scores, base=scores).main_column == "auto"
    assert some_results(adapted=scores, base=scores).main_column == "adapted"
    assert some_results(base=scores).main_column is None


def test_a_task_that_was_not_exported_has_no_score_and_spoils_the_mean() -> None:
    results = some_results(named={"who": 0.5, "where": 0.5}, exported={"who": 0.5})
    assert [line[3] for line in rows(results)] == ["50.0", "-", "-", "-"]
    assert (percent(None), gain(None, 0.5), gain(0.25, 0.25)) == ("-", "-", "0.0")


def test_results_survive_the_way_through_json() -> None:
    results = some_results(named={"who": 0.9, "where": 0.5}, base={"who": 0.1, "where": 0.0})
    data = json.loads(json.dumps(results.to_data()))
    assert Results.from_data(data, "results.json") == results
    assert data["summary"]["named"] == {"mean": 0.7, "worst": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 9}, "results.json: format 9 is not 1"), ({"tasks": [{"nome": "x"}]}, "not a results file .*nome")],
)
def test_results_of_another_kind_are_refused(change: dict, message: str) -> None:
    data = {**some_results(base={"who": 0.1, "where": 0.0}).to_data(), **change}
    with pytest.raises(RunError, match=message):
        Results.from_data(data, "results.json")


def test_markdown_tables_line_up_and_escape_what_would_break_them() -> None:
    assert markdown_table(["task", "x"], [["a|b", "1"]]) == "\n".join(
        ["| task |   x |", "| ---- | --: |", "| a\\|b |   1 |"]
    )
    text = to_markdown(some_results(named={"who": 0.9, "where": 0.5}))
    assert "- `who`: says | who" in text
    assert "- options: rank=4" in text


def test_the_caption_names_the_tasks_that_were_scored_on_another_split(capsys: pytest.CaptureFixture[str]) -> None:
    results = some_results(named={"who": 0.9, "where": 0.5})
    assert "on the test split, in per cent" in to_markdown(results)
    some = replace(results, run={**results.run, "split_per_task": {"who": "test", "where": "validation"}})
    assert "on the test split (validation for: where), in per cent" in to_markdown(some)
    show(some)
    assert "on the test split (validation for: where)" in " ".join(capsys.readouterr().out.split())


def test_new_runs_never_take_a_used_folder(tmp_path: Path) -> None:
    assert new_run_folder("moa", tmp_path) == tmp_path / "moa"
    (tmp_path / "moa").mkdir()
    (tmp_path / "moa-2").mkdir()
    assert new_run_folder("moa", tmp_path) == tmp_path / "moa-3"


def test_a_folder_without_results_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no results.json there; run `loramux evaluate"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 1,\n"tasks": [')
    with pytest.raises(RunError, match=r"results.json, line 2: .*run `loramux evaluate"):
        draw_report(tmp_path)


# ---------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job on a tiny base with three tiny tasks, by a method whose router reads prompts."""
    folder = tmp_path_factory.mktemp("job")
    base, tasks = write_base(folder / "base"), write_tasks(folder / "tasks")
    recipe = make_recipe(base, tasks, "base.known_as=someone/tiny", "method.name=moa", "train.learning_rate=0.02")
    train_job(recipe, folder / "run")
    return folder / "run"


def test_the_main_job_scores_everything_there_is_to_compare(run: Path) -> None:
    results = read_results(run)
    assert results.columns == ["base", "lora", "auto", "named", "exported"]
    assert [task.name for task in results.tasks] == ["colour", "sound", "home"]
    assert results.run["base"] == "someone/tiny"
    assert results.run["examples_per_task"] == {"colour": 6, "home": 6, "sound": 6}
    assert results.run["split_per_task"] == dict.fromkeys(("colour", "sound", "home"), "test")
    assert results.run["matched_lora"]["rank"] == 6  # three experts of rank 2
    assert all(results.routing_accuracy(task) is not None for task in results.tasks)


def test_the_matched_lora_differs_from_the_run_in_its_method_only(run: Path) -> None:
    recipe = load_run(run).recipe
    other = matched_lora_recipe(recipe, 6)
    assert other.method.name == "lora"
    assert (other.train, other.mixture, other.tasks, other.base) == (
        recipe.train,
        recipe.mixture,
        recipe.tasks,
        recipe.base,
    )
    tuned = make_recipe(Path("b"), Path("t"), "baseline.learning_rate=0.5")
    assert matched_lora_recipe(tuned, 6).train.learning_rate == 0.5


def test_stock_peft_gives_every_export_the_routed_models_answers(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 3 * 6
    by_place = {(line["column"], line["task"], line["index"]): line for line in lines}
    for (column, task, index), line in by_place.items():
        if column == "exported":
            routed = by_place["named", task, index]
            assert line["log_likelihood"] == pytest.approx(routed["log_likelihood"], abs=1e-3)
            assert line["prediction"] == routed["prediction"]
    results = read_results(run)
    assert results.exports.keys() == {"colour", "home", "sound"}
    assert all(facts["how"] == "exact" for facts in results.exports.values())


def test_the_card_of_an_export_tells_nothing_about_the_machine(run: Path) -> None:
    card = (run / "exports" / "home" / "README.md").read_text()
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert (recipe["base"]["model"], recipe["tasks"]) == ("someone/tiny", "tasks.yaml")
    written = [file.read_text() for file in (run / "exports").rglob("*") if file.suffix in (".md", ".json")]
    assert not [text for text in written if ".." in text or str(run.parent) in text]


def test_adapters_change_answers_and_differ_by_task(run: Path) -> None:
    results = read_results(run)
    losses = {
        column: [results.scores[column][task.name]["loss"] for task in results.tasks] for column in results.columns
    }
    assert all(trained < base for trained, base in zip(losses["named"], losses["base"], strict=True))
    assert losses["named"] != pytest.approx(losses["auto"], abs=1e-3)


def test_the_report_can_be_made_anew_from_the_folder(run: Path) -> None:
    table = (run / MARKDOWN).read_text()
    drawn = {name: (run / name).read_bytes() for name in PICTURES}
    for name in (MARKDOWN, *PICTURES):
        (run / name).unlink()
    assert sorted(path.name for path in draw_report(run)) == PICTURES
    assert (run / MARKDOWN).read_text() == table
    for name, content in drawn.items():
        assert (run / name).read_bytes()[:8] == content[:8] == b"\x89PNG\r\n\x1a\n"


def test_evaluating_again_gives_the_same_figures(run: Path) -> None:
    before = read_results(run)
    trained = load_run(run)
    assert evaluate_job(trained, trained.recipe.evaluate, quiet=True) == before


def test_routing_is_noted_by_task(run: Path) -> None:
    usage = json.loads((run / "routing.json").read_text())
    assert usage["tasks"] == ["colour", "sound", "home"]
    assert [sum(row) for row in usage["layers"]["prompt"]["usage"]] == pytest.approx([1, 1, 1], abs=1e-4)


def test_a_job_without_a_public_base_exports_nothing_until_it_is_resumed_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tasks = write_base(tmp_path / "base"), write_tasks(tmp_path / "tasks")
    recipe = make_recipe(base, tasks, "method.name=multilora", "baseline.enabled=false", "train.steps=2")
    results = train_job(recipe, tmp_path / "run")
    assert results.columns == ["base", "adapted"]
    assert "no exports: base" in capsys.readouterr().out
    assert not (tmp_path / "run" / "exports").exists()
    known = replace(recipe, base=replace(recipe.base, known_as="someone/tiny"))
    assert train_job(known, tmp_path / "run", resume=True).columns == ["base", "adapted", "exported"]
    assert identity_of(load_run(tmp_path / "run")).name == "someone/tiny"


@pytest.mark.parametrize("setting", ["train.start_from", "train.only_tasks"])
def test_no_matched_lora_stands_beside_training_it_could_not_share(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    value = {"train.start_from": str(run), "train.only_tasks": "[home]"}[setting]
    base, tasks = run.parent / "base", run.parent / "tasks" / "tasks.yaml"
    recipe = make_recipe(base, tasks, f"{setting}={value}", "train.steps=4", "export.enabled=false")
    assert train_job(recipe, tmp_path / "run").columns == ["base", "auto", "named"]
    assert "no matched LoRA: it would not have had the same training" in capsys.readouterr().out


def test_a_matched_lora_is_not_trained_on_other_examples_than_the_run_beside_it(tmp_path: Path) -> None:
    base, tasks = write_base(tmp_path / "base"), write_tasks(tmp_path / "tasks")
    recipe = make_recipe(base, tasks, "method.name=moa", "train.steps=4", "export.enabled=false")
    train_run(recipe, tmp_path / "run")
    file = tmp_path / "tasks" / "home" / "train.jsonl"
    listed = file.read_text()
    file.write_text(listed + listed.splitlines(keepends=True)[0])
    with pytest.raises(RunError, match=r"begun on other tasks \(home changed\)"):
        train_job(recipe, tmp_path / "run", resume=True)
    file.write_text(listed)
    assert "lora" in train_job(recipe, tmp_path / "run", resume=True).columns


def test_exports_that_would_lose_too_much_are_told_and_can_be_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No static LoRA of rank 1 does what a router of sixteen ranks does."""
    base, tasks = write_base(tmp_path / "base"), write_tasks(tmp_path / "tasks")
    changes = ["method.name=smora", "method.options={rank: 16, top_k: 2}", "baseline.enabled=false", "train.steps=30"]
    recipe = make_recipe(base, tasks, "base.known_as=someone/tiny", "train.learning_rate=0.1", *changes)
    train_job(recipe, tmp_path / "run")
    run = load_run(tmp_path / "run")
    settings = ExportConfig(max_kl=1e-9, rank=1, distil_steps=0)
    options = {"base": identity_of(run), "settings": settings, "only": ["home"]}
    written, refused = export_run(run, encode_tasks(run), tmp_path / "out", **options)
    assert (written, list(refused)) == ({}, ["home"])
    assert "over the bound" in refused["home"]
    assert not (tmp_path / "out" / "home").exists()
    written, refused = export_run(run, encode_tasks(run), tmp_path / "out", allow_lossy=True, **options)
    assert (list(written), refused) == (["home"], {})
    assert "Lossy export" in (tmp_path / "out" / "home" / "README.md").read_text()
    with pytest.raises(ConfigError, match="this run has no task 'hoem'; did you mean 'home'"):
        export_run(run, encode_tasks(run), tmp_path / "out", base=identity_of(run), only=["hoem"])


def test_the_report_names_what_was_not_exported_and_why() -> None:
    results = some_results(named={"who": 0.9, "where": 0.5})
    exports = {
        "who": {"how": "exact", "rank": 8, "token_kl": 0.0},
        "where": {"refused": "task 'where': lost too much."},
    }
    text = to_markdown(replace(results, exports=exports))
    assert "Not exported: task 'where': lost too much." in text
    assert "| who   | exact |    8 |" in text


def test_padding_and_tasks_without_a_test_split_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tasks = write_base(tmp_path / "base"), write_tasks(tmp_path / "tasks")
    (tmp_path / "tasks" / "home" / "test.jsonl").unlink()
    settings = ["mixture.bucket_by_length=false", "base.known_as=someone/tiny", "baseline.enabled=false"]
    results = train_job(make_recipe(base, tasks, "method.name=moa", *settings), tmp_path / "run")
    waste = results.run["padding_waste"]
    assert 0.1 < waste < 0.5  # prompts of 4 and of 8 words
    assert f"padding: {waste:.0%} of positions" in capsys.readouterr().out
    assert results.run["split_per_task"] == {"colour": "test", "sound": "test", "home": "validation"}
    text = (tmp_path / "run" / MARKDOWN).read_text()
    assert f"- padding waste: {waste:.4g}" in text
    assert "on the test split (validation for: home)" in text
    cards = {name: (tmp_path / "run" / "exports" / name / "README.md").read_text() for name in ("home", "sound")}
    assert "| system | validation metric |" in cards["home"]
    assert "| system | test metric |" in cards["sound"]
