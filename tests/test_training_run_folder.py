"""Run folders: which run they hold, what they tell about it, and what happens to them when work is interrupted."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from full_disk import files_limited_to
from safetensors.torch import load_file
from training_cases import make_recipe, write_base, write_tasks

from loramux.support.errors import LoramuxError, RunError
from loramux.training.run import load_run, train_run
from loramux.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return write_base(root / "base"), write_tasks(root / "tasks")


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_run(make_recipe(*places), folder, evaluate=None)
    return folder


@pytest.fixture
def copy(finished: Path) -> Path:
    """Beside the original, so that relative paths in its recipe still hold."""
    folder = finished.parent / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(finished, folder)


def test_a_finished_run_is_recognised_and_just_opened(places, finished: Path, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    train_run(make_recipe(*places), finished, resume=True, evaluate=None)
    assert "this run is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_a_used_folder_is_refused_without_resume(places, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds a finished run; resume it \(--resume\) or name another folder"):
        train_run(make_recipe(*places), finished, evaluate=None)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match=r"not empty and not a run folder \(no recipe.yaml\)"):
        train_run(make_recipe(*places), tmp_path, evaluate=None)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("{name: lora, options: {rank: 999}}", "experts of rank 999 are more than"),
        ("{name: alter, options: {rank: 2, gate_share: 0.01}}", "leaves no step for stage"),
    ],
)
def test_a_recipe_that_is_refused_leaves_no_folder_behind(places, tmp_path: Path, method: str, reason: str) -> None:
    with pytest.raises(LoramuxError, match=reason):
        train_run(make_recipe(*places, f"method={method}"), tmp_path / "run", evaluate=None)
    assert not list(tmp_path.iterdir())


def test_another_recipe_cannot_resume_a_run(places, copy: Path) -> None:
    shutil.rmtree(copy / "mixture")
    with pytest.raises(RunError, match="holds an unfinished run"):
        train_run(make_recipe(*places), copy, evaluate=None)
    message = r"made by another recipe \(method.options.rank was 2, now 3; train.seed was 0, now 7\)"
    with pytest.raises(RunError, match=message):
        train_run(make_recipe(*places, "train.seed=7", "method.options.rank=3"), copy, resume=True, evaluate=None)
    train_run(make_recipe(*places, "train.log_every=3"), copy, resume=True, evaluate=None)


@pytest.mark.parametrize("is_finished", [True, False])
def test_keys_that_change_nothing_learnt_can_be_changed_on_resume_and_stay(
    places, copy: Path, is_finished: bool
) -> None:
    if not is_finished:
        shutil.rmtree(copy / "mixture")
    changed = make_recipe(*places, "base.known_as=someone/tiny", "export.allow_lossy=true", "evaluate.limit=3")
    assert train_run(changed, copy, resume=True, evaluate=None).recipe == changed
    assert load_run(copy).recipe == changed
    assert "../" in (copy / "recipe.yaml").read_text()


def test_another_base_cannot_resume_or_open_a_run(places, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    recipe = make_recipe(base, places[1])
    train_run(recipe, tmp_path / "run", evaluate=None)
    write_base(base, seed=5)
    with pytest.raises(RunError, match=r"trained on another base model than .* \(its weights differ\)"):
        load_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "mixture")
    with pytest.raises(RunError, match="trained on another base model"):
        train_run(recipe, tmp_path / "run", resume=True, evaluate=None)


def test_other_training_data_cannot_resume_a_run_and_more_test_data_can(places, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    recipe = make_recipe(places[0], tasks)
    train_run(recipe, tmp_path / "run", evaluate=None)
    shutil.rmtree(tmp_path / "run" / "mixture")
    row = json.dumps({"prompt": "home of the cat", "completion": "sea"}) + "\n"
    with (tasks.parent / "home" / "test.jsonl").open("a") as file:
        file.write(row)
    train_run(recipe, tmp_path / "run", resume=True, evaluate=None)
    for split in ("train", "validation"):
        file = tasks.parent / "home" / f"{split}.jsonl"
        before = file.read_text()
        file.write_text(before + row)
        load_run(tmp_path / "run")  # a finished run may be looked at with any data
        shutil.move(tmp_path / "run" / "mixture", tmp_path / "mixture")
        with pytest.raises(RunError, match=r"begun on other tasks \(home changed\); give it the training and"):
            train_run(recipe, tmp_path / "run", resume=True, evaluate=None)
        shutil.move(tmp_path / "mixture", tmp_path / "run" / "mixture")
        file.write_text(before)


def test_tasks_that_came_went_or_moved_cannot_resume_a_run(places, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    listed = tasks.read_text()
    recipe = make_recipe(places[0], tasks)
    train_run(recipe, tmp_path / "run", evaluate=None)
    shutil.rmtree(tmp_path / "run" / "mixture")
    home = "  - {name: home, source: {path: home}}\n"
    for changed, message in (
        (listed.replace("name: home", "name: house"), "home is gone, house is new"),
        (listed.replace(home, "").replace("tasks:\n", f"tasks:\n{home}"), "in another order"),
        (listed.replace("max_new_tokens: 2", "max_new_tokens: 3"), "colour changed, sound changed, home changed"),
    ):
        tasks.write_text(changed)
        with pytest.raises(RunError, match=rf"begun on other tasks \({message}\)"):
            train_run(recipe, tmp_path / "run", resume=True, evaluate=None)
    tasks.write_text(listed)
    train_run(recipe, tmp_path / "run", resume=True, evaluate=None)


def test_a_lost_end_of_training_is_done_again_with_the_same_result(places, finished: Path, copy: Path) -> None:
    shutil.rmtree(copy / "mixture")
    shutil.rmtree(copy / "checkpoints" / "step-00000008")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')
    train_run(make_recipe(*places), copy, resume=True, evaluate=None)
    assert (copy / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    for name, tensor in load_file(finished / "mixture" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(copy / "mixture" / "adapter_model.safetensors")[name], tensor)


@pytest.mark.parametrize(("limit", "file"), [(12_000, "step-00000004"), (100, "metrics.jsonl")])
def test_a_disk_that_fills_up_costs_no_finished_work(
    places, finished: Path, tmp_path: Path, limit: int, file: str
) -> None:
    recipe = make_recipe(*places, "train.save_every=2")
    with ExitStack() as disk:

        def fill_up(_model: torch.nn.Module, step: int) -> dict[str, float]:
            disk.enter_context(files_limited_to(limit))
            return {"loss": 1.0}

        with pytest.raises(RunError, match=rf"could not write .*{file}: .*; what was there before is untouched"):
            train_run(recipe, tmp_path / "run", evaluate=fill_up)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    train_run(recipe, tmp_path / "run", resume=True, evaluate=None)
    for name, tensor in load_file(finished / "mixture" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "run" / "mixture" / "adapter_model.safetensors")[name], tensor)


def test_a_folder_that_cannot_be_made_is_an_error_and_no_traceback(places, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"could not write .*file/run: Not a directory"):
        train_run(make_recipe(*places), tmp_path / "file" / "run", evaluate=None)


def test_a_mixture_that_cannot_be_written_leaves_the_run_unfinished(places, copy: Path) -> None:
    shutil.rmtree(copy / "mixture")
    with files_limited_to(12_000), pytest.raises(RunError, match=r"could not write .*mixture: "):
        train_run(make_recipe(*places), copy, resume=True, evaluate=None)
    assert not RunFolder(copy).is_finished


def test_a_truncated_mixture_is_named(copy: Path) -> None:
    file = copy / "mixture" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"adapter_model.safetensors: \d+ bytes, \d+ were written"):
        load_run(copy)


def test_what_is_no_finished_run_cannot_be_opened(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder(tmp_path).read_recipe()
    shutil.rmtree(copy / "mixture")
    with pytest.raises(RunError, match="the run is not finished"):
        load_run(copy)


def test_a_line_of_the_metrics_that_cannot_be_read_is_named(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2: not readable as JSON"):
        RunFolder(copy).metrics()


def test_a_last_line_torn_by_a_kill_is_left_out(copy: Path) -> None:
    whole = RunFolder(copy).metrics()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "tr')
    assert RunFolder(copy).metrics() == whole


def test_the_environment_tells_versions_and_machine_but_not_where_it_ran(finished: Path) -> None:
    text = (finished / "environment.json").read_text()
    noted = json.loads(text)
    assert noted["seed"] == 0
    assert noted["processes"] == 1
    assert noted["packages"]["torch"] == torch.__version__
    assert noted["hardware"]["cpus"]
    assert list(noted["tasks"]) == ["colour", "sound", "home"]
    assert str(Path.home()) not in text
    assert str(finished.parent) not in text
