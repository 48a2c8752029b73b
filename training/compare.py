"""Several methods over one mixture, each beside the plain LoRA of its size, over seeds and learning rates."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters import find_method, method_config
from ..support.config import parse, to_data
from ..support.console import say
from ..support.errors import ConfigError
from ..support.files import write_json
from ..tasks import Task, load_tasks, read_task_configs
from .assess import RESULTS, read_results
from .comparison import COMPARISON, Chosen, Comparison, Contender, draw_comparison, show_comparison
from .evaluate import Scores
from .loop import SCORE
from .main_job import evaluate_job
from .recipe import BaselineConfig, Recipe, TrainConfig
from .run import load_run, train_run
from .run_folder import RunFolder
from .schedule import StageSpan, stage_spans
from .sizing import shapes_of

RUNS = "runs"
_NEAR = 0.02
"""Methods whose sizes differ by no more than this share the plain LoRA they are compared to."""
MethodOptions = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is compared, and how often; `learning_rates` are those to try, by the contender's label."""

    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    learning_rates: dict[str, tuple[float, ...]]


def compare_methods(
    recipe: Recipe,
    folder: Path,
    *,
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    learning_rates: Sequence[float] = (),
    options: MethodOptions | None = None,
) -> Comparison:
    """Run every method over the mixture of `recipe` and write one table, its data and its plots.

    Runs that are finished in `folder` are kept, so an interrupted comparison goes on where it stopped, and methods,
    seeds or learning rates can be added later.

    Args:
        methods: names that `loramux methods` lists. The plain LoRA of each one's size always comes along.
        learning_rates: tried with the first seed for every method, the plain LoRAs included; the best mean validation
            metric wins. Empty: the recipe's, which can name one for plain LoRAs (`baseline.learning_rate`).
        options: per method, the options that differ from its defaults; for the recipe's own method, from the recipe's.

    Raises:
        ConfigError: for an unknown method or option, a seed or a rate out of range, none at all, one named twice, or
            a recipe that trains a part only.
        RunError: `folder` holds runs of another recipe, or of other training or validation examples.
    """
    plan = make_plan(recipe, methods=methods, seeds=seeds, learning_rates=learning_rates, options=options or {})
    comparison = _Comparing(recipe, folder, plan).run()
    write_json(folder / COMPARISON, comparison.to_data())
    pictures = draw_comparison(folder)
    show_comparison(comparison)
    say(f"{folder}: comparison.md and comparison.json, {', '.join(p.name for p in pictures)}, all runs in {RUNS}/")
    return comparison


def make_plan(
    recipe: Recipe,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    options: MethodOptions,
) -> Plan:
    """Size every method on the recipe's base and put the plain LoRAs of these sizes beside them.

    Raises:
        ConfigError: see `compare_methods`.
    """
    _refuse_senseless(recipe, {"methods": methods, "seeds": seeds, "learning rates": learning_rates})
    for method in options:
        if method not in methods:
            raise ConfigError(f"options for {method!r}, which is not among the methods: {', '.join(methods)}")
    own = {recipe.method.name: recipe.method.options}
    chosen = {name: {**own.get(name, {}), **options.get(name, {})} for name in methods}
    sizes = _Sizes(recipe)
    routed, plain = sizes.matched([sizes.contender(name, chosen[name]) for name in methods if name != "lora"])
    if "lora" in methods and (chosen["lora"] or not routed):
        plain.append(sizes.lora(chosen["lora"], excess_rank=recipe.method.excess_rank))
    loras = {contender.label: contender for contender in sorted(plain, key=lambda lora: lora.matched_rank)}
    contenders = (*loras.values(), *routed)
    rates = {contender.label: tuple(learning_rates) or (_own_rate(recipe, contender),) for contender in contenders}
    return Plan(contenders, tuple(seeds), rates)


def _refuse_senseless(recipe: Recipe, named: Mapping[str, Sequence[Any]]) -> None:
    for what, values in named.items():
        if len(set(values)) != len(values):
            raise ConfigError(f"{what}: {', '.join(map(str, values))} names one twice")
        if not values and what != "learning rates":
            raise ConfigError(f"{what}: name at least one")
    for what, key in (("seeds", "seed"), ("learning rates", "learning_rate")):
        for value in named[what]:
            parse(TrainConfig, {key: value}, where=what)
    if not recipe.train.is_whole:
        raise ConfigError("train.start_from, train.only_tasks: every method is trained in full here; leave them out")


def _own_rate(recipe: Recipe, contender: Contender) -> float:
    return recipe.baseline_rate if contender.method == "lora" else recipe.train.learning_rate


class _Sizes:
    """Makes contenders of methods, sized on the base and the tasks of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.shapes = shapes_of(recipe.base, recipe.method.target_modules)
        self.tasks, self.excess_rank = _task_names(recipe), recipe.method.excess_rank

    def contender(self, method: str, options: Mapping[str, Any]) -> Contender:
        parameters = self.shapes.count(method, options, self.tasks, excess_rank=self.excess_rank)
        return Contender(method, method, dict(options), parameters, self.shapes.matched_rank(parameters), None)

    def matched(self, contenders: Sequence[Contender]) -> tuple[list[Contender], list[Contender]]:
        """The contenders with the plain LoRA each is compared to, and these LoRAs: as few as are near enough."""
        loras = [self.lora({"rank": rank}) for rank in sorted({one.matched_rank for one in contenders})]
        partner: dict[str, str] = {}
        while unserved := [one for one in contenders if one.label not in partner]:
            served = {lora.label: [one.label for one in unserved if _are_near(one, lora)] for lora in loras}
            best = max(served, key=lambda label: len(served[label]))
            partner |= dict.fromkeys(served[best], best)
        used = [lora for lora in loras if lora.label in partner.values()]
        return [replace(one, matched=partner[one.label]) for one in contenders], used

    def lora(self, options: Mapping[str, Any], *, excess_rank: bool = True) -> Contender:
        """A plain LoRA; what else than its rank differs from the default is part of its label."""
        parameters = self.shapes.count("lora", options, self.tasks, excess_rank=excess_rank)
        rank = self.shapes.matched_rank(parameters)
        usual, given = find_method("lora").options(), sorted(options.items())
        special = {key: value for key, value in given if key != "rank" and value != usual[key]}
        label = " ".join([f"lora r{rank}", *(f"{key} {value}" for key, value in special.items())])
        return Contender(label, "lora", {"rank": rank, **special}, parameters, rank, None)


def _are_near(contender: Contender, lora: Contender) -> bool:
    """Whether a plain LoRA counts as being of a method's size."""
    near = abs(lora.parameters - contender.parameters) <= _NEAR * contender.parameters
    return near or lora.matched_rank == contender.matched_rank


