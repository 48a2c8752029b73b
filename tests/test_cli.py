"""The command line as people use it: every command for real, every mistake one message and exit code 2."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_cases import write_base, write_tasks

from loramux.cli import main

SMALL = ["train.steps=4", "train.batch_size=6", "train.eval_every=4", "evaluate.limit=3", "method.options={rank: 2}"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_base(folder / "base")
    write_tasks(folder / "tasks")
    return folder


def settings(inputs: Path, *more: str) -> list[str]:
    places = [f"base.model={inputs / 'base'}", "base.known_as=someone/tiny", f"tasks={inputs / 'tasks'}"]
    return [part for text in (*places, *SMALL, *more) for part in ("--set", text)]


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    """A run made by the command line."""
    assert main(["train", "--to", str(inputs / "run"), *settings(inputs)]) == 0
    return inputs / "run"


def command(*arguments: str, **options: object) -> subprocess.Popen:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "loramux.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_help_needs_no_torch() -> None:
    code = "import sys; from loramux.cli.main import build_parser; build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "compare", "adapt", "export", "import", "routes", "methods", "tasks", "base"]
)
def test_every_command_explains_itself_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"examples:\n  loramux {name}" in capsys.readouterr().out


def test_train_leaves_a_folder_and_says_what_lies_where(run: Path) -> None:
    left = {path.name for path in run.iterdir()}
    assert {"results.md", "results.json", "scores.png", "losses.png", "routing.png", "predictions.jsonl"} <= left
    assert {path.name for path in (run / "exports").iterdir() if path.is_dir()} == {"colour", "home", "sound"}
    assert (run / "baseline" / "mixture").is_dir()


def test_evaluate_and_its_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--limit", "2", "--split", "validation"]) == 0
    assert json.loads((run / "results.json").read_text())["run"]["examples_per_task"]["home"] == 2
    assert "validation split" in capsys.readouterr().out
    (run / "results.md").unlink()
    assert main(["evaluate", str(run), "--report-only"]) == 0
    assert "matched LoRA" in (run / "results.md").read_text()
    assert "matched LoRA" in capsys.readouterr().out


def test_routes_shows_a_table_and_says_what_was_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["routes", str(run)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "prompt" in out
    assert "No tokens.html: moa decides once per prompt, not token by token." in out
    assert f"Written to {run}/routes: routing.png, over_time.png, similarity.png, routes.json" in out
    assert main(["routes", str(run), "--task", "home", "--to", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "routes.json").read_text())["tasks"] == ["home"]
    assert "No similarity.png: it takes two tasks or more" in capsys.readouterr().out


def test_export_some_and_all(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--task", "home", "--to", str(tmp_path / "one")]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["home"]
    assert main(["export", str(run), "--all", "--to", str(tmp_path / "all"), "--base-id", "other/name"]) == 0
    config = json.loads((tmp_path / "all" / "sound" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "other/name"
    assert "exact" in capsys.readouterr().out


def test_export_a_blend(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--blend", "home=0.3,sound=0.7", "--to", str(tmp_path / "blends")]) == 0
    folder = tmp_path / "blends" / "home-0.3-sound-0.7"
    report = json.loads((folder / "export.json").read_text())
    assert (report["task"], report["how"]) == ("0.3 home + 0.7 sound", "exact")
    assert "# 0.3 home + 0.7 sound" in (folder / "README.md").read_text()
    assert "0.3 home + 0.7 sound" in capsys.readouterr().out


def test_resume_takes_the_runs_own_recipe_and_finishes_what_is_missing(
    inputs: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "mixture" / "adapter_model.safetensors").read_bytes()
    assert main(["train", "--resume", "--to", str(run)]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert (run / "mixture" / "adapter_model.safetensors").read_bytes() == before


def test_compare(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = settings(inputs, "method.options={}", "export.enabled=false")
    to = ["--to", str(tmp_path / "c")]
    assert main(["compare", "--methods", "moa", "--method-option", "moa.rank=2", *to, *options]) == 0
    assert "lora r6" in capsys.readouterr().out
    assert main(["compare", "--report-only", *to]) == 0
    assert "lora r6" in capsys.readouterr().out


def test_adapt_takes_a_task_in_and_leaves_runs_that_other_commands_take(
    inputs: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(inputs / "tasks" / "home", tmp_path / "house")
    settings = ["--shots", "8", "--steps", "4", "--ways", "new_expert", "--learning-rate", "new_expert=0.01"]
    to = ["--to", str(tmp_path / "to")]
    assert main(["adapt", str(run), "--task", str(tmp_path / "house"), *settings, *to]) == 0
    out = capsys.readouterr().out
    assert re.search(r"new_expert │ .* │  0.01 │ .* bit-equal │", out)
    adapted = tmp_path / "to" / "new_expert"
    assert main(["evaluate", str(adapted), "--limit", "2"]) == 0
    assert main(["export", str(adapted), "--task", "house", "--to", str(tmp_path / "exports")]) == 0
    assert (tmp_path / "exports" / "house" / "adapter_model.safetensors").is_file()


def test_methods_lists_sizes_on_a_model(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--model", str(inputs / "base"), "--tasks", "3", "--rank", "2"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert "sequence" in rows["moa"]
    assert "rank 6" in rows["moa"]  # three experts of rank 2
    assert "top_k (=8) must be at most rank (=2)" in rows["smora"]
    assert main(["methods", "smora"]) == 0
    out = capsys.readouterr().out
    assert "arXiv:2501.15103" in out
    assert "top_k = 8" in out


def test_tasks_shows_sizes_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "--examples", "2"]) == 0
    out = capsys.readouterr().out
    assert "one of 5" in out
    assert out.count("\n    -> ") == 16


def test_base_writes_a_folder_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["base", "--to", str(tmp_path / "tiny")]) == 0
    assert (tmp_path / "tiny" / "model.safetensors").is_file()
    assert main(["base", "--to", str(tmp_path / "tiny")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "train.stesp=3"], "train.stesp: unknown key; did you mean 'steps'?"),
        (["train", "--set", "method.name=smroa", "--to", "{tmp}/x"], "unknown method 'smroa'; did you mean 'smora'?"),
        (
            ["train", "--set", "method.options={rank: 100}", "--to", "{tmp}/w"],
            "rank 100 are more than a linear of 128 x",
        ),
        (["train", "--set", "tasks=nowhere.yaml", "--to", "{tmp}/y"], "nowhere.yaml: no such"),
        (["train", "no_such.yaml"], "no_such.yaml: no such file"),
        (["train", "--resume"], "--resume: say which run with --to RUN"),
        (["train", "--resume", "--to", "{tmp}/none"], "not a run folder"),
        (["train", "--to", "{run}"], "holds a finished run; resume it"),
        (["evaluate", "{tmp}/none"], "not a run folder"),
        (["evaluate", "{tmp}/none", "--report-only"], "no results.json there"),
        (["export", "{tmp}/none", "--all", "--to", "{tmp}/e"], "not a run folder"),
        (["export", "{run}", "--task", "soud", "--to", "{tmp}/e"], "no task 'soud'; did you mean 'sound'?"),
        (
            ["export", "{run}", "--blend", "home=half", "--to", "{tmp}/e"],
            "as TASK=SHARE,..., for example who=0.3,where",
        ),
        (["export", "{run}", "--blend", "soud=1", "--to", "{tmp}/e"], "no task 'soud'; did you mean 'sound'?"),
        (["export", "{run}", "--blend", "home=0.3,sound=0.6", "--to", "{tmp}/e"], "tasks must sum to one, got [0.9"),
        (["routes", "{tmp}/none"], "not a run folder"),
        (["routes", "{run}", "--task", "soud"], "no task 'soud'; did you mean 'sound'?"),
        (["routes", "{run}/baseline"], "method 'lora' has no router: all is always on, so there are no routes to show"),
        (["compare", "--to", "{tmp}/c"], "--methods: name at least one"),
        (["compare", "--to", "{tmp}/c", "--report-only"], "no comparison.json there"),
        (["compare", "--to", "{tmp}/c", "--methods", "moa", "--seeds", "-1"], "seed (=-1) must be in [0, 2**32)"),
        (["compare", "--to", "{tmp}/c", "--methods", "moa", "--learning-rates", "1e-3,0"], "(=0.0) must be above 0"),
        (
            ["compare", "--to", "{tmp}/c", "--methods", "moa", "--method-option", "rank=2"],
            "write it as METHOD.KEY=VALUE",
        ),
        (
            ["adapt", "{tmp}/none", "--task", "default", "--to", "{tmp}/a"],
            "one task joins at a time, and here are who, ",
        ),
        (["adapt", "{tmp}/none", "--task", "{tasks}/home", "--to", "{tmp}/a"], "not a run folder"),
        (
            ["adapt", "{run}", "--task", "{tasks}/home", "--to", "{tmp}/a"],
            "has a task 'home'; give the new one another",
        ),
        (["adapt", "x", "--task", "y", "--to", "z", "--ways", "rwo"], "ways: no way 'rwo'; did you mean 'row'?"),
        (
            ["adapt", "x", "--task", "y", "--to", "z", "--learning-rate", "row"],
            "write it as R or WAY=R, for example row",
        ),
        (["adapt", "x", "--task", "y", "--to", "z", "--method-option", "de"], "as KEY=VALUE, for example languages=de"),
        (["methods", "moe"], "unknown method 'moe'; did you mean 'moa'?"),
        (["methods", "--model", "{tmp}"], "has no config.json"),
        (["tasks", "{tmp}/none.yaml"], "none.yaml: no such"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    inputs: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"{tmp}": tmp_path, "{run}": run, "{tasks}": inputs / "tasks"}
    given = arguments
    for name, place in places.items():
        given = [text.replace(name, str(place)) for text in given]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"loramux {arguments[0]}: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["evaluate", "x", "--limit", "0"], ["compare", "--to", "x", "--seeds", "a"], []])
def test_arguments_that_cannot_be_read_are_refused_by_the_parser(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_an_error_in_a_process_of_its_own_has_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    process = command("evaluate", str(tmp_path / "none"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("loramux evaluate: ")
    assert "Traceback" not in errors


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_go_on(inputs: Path, tmp_path: Path) -> None:
    to = tmp_path / "run"
    # A shell that runs the tests in the background has them ignore Ctrl-C, and their children with them.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    recipe = settings(inputs, "train.steps=100000", "train.save_every=5")
    process = command("train", "--to", str(to), *recipe, **heeding)
    deadline = time.monotonic() + 200
    while not list(to.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"stopped; resume with: loramux train --resume --to {to}" in errors
    assert "Traceback" not in errors
    assert os.listdir(to / "checkpoints")
