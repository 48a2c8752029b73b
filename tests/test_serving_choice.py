"""The automatic choice: a run's learned router decides as its hub does, prototypes follow adapters that come and go,
and what is not served is never chosen."""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from training_cases import ANSWERS, NOUNS, make_recipe

from loramux.serving.choice import Choice, Chooser
from loramux.serving.engine import Engine
from loramux.serving.errors import ServingError
from loramux.serving.prototypes import Prototypes
from loramux.serving.runs import EXAMPLES, ServedRun, served_run
from loramux.serving.slots import layout_of
from loramux.serving.store import AdapterStore
from loramux.support.errors import RunError
from loramux.training.run import load_run, train_run

PROMPTS = [f"{task} of the {noun}" for task in ANSWERS for noun in NOUNS[:4]]


@pytest.fixture(scope="module")
def run(finished_job: Path) -> ServedRun:
    return served_run(finished_job)


@pytest.fixture(scope="module")
def engine(run: ServedRun) -> Iterator[Engine]:
    engine = Engine(run.model, run.tokenizer, layout_of(run.model))
    engine.start()
    yield engine
    engine.stop(drain=False)


@pytest.fixture
def store(run: ServedRun) -> AdapterStore:
    return AdapterStore(layout_of(run.model), run.model, run.adapters.base_names, [run.adapters.root])


@pytest.fixture
def prototypes(store: AdapterStore, run: ServedRun, engine: Engine) -> Iterator[Prototypes]:
    found = Prototypes(store.examples, lambda text: encode(run, text), engine.embed).start()
    store.subscribe(found.refresh)
    yield found
    found.stop()


def encode(run: ServedRun, prompt: str) -> list[int]:
    return run.tokenizer(prompt)["input_ids"]


def load_all(store: AdapterStore, run: ServedRun) -> None:
    for task, folder in run.adapters.folders.items():
        store.load(task, folder, prompts=run.examples[task])


# ---------------------------------------------------------------------- runs


def test_a_run_is_served_as_its_bare_base_and_its_exports(run: ServedRun, store: AdapterStore) -> None:
    assert set(run.adapters.folders) == set(ANSWERS)
    assert "somebody/tiny-base" in run.adapters.base_names
    assert not isinstance(run.model, PeftModel)
    assert not any("loramux" in name for name, _ in run.model.named_modules())
    assert (run.mixture, run.notes) == (None, [])
    load_all(store, run)
    assert store.names() == set(ANSWERS)


def test_example_prompts_are_from_all_over_the_training_split(run: ServedRun) -> None:
    for task, prompts in run.examples.items():
        assert len(prompts) == EXAMPLES
        assert all(prompt.startswith(task) for prompt in prompts)


def test_a_mixture_that_routes_tokens_is_a_model_of_its_own(finished_job: Path, tmp_path: Path) -> None:
    places = finished_job.parent / "base", finished_job.parent / "data" / "tasks.yaml"
    recipe = make_recipe(*places, "method={name: smora, options: {rank: 8}}", "train.steps=1")
    run = tmp_path / "smora"
    train_run(recipe, run, evaluate=None)
    served = served_run(run)
    assert (served.mixture, served.router) == ("smora", None)
    assert isinstance(served.model, PeftModel)
    assert len(served.notes) == 1
    assert f"{run}: no exports; `loramux export {run} --all --to {run / 'exports'}` makes them" in served.notes[0]


def test_a_run_whose_data_is_not_here_is_served_without_example_prompts(finished_job: Path) -> None:
    copied = Path(shutil.copytree(finished_job, finished_job.parent / "copied"))
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text())
    (copied / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "tasks": "nowhere.yaml"}))
    (copied / "exports" / "refused.json").write_text('{"other": "it loses too much"}')
    served = served_run(copied)
    assert served.examples == {}
    assert served.notes[0] == "task 'other' has no adapter: it loses too much"
    assert "no example prompts of the run's tasks: " in served.notes[1]
    assert "nowhere.yaml" in served.notes[1]


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        served_run(tmp_path)


# ---------------------------------------------------------------------- the learned router


def test_the_learned_choice_is_the_hubs_own(finished_job: Path, run: ServedRun, store: AdapterStore, engine) -> None:
    load_all(store, run)
    chooser = Chooser(run.router, store.names, engine.embed)
    model = load_run(finished_job).model
    chosen = set()
    for prompt in PROMPTS:
        ids = encode(run, prompt)
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids]))
        decision = model.base_model.context.decisions["default", 0]
        choice = chooser.choose(ids)
        assert choice.adapter == model.base_model.tasks[int(decision.weights.argmax())]
        expected = dict(zip(model.base_model.tasks, decision.probabilities[0].tolist(), strict=True))
        assert choice.weights == pytest.approx(expected, abs=1e-5)
        assert choice.weight == max(choice.weights.values())
        assert list(choice.weights.values()) == sorted(choice.weights.values(), reverse=True)
        chosen.add(choice.adapter)
    assert len(chosen) > 1


