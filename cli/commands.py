"""What each command does, in terms of the packages below."""

import argparse
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets
import yaml
from transformers.utils import logging as transformers_logging

from ..adapters import ExportConfig, Method, find_method, method_config, numbered_tasks
from ..adapters import methods as all_methods
from ..bases import BUNDLED, write_base
from ..support.config import parse
from ..support.console import say, show_table
from ..support.errors import ConfigError, ExportRefused
from ..tasks import Task, load_tasks
from ..training.adapt import adapt_run
from ..training.adapt_ways import EVERY_WAY, AdaptConfig
from ..training.assess import draw_report, encode_tasks, read_results
from ..training.compare import compare_methods
from ..training.comparison import Comparison, draw_comparison, show_comparison
from ..training.exports import export_run, identity_of
from ..training.imports import import_recipe, import_run
from ..training.main_job import evaluate_job, new_run_folder, train_job
from ..training.recipe import BaseConfig, Recipe, load_recipe
from ..training.report import show
from ..training.routes import HEADER, report_routes
from ..training.run import load_run
from ..training.run_folder import RunFolder
from ..training.sizing import BaseShapes, shapes_of
from .sharing import diff, info, publish, pull, recommend, search

__all__ = ["diff", "info", "publish", "pull", "recommend", "search"]


def quieten_libraries() -> None:
    """Leave the screen to our own progress; other libraries' bars and developer warnings are off."""
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"The PEFT config's `base_model_name_or_path` was renamed")


def train(arguments: argparse.Namespace) -> None:
    if arguments.resume and arguments.to is None:
        raise ConfigError("--resume: say which run with --to RUN")
    recipe = _recipe(arguments)
    if arguments.to is None:
        arguments.to = new_run_folder(recipe.method.name)
    train_job(recipe, arguments.to, resume=arguments.resume)


def evaluate(arguments: argparse.Namespace) -> None:
    if arguments.report_only:
        results = read_results(arguments.run)
        draw_report(arguments.run)
        show(results)
        return
    run = load_run(arguments.run)
    given = {"split": arguments.split, "limit": arguments.limit, "batch_size": arguments.batch_size}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    evaluate_job(run, replace(run.recipe.evaluate, **changes))


def compare(arguments: argparse.Namespace) -> None:
    if arguments.report_only:
        draw_comparison(arguments.to)
        show_comparison(Comparison.load(arguments.to))
        return
    if not arguments.methods:
        raise ConfigError("--methods: name at least one; `loramux methods` lists them")
    compare_methods(
        load_recipe(arguments.recipe, arguments.set),
        arguments.to,
        methods=arguments.methods,
        seeds=arguments.seeds,
        learning_rates=arguments.learning_rates,
        options=_method_options(arguments.method_option),
    )


def adapt(arguments: argparse.Namespace) -> None:
    options = dict(_option("--method-option", text, "languages=de") for text in arguments.method_option)
    settings = {
        "ways": tuple(arguments.ways) if arguments.ways else None,
        "shots": arguments.shots,
        "steps": arguments.steps,
        "learning_rates": dict(_rate(text) for text in arguments.learning_rate),
        "method_options": options,
        "seed": arguments.seed,
    }
    adapt_run(arguments.run, arguments.task, arguments.to, parse(AdaptConfig, settings, where="settings"))


def export(arguments: argparse.Namespace) -> None:
    run = load_run(arguments.run)
    base = identity_of(run, known_as=arguments.base_id)
    given = {"max_kl": arguments.max_kl, "rank": arguments.rank}
    settings = ExportConfig(**{key: value for key, value in given.items() if value is not None})
    reports, refused = export_run(
        run,
        encode_tasks(run),
        arguments.to,
        base=base,
        only=[] if arguments.blend else arguments.task,
        blends=[_blend(text) for text in arguments.blend or ()],
        allow_lossy=arguments.allow_lossy,
        settings=settings,
    )
    head = ["task", "made", "rank", "token KL", "base KL", "same top token", "score", "exported"]
    rows = [
        [
            report.task,
            report.how,
            str(report.rank),
            f"{report.fidelity.token_kl:.2g}",
            f"{report.fidelity.base_kl:.2g}",
            f"{report.fidelity.top1_agreement:.4f}",
            _score(report.routed_score),
            _score(report.exported_score),
        ]
        for report in reports.values()
    ]
    if rows:
        show_table(f"plain LoRAs of {base.name} in {arguments.to}", head, rows)
    if refused:
        raise ExportRefused("\n".join(refused.values()))


def import_(arguments: argparse.Namespace) -> None:
    settings = [*(f"method.options.{option}" for option in arguments.method_option), *arguments.set]
    recipe = import_recipe(
        arguments.experts, method=arguments.method, base=arguments.base, tasks=arguments.tasks, overrides=settings
    )
    imported, untrained = import_run(recipe, arguments.to)
    head = ["task", "from", "modules", "rank", "named: logits differ by"]
    rows = [
        [
            expert.task,
            expert.source,
            str(len(expert.lora.factors)),
            str(expert.lora.rank),
            "tokens choose" if expert.difference is None else f"{expert.difference:.1e}",
        ]
        for expert in imported
    ]
    show_table(f"experts of a {recipe.method.name} mixture on {recipe.base.model}", head, rows)
    say(f"{arguments.to} is a run folder: `loramux serve {arguments.to}` serves it, PEFT loads its mixture/")
    if not recipe.tasks:
        say("it has no tasks (--tasks FILE), so it cannot be evaluated, exported or trained on")
    if untrained:
        own = arguments.to / "recipe.yaml"
        say(f"still as new: the {' and '.join(untrained)}; `loramux train {own} --to RUN` trains that, and no expert")


