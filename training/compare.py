"""Several methods over one mixture, each beside the plain LoRA of its size, over seeds and learning rates."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..support.console import say
from ..support.errors import ConfigError
from ..support.files import write_json
from ..tasks import read_task_configs
from .assess import RESULTS, read_results
from .comparison import COMPARISON, Chosen, Comparison, Contender, draw_comparison, show_comparison
from .evaluate import Scores
from .loop import SCORE
from .main_job import evaluate_job
from .recipe import BaselineConfig, MethodChoice, Recipe
from .run import load_run, train_run
from .run_folder import RunFolder
from .sizing import shapes_of

RUNS = "runs"
MethodOptions = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is compared, and how often."""

    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]


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
            metric wins. Empty: the recipe's.
        options: per method, the options that differ from its defaults.

    Raises:
        ConfigError: for an unknown method or option, none at all, or one named twice.
        RunError: `folder` holds runs of another recipe.
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
    named: dict[str, Sequence[Any]] = {"methods": methods, "seeds": seeds, "learning rates": learning_rates}
    for what, values in named.items():
        if len(set(values)) != len(values):
            raise ConfigError(f"{what}: {', '.join(map(str, values))} names one twice")
        if not values and what != "learning rates":
            raise ConfigError(f"{what}: name at least one")
    for method in options:
        if method not in methods:
            raise ConfigError(f"options for {method!r}, which is not among the methods: {', '.join(methods)}")
    sizes = _Sizes(recipe)
    routed = [sizes.contender(name, options.get(name, {})) for name in methods if name != "lora"]
    plain = [contender.matched_rank for contender in routed]
    if "lora" in methods and ("lora" in options or not routed):
        plain.append(options.get("lora", {}).get("rank", 8))
    loras = [sizes.lora(rank) for rank in sorted(set(plain))]
    return Plan((*loras, *routed), tuple(seeds), tuple(learning_rates) or (recipe.train.learning_rate,))


class _Sizes:
    """Makes contenders of methods, sized on the base and the tasks of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.shapes = shapes_of(recipe.base, recipe.method.target_modules)
        self.tasks = len(read_task_configs(recipe.tasks))

    def contender(self, method: str, options: Mapping[str, Any]) -> Contender:
        parameters = self.shapes.count(method, options, self.tasks)
        rank = self.shapes.matched_rank(parameters)
        return Contender(method, method, dict(options), parameters, rank, f"lora r{rank}")

    def lora(self, rank: int) -> Contender:
        parameters = self.shapes.count("lora", {"rank": rank}, self.tasks)
        return Contender(f"lora r{rank}", "lora", {"rank": rank}, parameters, rank, None)


class _Comparing:
    """Works a plan off, one run after the other."""

    def __init__(self, recipe: Recipe, folder: Path, plan: Plan) -> None:
        self.recipe, self.folder, self.plan = recipe, folder, plan
        tuning = len(plan.learning_rates) if len(plan.learning_rates) > 1 else 1
        self.total = len(plan.contenders) * (tuning + len(plan.seeds) - 1)
        self.done, self.trained, self.seconds = 0, 0, 0.0
        self.base_scores: Scores | None = None

    def run(self) -> Comparison:
        chosen = []
        for contender in self.plan.contenders:
            tried = {rate: self._validate(contender, rate) for rate in self.plan.learning_rates}
            rate = max(tried, key=lambda rate: tried[rate])
            runs = {seed: self._evaluated(contender, rate, seed) for seed in self.plan.seeds}
            chosen.append(Chosen(contender, rate, tried, {seed: str(path) for seed, path in runs.items()}))
        return Comparison.read(self.folder, chosen)

    def _validate(self, contender: Contender, rate: float) -> float:
        """The best mean validation metric of the first seed at a learning rate."""
        path = self._train(contender, rate, self.plan.seeds[0])
        found = [line[f"eval/{SCORE}"] for line in RunFolder(path).metrics() if f"eval/{SCORE}" in line]
        return max(found, default=float("-inf"))

    def _evaluated(self, contender: Contender, rate: float, seed: int) -> Path:
        """A run with its results, as a path relative to the comparison."""
        path = self._train(contender, rate, seed)
        if not (path / RESULTS).is_file():
            run = load_run(path)
            run = replace(run, recipe=self._recipe(contender, rate, seed))
            evaluate_job(
                run, self.recipe.evaluate, export=self.recipe.export.enabled, base_scores=self.base_scores, quiet=True
            )
        results = read_results(path)
        self.base_scores = results.scores.get("base")
        mean = results.mean(results.main_column or "base")
        say(f"{contender.label}, seed {seed}: mean {100 * (mean or 0):.1f}")
        return path.relative_to(self.folder)

    def _train(self, contender: Contender, rate: float, seed: int) -> Path:
        name = contender.label.replace(" ", "-")
        path = self.folder / RUNS / name / f"lr-{rate:g}-seed-{seed}"
        if RunFolder(path).is_finished:
            return path
        started = time.monotonic()
        self.done += 1
        say(
            f"run {self.done} of at most {self.total}{self._time_left()}: {contender.label}, seed {seed}, rate {rate:g}"
        )
        train_run(self._recipe(contender, rate, seed), path, resume=True)
        self.trained, self.seconds = self.trained + 1, self.seconds + time.monotonic() - started
        return path

    def _recipe(self, contender: Contender, rate: float, seed: int) -> Recipe:
        return replace(
            self.recipe,
            method=MethodChoice(
                name=contender.method,
                options=contender.options,
                target_modules=self.recipe.method.target_modules,
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