def test_adapters_that_are_not_served_are_never_chosen(run: ServedRun, store: AdapterStore, engine: Engine) -> None:
    load_all(store, run)
    chooser = Chooser(run.router, store.names, engine.embed)
    ids = encode(run, PROMPTS[0])
    ranking = list(chooser.choose(ids).weights)
    for gone in range(len(ranking)):
        choice = chooser.choose(ids)
        assert choice.adapter == ranking[gone]
        assert list(choice.weights) == ranking[gone:]
        assert sum(choice.weights.values()) == pytest.approx(1)
        store.unload(ranking[gone])
    assert chooser.choose(ids) == Choice(None, 0.0, {})
    store.load(ranking[1], run.adapters.folders[ranking[1]])
    assert chooser.choose(ids) == Choice(ranking[1], 1.0, {ranking[1]: 1.0})


def test_below_the_threshold_the_base_answers(run: ServedRun, store: AdapterStore, engine: Engine) -> None:
    load_all(store, run)
    ids = encode(run, PROMPTS[0])
    sure = Chooser(run.router, store.names, engine.embed).choose(ids)
    assert Chooser(run.router, store.names, engine.embed, threshold=sure.weight).choose(ids) == sure
    unsure = Chooser(run.router, store.names, engine.embed, threshold=sure.weight + 1e-6).choose(ids)
    assert unsure == Choice(None, sure.weight, sure.weights)


def test_an_engine_that_does_not_answer_is_not_waited_for_forever(run: ServedRun, store: AdapterStore) -> None:
    chooser = Chooser(run.router, store.names, lambda _: Future(), timeout_s=0.05)
    with pytest.raises(ServingError, match=r"not read within 0.05 s; name an adapter") as caught:
        chooser.choose([1])
    assert (caught.value.code, caught.value.status) == ("choice_timeout", 504)


# ---------------------------------------------------------------------- prototypes


def test_prototypes_are_mean_directions_and_follow_loads_and_unloads(run, store, engine, prototypes) -> None:
    chooser = Chooser(prototypes, store.names, engine.embed)
    assert chooser.choose(encode(run, PROMPTS[0])).adapter is None
    for count, (task, folder) in enumerate(run.adapters.folders.items(), start=1):
        store.load(task, folder, prompts=run.examples[task])
        assert prototypes.wait(30)
        assert len(chooser.choose(encode(run, PROMPTS[0])).weights) == count
    for prompt in PROMPTS:
        choice = chooser.choose(encode(run, prompt))
        assert choice.weights == pytest.approx(by_hand(run, engine, prompt), abs=1e-3)
        assert choice.adapter == next(iter(choice.weights))
    gone = choice.adapter
    store.unload(gone)
    assert gone not in chooser.choose(encode(run, PROMPTS[-1])).weights
    store.load(gone, run.adapters.folders[gone], prompts=run.examples[gone])
    assert prototypes.wait(30)
    again = chooser.choose(encode(run, PROMPTS[-1]))
    assert (again.adapter, again.weights) == (gone, pytest.approx(choice.weights, abs=1e-3))


def by_hand(run: ServedRun, engine: Engine, prompt: str) -> dict[str, float]:
    def direction(text: str) -> Tensor:
        return torch.nn.functional.normalize(engine.embed([encode(run, text)]).result(30)[0], dim=-1)

    means = {task: torch.stack([direction(t) for t in prompts]).mean(0) for task, prompts in run.examples.items()}
    cosines = torch.stack([torch.cosine_similarity(mean, direction(prompt), dim=-1) for mean in means.values()])
    return dict(zip(means, (cosines / 0.02).softmax(-1).tolist(), strict=True))


def test_an_adapter_without_example_prompts_is_not_chosen_until_it_has_some(run, store, engine, prototypes) -> None:
    chooser = Chooser(prototypes, store.names, engine.embed)
    store.load("sound", "sound")
    assert prototypes.wait(30)
    assert chooser.choose(encode(run, "sound of the dog")).adapter is None
    store.load("sound", "sound", prompts=["sound of the cat"])
    assert prototypes.wait(30)
    assert chooser.choose(encode(run, "sound of the dog")).adapter == "sound"


def test_a_replacement_keeps_the_example_prompts_unless_it_brings_its_own(run, store, engine, prototypes) -> None:
    chooser = Chooser(prototypes, store.names, engine.embed)
    first = store.load("x", "sound", prompts=["sound of the cat"])
    second = store.replace("x", "home", expected_generation=first.generation)
    assert store.examples() == {"x": ("sound of the cat",)}
    store.replace("x", "colour", expected_generation=second.generation, prompts=["colour of the fish"])
    assert prototypes.wait(30)
    assert store.examples() == {"x": ("colour of the fish",)}
    pooled = engine.embed([encode(run, "colour of the fish")]).result(30)[0]
    assert float(prototypes.scores(pooled)[1]) == pytest.approx(1 / 0.02, rel=1e-5)
    assert chooser.decide(pooled).adapter == "x"


def test_prompts_that_cannot_be_read_are_told_and_leave_the_others_alone(run, store, engine, caplog) -> None:
    def broken(text: str) -> list[int]:
        if text == "broken":
            raise ValueError("no such word")
        return encode(run, text)

    prototypes = Prototypes(store.examples, broken, engine.embed)
    store.subscribe(prototypes.refresh)
    store.load("bad", "home", prompts=["broken"])
    store.load("good", "sound", prompts=["sound of the cat"])
    prototypes.start()
    assert prototypes.wait(30)
    assert "adapter bad is not chosen automatically: its example prompts cannot be read: no such word" in caplog.text
    assert prototypes.scores(torch.ones(32))[0] == ("good",)
    prototypes.stop()