def routes(arguments: argparse.Namespace) -> None:
    run = load_run(arguments.run)
    to = arguments.to or arguments.run / "routes"
    report = report_routes(run, to, only=arguments.task, examples=arguments.examples)
    show_table(f"routers of {arguments.run}", HEADER, report.rows)
    for remark in report.remarks:
        say(remark)
    names = [file.name for file in report.written if file.parent == to]
    more = "; more in routing/" if len(names) < len(report.written) else ""
    say(f"Written to {to}: {', '.join(names)}{more}")


def methods(arguments: argparse.Namespace) -> None:
    if arguments.method is not None:
        _tell_about(find_method(arguments.method))
        return
    base = BaseConfig(model=arguments.model or BUNDLED)
    shapes = shapes_of(base)
    rows = [_method_row(method, shapes, arguments.tasks, arguments.rank) for method in all_methods().values()]
    head = ["method", "routed by", "export", "options", "parameters", "as plain LoRA", "paper"]
    show_table(f"methods, with {arguments.tasks} tasks on {base.model} (all linears)", head, rows)


def tasks(arguments: argparse.Namespace) -> None:
    found = load_tasks(arguments.source)
    head = ["task", "answers", "train", "validation", "test", "metrics"]
    show_table(f"tasks of {arguments.source}", head, [_task_row(task) for task in found])
    for task in found:
        say(f"\n{task.name}: {task.config.description or 'no description'}")
        for line in _example_lines(task, arguments.examples):
            say(line)


def base(arguments: argparse.Namespace) -> None:
    write_base(arguments.to)
    say(f"{BUNDLED} written to {arguments.to}; any Hugging Face tool loads it from there")


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that was named; of a run that is resumed, its own."""
    path = arguments.recipe
    if path is None and arguments.resume:
        path = RunFolder(arguments.to).recipe_file
        RunFolder(arguments.to).read_recipe()
    return load_recipe(path, arguments.set)


def _method_options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        method, dot, key = name.partition(".")
        if not (equals and dot and method and key):
            raise ConfigError(f"--method-option {text!r}: write it as METHOD.KEY=VALUE, for example smora.rank=32")
        options.setdefault(method, {})[key] = _yaml("--method-option", text, value)
    return options


def _option(flag: str, text: str, example: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (equals and key):
        raise ConfigError(f"{flag} {text!r}: write it as KEY=VALUE, for example {example}")
    return key, _yaml(flag, text, value)


def _blend(text: str) -> dict[str, float]:
    parts = [part.partition("=") for part in text.split(",")]
    try:
        return {task.strip(): float(share) for task, _, share in parts}
    except ValueError:
        raise ConfigError(f"--blend {text!r}: write it as TASK=SHARE,..., for example who=0.3,where=0.7") from None


def _yaml(flag: str, text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag} {text!r}: {error}") from None


def _rate(text: str) -> tuple[str, float]:
    way, equals, number = text.rpartition("=")
    try:
        return (way if equals else EVERY_WAY), float(number)
    except ValueError:
        raise ConfigError(f"--learning-rate {text!r}: write it as R or WAY=R, for example row=0.1") from None


def _method_row(method: Method, shapes: BaseShapes, tasks: int, rank: int | None) -> list[str]:
    options = {"rank": rank} if rank is not None and "rank" in method.options() else {}
    paper, names = method.paper.split(",")[0], numbered_tasks(tasks)
    try:
        built = method_config(method.name, tasks=names, options=options)
        parameters = shapes.count(method.name, options, names)
    except ConfigError as error:
        return [method.name, "-", "-", str(error).removeprefix(f"method {method.name!r}: "), "-", "-", paper]
    shown = {**method.options(), **options}
    return [
        method.name,
        built.granularity.name.lower() if built.granularity else "nothing",
        "exact" if built.exports_exactly else "fitted",
        ", ".join(f"{key} {shown[key]}" for key in ("rank", "experts", "top_k") if key in shown),
        f"{parameters:,}",
        f"rank {shapes.matched_rank(parameters)}",
        paper,
    ]


def _tell_about(method: Method) -> None:
    built = method_config(method.name, tasks=numbered_tasks(2))
    export = "exact" if built.exports_exactly else "fitted and measured"
    say(f"{method.name}: {method.paper}\nrouted by {built.granularity.name.lower()}; export: {export}\n")
    say(inspect.getdoc(method.build) or "")
    say("\noptions (method.options.KEY in a recipe):")
    for name, default in method.options().items():
        say(f"  {name} = {default}")


def _task_row(task: Task) -> list[str]:
    sizes = [str(len(task.splits[split])) if split in task.splits else "-" for split in ("train", "validation", "test")]
    choices = task.splits["train"][0].choices
    return [task.name, f"one of {len(choices)}" if choices else "open", *sizes, ", ".join(task.metrics)]


def _example_lines(task: Task, count: int) -> Iterator[str]:
    for example in task.splits["train"][:count]:
        prompt = example.prompt.strip().replace("\n", "\n    ")
        yield f"    {prompt}\n    -> {example.target}"


def _score(value: float | None) -> str:
    return "as routed" if value is None else f"{100 * value:.1f}"
