"""Imported experts as run folders: made, loaded, served, evaluated, exported, trained on, and refused in time."""

import ast
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from cases import a_batch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training_cases import make_recipe, write_base, write_tasks
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from loramux.cli import main
from loramux.cli.main import build_parser
from loramux.serving.config import ServeConfig
from loramux.serving.launch import open_service
from loramux.support.config import parse
from loramux.support.errors import AdapterError, ConfigError, LoramuxError, RunError
from loramux.support.identity import BaseIdentity
from loramux.training.assess import encode_tasks
from loramux.training.exports import export_run
from loramux.training.imports import Imported, import_recipe, import_run
from loramux.training.main_job import evaluate_job
from loramux.training.recipe import (
    BaseConfig,
    EvaluateConfig,
    Recipe,
    TrainConfig,
    load_recipe,
    public_recipe,
)
from loramux.training.run import load_run, train_run
from loramux.training.warm_start import fetch_lora

SHAPES: dict[str, dict] = {
    "colour": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "sound": {"r": 3, "use_rslora": True, "target_modules": ["up_proj", "down_proj"]},
    "home": {"r": 4, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 1}},
}
TASKS = list(SHAPES)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("places")
    return write_base(root / "base"), write_tasks(root / "tasks")


@pytest.fixture(scope="module")
def loras(places: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each task a LoRA by stock PEFT, random in A and B; its config names the folder of the base."""
    root = tmp_path_factory.mktemp("loras")
    for seed, (task, shape) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **shape)
        get_peft_model(bare(places), config).save_pretrained(root / task)
    return {task: root / task for task in SHAPES}


def bare(places: tuple[Path, Path]) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(places[0]).eval()


def recipe_for(
    experts: dict[str, Path], places: tuple[Path, Path], *overrides: str, method: str = "moa", tasks: bool = True
) -> Recipe:
    given = [f"{task}={folder}" for task, folder in experts.items()]
    return import_recipe(given, method=method, tasks=str(places[1]) if tasks else None, overrides=overrides)


@torch.no_grad()
def logits(model: torch.nn.Module, **routing: str) -> torch.Tensor:
    ids = a_batch()["input_ids"] % 23
    return model(input_ids=ids, **routing).logits


def stock_logits(places: tuple[Path, Path], lora: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(bare(places), lora).eval())


def experts_of(mixture: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_file(mixture / "adapter_model.safetensors").items() if ".bank." in name}


def routers_of(mixture: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_file(mixture / "adapter_model.safetensors").items() if ".bank." not in name}


# ---------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def imported(places, loras, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Imported], list[str]]:
    folder = tmp_path_factory.mktemp("imported") / "hub"
    return (folder, *import_run(recipe_for(loras, places), folder))


def test_peft_loads_the_mixture_and_each_task_is_its_adapter(places, loras, imported) -> None:
    folder, experts, _ = imported
    model = PeftModel.from_pretrained(bare(places), folder / "mixture").eval()
    for task, lora in loras.items():
        torch.testing.assert_close(logits(model, routing_tasks=task), stock_logits(places, lora), atol=1e-5, rtol=0)
    assert {expert.task for expert in experts} == set(TASKS)
    assert all(expert.difference < 1e-5 for expert in experts)


def test_the_folder_says_where_each_expert_came_from(loras, imported) -> None:
    folder, _, untrained = imported
    assert untrained == ["router"]
    card = (folder / "mixture" / "README.md").read_text()
    for task, expert in {expert.task: expert for expert in imported[1]}.items():
        assert f"| `{task}` | `{loras[task].name}` | `base` |" in card
        assert expert.lora.sha256 in card
    assert str(folder.parent) not in card
    noted = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert not os.path.isabs(noted["train"]["start_from"]["home"])
    assert noted["train"]["only_tasks"] == []
    assert set(noted["method"]["target_modules"]) == {"q_proj", "v_proj", "up_proj", "down_proj", "o_proj"}
    assert json.loads((folder / "environment.json").read_text())["tasks"].keys() == set(TASKS)
    assert load_run(folder).recipe.train.start_from == {task: str(path) for task, path in loras.items()}


def test_a_changed_mixture_or_another_base_is_noticed(places, imported, tmp_path) -> None:
    folder = shutil.copytree(imported[0], imported[0].parent / "changed")
    with (folder / "mixture" / "README.md").open("a") as file:
        file.write("x")
    with pytest.raises(RunError, match=r"README.md: \d+ bytes"):
        load_run(folder)


def test_the_folder_can_be_evaluated_and_its_tasks_leave_as_they_came(places, loras, imported, tmp_path) -> None:
    run = load_run(imported[0])
    results = evaluate_job(run, EvaluateConfig(limit=2), quiet=True)
    assert set(results.scores) == {"base", "auto", "named"}
    reports, refused = export_run(run, encode_tasks(run), tmp_path, base=BaseIdentity("someone/tiny"))
    assert not refused
    assert {report.how for report in reports.values()} == {"exact"}
    for task, lora in loras.items():
        expected = stock_logits(places, lora)
        torch.testing.assert_close(stock_logits(places, tmp_path / task), expected, atol=1e-5, rtol=0)


def test_without_tasks_it_is_served_and_the_rest_says_what_is_missing(places, loras, tmp_path) -> None:
    import_run(recipe_for(loras, places, tasks=False), tmp_path / "hub")
    run = load_run(tmp_path / "hub")
    settings = {"runs": [str(tmp_path / "hub")], "adapters": [str(loras["sound"].parent)]}
    service, engine = open_service(parse(ServeConfig, settings, where="settings"), {})
    engine.start()
    assert {info.name for info in service.store.list()} == set(TASKS)
    assert service.chooser.choose(run.tokenizer("sound of the cat")["input_ids"]).adapter in TASKS
    engine.stop()
    service.close()
    with pytest.raises(
        RunError, match=r"hub: imported without tasks, so .* --tasks FILE, or name the file in its recipe"
    ):
        evaluate_job(run, EvaluateConfig())
    with pytest.raises(ConfigError, match="tasks: there are none to train on"):
        train_run(load_recipe(tmp_path / "hub" / "recipe.yaml"), tmp_path / "run")
    text = (tmp_path / "hub" / "recipe.yaml").read_text().replace("\ntasks: []", f"\ntasks: {places[1]}")
    (tmp_path / "hub" / "recipe.yaml").write_text(text)
    evaluate_job(load_run(tmp_path / "hub"), EvaluateConfig(limit=1), quiet=True)


def test_a_router_of_prompts_is_fitted_on_the_tasks_and_asks_for_them(places, loras, tmp_path) -> None:
    import_run(recipe_for(loras, places, method="router_retriever"), tmp_path / "hub")
    (directions,) = routers_of(tmp_path / "hub" / "mixture").values()
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3))
    with pytest.raises(
        ConfigError, match=r"'router_retriever' looks at prompts of every task; name them \(--tasks FILE\)"
    ):
        import_run(recipe_for(loras, places, method="router_retriever", tasks=False), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_router_of_tokens_is_read_off_the_experts_without_any_task(places, loras, tmp_path) -> None:
    experts, untrained = import_run(recipe_for(loras, places, method="arrow", tasks=False), tmp_path / "hub")
    assert untrained == []
    assert [expert.difference for expert in experts] == [None] * 3
    directions = routers_of(tmp_path / "hub" / "mixture")
    up = next(tensor for name, tensor in directions.items() if "up_proj" in name)
    assert up.norm(dim=-1).tolist() == pytest.approx([0, 1, 0])


def test_experts_stand_in_the_order_of_the_task_file(places, loras, tmp_path) -> None:
    backwards = dict(reversed(loras.items()))
    import_run(recipe_for(backwards, places), tmp_path / "hub")
    assert load_run(tmp_path / "hub").model.base_model.tasks == TASKS
    import_run(recipe_for(backwards, places, tasks=False), tmp_path / "free")
    assert load_run(tmp_path / "free").model.base_model.tasks == TASKS[::-1]


# ---------------------------------------------------------------------- training on


@pytest.mark.parametrize("method", ["moa", "scalearn", "router_retriever", "arrow"])
def test_the_recipe_it_leaves_trains_what_chooses_and_no_expert(method, places, loras, tmp_path) -> None:
    import_run(recipe_for(loras, places, method=method), tmp_path / "hub")
    small = ["train.steps=4", "train.batch_size=6", "train.weight_decay=0.1"]
    run = train_run(load_recipe(tmp_path / "hub" / "recipe.yaml", small), tmp_path / "run")
    before, after = (experts_of(tmp_path / name / "mixture") for name in ("hub", "run"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    chosen, learnt = (routers_of(tmp_path / name / "mixture") for name in ("hub", "run"))
    moved = [name for name in chosen if not torch.equal(chosen[name], learnt[name])]
    trains = method in ("moa", "scalearn")
    assert len(moved) == (len(chosen) if trains else 0)
    assert [line["stage"] for line in run.folder.metrics() if "stage" in line] == (
        [{"moa": "router", "scalearn": "scales"}[method]] if trains else []
    )
    if method == "moa":
        for task, lora in loras.items():
            expected = stock_logits(places, lora)
            torch.testing.assert_close(logits(run.model, routing_tasks=task), expected, atol=1e-5, rtol=0)
    shutil.rmtree(tmp_path / "run" / "mixture")  # as if killed before the end
    for last in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(last)
    train_run(run.recipe, tmp_path / "run", resume=True)
    assert all(torch.equal(value, learnt[name]) for name, value in routers_of(tmp_path / "run" / "mixture").items())


def test_imported_experts_can_be_trained_themselves(places, loras, tmp_path) -> None:
    start = ", ".join(f"{task}: '{folder}'" for task, folder in loras.items())
    recipe = make_recipe(*places, f"train.start_from={{{start}}}", "method.options={}", "train.learning_rate=1e-6")
    run = train_run(recipe, tmp_path / "run", evaluate=None)
    for task, lora in loras.items():
        moved = (logits(run.model, routing_tasks=task) - stock_logits(places, lora)).abs().max()
        assert 1e-6 < moved < 0.1
    bank = next(iter(run.model.base_model.layers().values())).branches("default")[0].bank
    assert bank.down.shape[1] == 4  # the widest of them


def test_a_new_task_trains_beside_imported_ones_that_stay(places, loras, tmp_path) -> None:
    start = f"train.start_from={{sound: '{loras['sound']}', home: '{loras['home']}'}}"
    recipe = make_recipe(*places, start, "train.only_tasks=[colour]", "method.options={rank: 5}")
    run = train_run(recipe, tmp_path / "run", evaluate=None)
    for task in ("sound", "home"):
        expected = stock_logits(places, loras[task])
        torch.testing.assert_close(logits(run.model, routing_tasks=task), expected, atol=1e-5, rtol=0)
    assert (logits(run.model, routing_tasks="colour") - logits(bare(places))).abs().max() > 1e-4


def test_importing_the_exports_of_a_run_gives_its_experts_back(places, tmp_path) -> None:
    run = train_run(make_recipe(*places, "train.learning_rate=0.05"), tmp_path / "run", evaluate=None)
    export_run(run, encode_tasks(run), tmp_path / "exports", base=BaseIdentity("someone/tiny"))
    exports = {task: tmp_path / "exports" / task for task in TASKS}
    import_run(recipe_for(exports, places, f"base.model={places[0]}", "base.known_as=someone/tiny"), tmp_path / "hub")
    again = load_run(tmp_path / "hub")
    for task in TASKS:
        expected = logits(run.model, routing_tasks=task)
        torch.testing.assert_close(logits(again.model, routing_tasks=task), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- the Hub, recipes, mistakes


def test_an_id_of_the_hub_is_fetched_as_config_and_safetensors_alone(places, loras, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))  # no network: what is there was fetched
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--colours"
    shutil.copytree(loras["colour"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    sources = {"colour": "someone/colours", "sound": f"someone/colours@{commit}", "home": loras["home"]}
    experts, _ = import_run(recipe_for(sources, places), tmp_path / "hub")
    assert [expert.source for expert in experts] == [str(source) for source in sources.values()]
    assert load_run(tmp_path / "hub").recipe.train.start_from["colour"] == "someone/colours"
    for unknown in ("someone/nothing", "someone/colours@v2", "../nowhere", "no such thing"):
        with pytest.raises(ConfigError, match=r"no such folder, and its .* cannot be had from the Hub"):
            fetch_lora(unknown)


def test_a_recipe_for_readers_elsewhere_names_folders_barely_and_ids_in_full() -> None:
    start = {"a": "/home/alice/lora", "b": "someone/lora@main"}
    recipe = Recipe(train=TrainConfig(start_from=start), base=BaseConfig(also_called=("/home/alice/base",)))
    text = public_recipe(recipe, BaseIdentity("someone/tiny"))
    assert yaml.safe_load(text)["train"]["start_from"] == {"a": "lora", "b": "someone/lora@main"}
    assert "alice" not in text


def test_experts_to_start_from_that_do_not_fit_the_recipe_are_refused(places, loras, tmp_path) -> None:
    def train(start: str, *overrides: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        train_run(make_recipe(*places, f"train.start_from={start}", *overrides), folder, evaluate=None)

    with pytest.raises(AdapterError, match=r"no task 'hom' in this hub .*; did you mean 'home'\?"):
        train(f"{{hom: '{loras['home']}'}}")
    with pytest.raises(AdapterError, match=r"has rank 4 at 'model.layers.0.self_attn.q_proj', the hub's experts 2"):
        train(f"{{home: '{loras['home']}'}}")  # the recipes of these tests say rank 2
    with pytest.raises(AdapterError, match=r"adapts 'model.layers.0.mlp.up_proj', which this hub does not"):
        train(f"{{sound: '{loras['sound']}'}}", "method.options={}", "method.target_modules=[q_proj]")
    with pytest.raises(ConfigError, match=r"train.start_from"):
        train("{home: 3}")


@pytest.mark.parametrize(
    ("experts", "settings", "message"),
    [
        ({"../home": "home"}, {"tasks": False}, r"task name '../home': use 1-64 letters"),
        ({"home": "home", "Home": "sound"}, {"tasks": False}, r"two tasks are called 'Home' \(case does not count\)"),
        ({"home": "home", "sond": "sound"}, {}, r"an expert is called 'sond', and no task is; did you mean 'sound'\?"),
        ({"home": "home"}, {}, r"task 'colour' has no expert; name its LoRA too \(colour=FOLDER\), or leave"),
        ({"home": "home"}, {"tasks": False, "method": "hydralora"}, "no single plain LoRA per task to import one into"),
        ({"home": "home"}, {"tasks": False, "method": "mao"}, "unknown method 'mao'; did you mean 'moa'"),
        ({"home": "empty"}, {"tasks": False}, r"empty: no PEFT adapter \(no adapter_config.json in it\)"),
        ({"home": "nobody's"}, {"tasks": False}, r"do not name one base \(.*nobody's names none\); say which"),
        ({"home": "home", "sound": "other's"}, {"tasks": False}, "other's names someone/other.*say which"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_is_written(experts, settings, message, places, loras, tmp_path) -> None:
    for name, base in (("nobody's", None), ("other's", "someone/other")):
        shutil.copytree(loras["home"], tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    found = {task: loras.get(name, tmp_path / name) for task, name in experts.items()}
    with pytest.raises(LoramuxError, match=message):
        import_run(recipe_for(found, places, **settings), tmp_path / "hub")
    assert sorted(tmp_path.iterdir()) == before


def test_loras_of_a_base_under_another_name_are_taken_where_the_recipe_says_so(places, loras, tmp_path) -> None:
    lora = shutil.copytree(loras["home"], tmp_path / "lora")
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a/mirror"}))
    given = (f"base.model={places[0]}",)
    with pytest.raises(AdapterError, match="an adapter of another base: it names 'a/mirror', this one is"):
        import_run(recipe_for({"home": lora}, places, *given, tasks=False), tmp_path / "hub")
    also = (*given, "base.also_called=[a/mirror]")
    import_run(recipe_for({"home": lora}, places, *also, tasks=False), tmp_path / "hub")


def test_a_used_folder_is_left_alone(places, loras, tmp_path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="exists and is not empty; name a new folder"):
        import_run(recipe_for(loras, places), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_command(places, loras, tmp_path, capsys) -> None:
    given = [f"{task}={folder}" for task, folder in loras.items()]
    to = ["--to", str(tmp_path / "hub")]
    assert main(["import", *given, "--method", "arrow", "--method-option", "top_k=1", *to]) == 0
    out = capsys.readouterr().out
    assert "tokens choose" in out
    assert "it has no tasks (--tasks FILE), so it cannot be evaluated, exported or trained on" in out
    assert load_run(tmp_path / "hub").model.peft_config["default"].options["top_k"] == 1
    tasks = ["--tasks", str(places[1]), "--base", str(places[0]), "--set", "base.known_as=someone/tiny"]
    assert main(["import", *given, *tasks, "--to", str(tmp_path / "two")]) == 0
    assert "still as new: the router; `loramux train" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "two"), "--task", "home", "--to", str(tmp_path / "exports")]) == 0
    assert main(["import", given[0], given[0], *to]) == 2
    assert "loramux import: a task is named twice: colour, colour" in capsys.readouterr().err


def test_what_the_page_shows_is_understood(repository) -> None:
    page = (repository / "docs" / "importing.md").read_text(encoding="utf-8")
    shown = {
        language: re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S) for language in ("sh", "yaml", "python")
    }
    for line in "".join(shown["sh"]).splitlines():
        build_parser().parse_args(shlex.split(line)[1:])
    (section,) = map(yaml.safe_load, shown["yaml"])
    assert Recipe(**section).train.only_tasks == ()
    for block in shown["python"]:
        ast.parse(block)


@pytest.mark.parametrize("arguments", [["who"], ["=x"], ["who="], ["who=x", "--method-option", "rank"]])
def test_arguments_of_another_form_are_refused_by_the_parser(arguments, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["import", *arguments, "--to", "x"])
    assert "is not of the form NAME=VALUE" in capsys.readouterr().err