class _Comparing:
    """Works a plan off, one run after the other."""

    def __init__(self, recipe: Recipe, folder: Path, plan: Plan) -> None:
        self.recipe, self.folder, self.plan = recipe, folder, plan
        self.total = sum(len(rates) + len(plan.seeds) - 1 for rates in plan.learning_rates.values())
        self.done, self.trained, self.seconds = 0, 0, 0.0
        self.base_scores: Scores | None = None

    @cached_property
    def tasks(self) -> list[Task]:
        """As they are now; runs of other examples do not belong into one table with new ones."""
        return load_tasks(self.recipe.tasks)

    def run(self) -> Comparison:
        chosen = []
        for contender in self.plan.contenders:
            tried = {rate: self._validate(contender, rate) for rate in self.plan.learning_rates[contender.label]}
            rate = max(tried, key=lambda rate: tried[rate])
            runs = {seed: self._evaluated(contender, rate, seed) for seed in self.plan.seeds}
            chosen.append(Chosen(contender, rate, tried, {seed: str(path) for seed, path in runs.items()}))
        return Comparison.read(self.folder, chosen)

    def _validate(self, contender: Contender, rate: float) -> float:
        """The best mean validation metric of the first seed at a learning rate, of weights that a run may keep."""
        seed, key = self.plan.seeds[0], f"eval/{SCORE}"
        lines = RunFolder(self._train(contender, rate, seed)).metrics()
        start = _last_stage(self._recipe(contender, rate, seed)).start
        return max((line[key] for line in lines if key in line and line["step"] > start), default=float("-inf"))

    def _evaluated(self, contender: Contender, rate: float, seed: int) -> Path:
        """A run with its results, as a path relative to the comparison."""
        path, config = self._train(contender, rate, seed), self.recipe.evaluate
        if not self._is_measured(path):
            export = self.recipe.export.enabled
            evaluate_job(load_run(path), config, export=export, base_scores=self.base_scores, quiet=True)
        results = read_results(path)
        self.base_scores = results.scores.get("base")
        mean = results.mean(results.main_column or "base")
        say(f"{contender.label}, seed {seed}: mean {100 * (mean or 0):.1f}")
        return path.relative_to(self.folder)

    def _is_measured(self, path: Path) -> bool:
        """Whether a run has results, and on the examples that the recipe asks for."""
        if not (path / RESULTS).is_file():
            return False
        noted, asked = read_results(path).run, to_data(self.recipe.evaluate)
        if any(noted.get("evaluate", {}).get(key) != asked[key] for key in ("split", "limit")):
            return False
        now = {task.name: task.fingerprint_of(noted["split_per_task"][task.name]) for task in self.tasks}
        return noted.get("measured_on", now) == now

    def _train(self, contender: Contender, rate: float, seed: int) -> Path:
        name, recipe = contender.label.replace(" ", "-"), self._recipe(contender, rate, seed)
        run = RunFolder(self.folder / RUNS / name / f"lr-{rate:g}-seed-{seed}")
        if run.is_finished:
            run.open(recipe, resume=True)
            run.check_tasks(self.tasks)
            return run.path
        started = time.monotonic()
        self.done += 1
        say(
            f"run {self.done} of at most {self.total}{self._time_left()}: {contender.label}, seed {seed}, rate {rate:g}"
        )
        train_run(recipe, run.path, resume=True)
        self.trained, self.seconds = self.trained + 1, self.seconds + time.monotonic() - started
        return run.path

    def _recipe(self, contender: Contender, rate: float, seed: int) -> Recipe:
        return replace(
            self.recipe,
            method=replace(
                self.recipe.method,
                name=contender.method,
                options=contender.options,
                excess_rank=self.recipe.method.excess_rank or contender.matched is None,
            ),
            train=replace(self.recipe.train, learning_rate=rate, seed=seed),
            baseline=BaselineConfig(enabled=False),
            # A comparison measures what exports lose; nothing is shipped from here.
            export=replace(self.recipe.export, allow_lossy=True),
        )

    def _time_left(self) -> str:
        if not self.trained:
            return ""
        minutes = self.seconds / self.trained * (self.total - self.done + 1) / 60
        return f", about {minutes:.0f} min left" if minutes >= 1 else ""


def _last_stage(recipe: Recipe) -> StageSpan:
    """The steps whose best weights a run keeps."""
    method = recipe.method
    stages = method_config(method.name, tasks=_task_names(recipe), options=method.options).stages
    return stage_spans(stages, recipe.train.steps)[-1]


def _task_names(recipe: Recipe) -> list[str]:
    return [config.name for config in read_task_configs(recipe.tasks)]
