"""Questions put to a model: batched answers equal answers one by one, on one process or several."""

import random
from contextlib import nullcontext
from pathlib import Path

import cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel
from torch import nn
from training_cases import NOUNS, write_base, write_tasks
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from loramux.adapters import LoramuxModel
from loramux.bases import load_base
from loramux.support.errors import AdapterError
from loramux.tasks import EncodedTask, Task, encode_task, load_tasks
from loramux.training import answers
from loramux.training.answers import Respondent
from loramux.training.evaluate import Prediction, eval_mode, evaluate_tasks, mean_score, questions
from loramux.training.usage import routing_usage

TASKS = cases.TASKS


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks")).parent


@pytest.fixture(scope="module")
def encoded(base_folder: Path, task_folder: Path) -> list[EncodedTask]:
    """Two open tasks and one whose answers are chosen from two."""
    return encode_all(base_folder, task_folder)


def encode_all(base_folder: Path, task_folder: Path) -> list[EncodedTask]:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tasks = load_tasks(task_folder / "tasks.yaml")
    closed = {"prompt": "{prompt}", "target": "{completion}", "choices": ["loud", "soft"]}
    source = {"path": str(task_folder / "sound")}
    tasks = [load_tasks([{"name": "sound", "source": source, **closed}])[0] if t.name == "sound" else t for t in tasks]
    return [encode_task(task, tokenizer, max_length=64) for task in tasks]


def tiny_gpt2() -> GPT2LMHeadModel:
    """Absolute positions: padding on the left must not move a prompt."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=48, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def routed(method: str, tasks: list[str] = TASKS) -> PeftModel:
    """A tiny model whose experts are not zero, so that routing changes what it says."""
    model = cases.adapted(method, tasks=tasks).eval()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "loramux" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def drawn_questions(seed: int = 0) -> tuple[list[list[int]], list[list[tuple[int, ...]]]]:
    """Prompts of 1-12 tokens, with 1-20 options of 1-4 tokens; some options begin alike."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(3, 64) for _ in range(rng.randint(least, most))]

    prompts = [tokens(1, 12) for _ in range(4)]
    options = [[tuple(tokens(1, 4)) for _ in range(size)] for size in (1, 2, 18, 4)]
    options[1] += [(*options[1][0], 5), (*options[1][0], 6)]
    return prompts, options


def log_likelihood(model: nn.Module, prompt: list[int], option: tuple[int, ...], **routing: object) -> float:
    """One option of one prompt, by itself and without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *option]]), **routing).logits[0]
    chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(chosen[range(len(option)), list(option)].sum())


@pytest.fixture(params=["shared prompt", "one by one"])
def any_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of scoring: from copies of the prompt's cache, and from scratch for models without such a cache."""
    if request.param == "one by one":
        monkeypatch.setattr(answers, "_can_be_copied", lambda cache: False)


@pytest.mark.usefixtures("any_cache")
@pytest.mark.parametrize("build", [cases.tiny_llama, tiny_gpt2])
def test_option_scores_equal_one_forward_per_option(build) -> None:
    model, (prompts, options) = build(), drawn_questions()
    found = Respondent(model, _Ends()).option_scores(prompts, options)
    for prompt, listed, scores in zip(prompts, options, found, strict=True):
        expected = [log_likelihood(model, prompt, option) for option in listed]
        assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("any_cache")
@pytest.mark.parametrize("method", sorted(cases.CASES))
def test_option_scores_follow_the_routing_of_every_prompt(method: str) -> None:
    model, (prompts, options) = routed(method), drawn_questions(1)
    options = [listed[:4] for listed in options]
    with model.base_model.routing("where") if model.base_model.needs_task else nullcontext():
        found = Respondent(model, _Ends()).option_scores(prompts, options)
        for prompt, listed, scores in zip(prompts, options, found, strict=True):
            for option, score in zip(listed, scores, strict=True):
                mask = torch.tensor([[True] * len(prompt) + [False] * len(option)])
                assert score == pytest.approx(log_likelihood(model, prompt, option, routing_mask=mask), abs=1e-3)


def test_options_are_scored_in_blocks_that_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompts, options) = cases.tiny_llama(), drawn_questions()
    whole = Respondent(model, _Ends()).option_scores(prompts, options)
    blocks = []
    original = Respondent._continue
    monkeypatch.setattr(answers, "_LOGIT_BUDGET", 64 * 20)
    monkeypatch.setattr(
        Respondent, "_continue", lambda self, block, *rest: blocks.append(block) or original(self, block, *rest)
    )
    parts = Respondent(model, _Ends()).option_scores(prompts, options)
    assert max(len(block.rows) * block.width for block in blocks if block.copies > 1) <= 20
    assert [v for row in parts for v in row] == pytest.approx([v for row in whole for v in row], abs=1e-4)


@pytest.mark.parametrize("build", [cases.tiny_llama, tiny_gpt2])
def test_batched_greedy_answers_equal_answers_one_by_one(build) -> None:
    model, (prompts, _) = build(), drawn_questions()
    found = Respondent(model, _Ends()).generate(prompts, 10)
    for prompt, answer in zip(prompts, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, pad_token_id=0)
        tokens = alone[0, len(prompt) :].tolist()
        assert answer == (tokens[: tokens.index(2)] if 2 in tokens else tokens)


def test_generation_stops_at_any_stop_token_and_at_the_models_last_position() -> None:
    model, (prompts, _) = tiny_gpt2(), drawn_questions()
    free = Respondent(model, _Ends()).generate(prompts, 6)
    stop = free[0][1]
    stopped = Respondent(model, _Ends()).generate(prompts, 6, [stop])
    assert stopped[0] == free[0][: free[0].index(stop)]
    long = [[5] * 40]
    assert len(Respondent(model, _Ends()).generate(long, 100)[0]) <= 8  # 48 positions


@pytest.mark.parametrize("build", [cases.tiny_llama, tiny_gpt2])
def test_a_long_prompt_shortens_its_own_answer_only(build) -> None:
    model = build()
    positions = model.config.max_position_embeddings
    prompts = [[5] * (positions - 3), [6, 7], [8] * (positions - 6), [9] * 4]
    answers = Respondent(model, _Ends()).generate(prompts, 10, [63])
    assert answers == [Respondent(model, _Ends()).generate([prompt], 10, [63])[0] for prompt in prompts]
    assert [len(answer) for answer in answers] == [3, 10, 6, 10]


def test_scores_are_those_of_the_likeliest_choice(base_folder: Path, encoded: list[EncodedTask]) -> None:
    model, tokenizer = load_base(base_folder)
    task = next(task for task in encoded if task.name == "sound")
    found: list[Prediction] = []
    scores = evaluate_tasks(model, tokenizer, [task], predictions=found, batch_size=4)["sound"]
    right, total, tokens = 0, 0.0, 0
    for question, answer in zip(questions(task, "test", None), found, strict=True):
        each = [log_likelihood(model, list(question.prompt), option) for option in question.encoded.choices or ()]
        best = ["loud", "soft"][each.index(max(each))]
        assert (answer.prediction, answer.reference) == (best, question.example.target)
        right += best == question.example.target
        total += log_likelihood(model, list(question.prompt), question.answer)
        tokens += len(question.answer)
    assert scores["accuracy"] == right / len(found)
    assert scores["loss"] == pytest.approx(-total / tokens, abs=1e-5)
    assert scores["examples"] == len(found) == 6


def test_options_can_be_compared_per_token(base_folder: Path) -> None:
    model, tokenizer = load_base(base_folder)
    choices = ["red", "red red", "the sea", "the red land of the sea", "is"]
    rows = [{"input": f"{place} of the {noun}", "target": "red"} for noun in NOUNS for place in ("home", "sound")]
    splits = {"train": rows, "validation": rows, "test": rows}
    task = Task.from_rows("t", splits, choices=choices, prompt="{input}", target="{target}")
    one = encode_task(task, tokenizer, max_length=64)
    by_sum: list[Prediction] = []
    by_mean: list[Prediction] = []
    evaluate_tasks(model, tokenizer, [one], predictions=by_sum)
    evaluate_tasks(model, tokenizer, [one], predictions=by_mean, length_normalised=True)
    for question, summed, mean in zip(questions(one, "test", None), by_sum, by_mean, strict=True):
        options = question.encoded.choices or ()
        sums = [log_likelihood(model, list(question.prompt), option) for option in options]
        means = [value / len(option) for value, option in zip(sums, options, strict=True)]
        assert summed.prediction == choices[sums.index(max(sums))]
        assert mean.prediction == choices[means.index(max(means))]
    assert [p.prediction for p in by_sum] != [p.prediction for p in by_mean]


def test_batch_size_does_not_change_a_score(base_folder: Path, encoded: list[EncodedTask]) -> None:
    model, tokenizer = load_base(base_folder)
    one, many = (evaluate_tasks(model, tokenizer, encoded, batch_size=size) for size in (1, 64))
    for task in encoded:
        assert one[task.name] == pytest.approx(many[task.name], abs=1e-5)
    metrics = [one[task.name][task.task.metrics[0]] for task in encoded]
    assert mean_score(one, encoded) == pytest.approx(sum(metrics) / 3)


def test_one_long_prompt_changes_no_other_answer_of_its_task(base_folder: Path) -> None:
    model, tokenizer = load_base(base_folder)
    prompts = [f"{place} of the {noun}" for noun in NOUNS for place in ("home", "sound")]
    long = " ".join(["sea"] * 58)  # the model has 64 positions
    found: dict[tuple[bool, int], list[Prediction]] = {}
    for with_long in (False, True):
        rows = [{"input": prompt, "target": "red"} for prompt in [*prompts, *([long] if with_long else [])]]
        options = {"prompt": "{input}", "target": "{target}", "choices": [], "max_new_tokens": 20}
        given = Task.from_rows("t", {"train": rows, "validation": rows}, **options)
        task = encode_task(given, tokenizer, max_length=64)
        for size in (4, 64):
            found[with_long, size] = []
            evaluate_tasks(model, tokenizer, [task], batch_size=size, predictions=found[with_long, size])
    texts = {key: [answer.prediction for answer in answers] for key, answers in found.items()}
    assert texts[True, 4] == texts[True, 64]
    assert texts[True, 64][: len(prompts)] == texts[False, 4] == texts[False, 64]
    lengths = [len(text.split()) for text in texts[True, 64]]
    assert lengths[-1] <= 6 < max(lengths[:-1])


def test_a_limit_draws_the_same_examples_each_time(encoded: list[EncodedTask]) -> None:
    first, second = (questions(encoded[0], "train", 7) for _ in range(2))
    assert first == second
    assert len({q.index for q in first}) == 7
    assert [q.index for q in first] != list(range(7))  # files are often sorted by label
    assert len(questions(encoded[0], "test", 1000)) == 6


def test_a_task_without_a_test_split_is_scored_on_its_validation_examples(encoded: list[EncodedTask]) -> None:
    task = encoded[0]
    without = EncodedTask(
        task.task, {k: v for k, v in task.splits.items() if k != "test"}, task.examples, task.too_long, task.stop_ids
    )
    assert questions(without, "test", None) == questions(task, "validation", None)
    assert (without.split_used("test"), task.split_used("test")) == ("validation", "test")


def test_naming_the_task_and_leaving_it_to_the_router_are_different_questions(
    base_folder: Path, encoded: list[EncodedTask]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = routed("moa", [task.name for task in encoded])
    hub: LoramuxModel = model.base_model
    router = next(hub.routers())
    with torch.no_grad():  # all scores alike: every prompt goes to the first task
        for parameter in router.parameters():
            parameter.zero_()
    named = evaluate_tasks(model, tokenizer, encoded, routing="named")
    auto = evaluate_tasks(model, tokenizer, encoded, routing="auto")
    assert [auto[task.name]["routing_accuracy"] for task in encoded] == [1.0, 0.0, 0.0]
    assert "routing_accuracy" not in named[encoded[0].name]
    assert auto[encoded[0].name]["loss"] == pytest.approx(named[encoded[0].name]["loss"], abs=1e-6)
    assert auto[encoded[1].name]["loss"] != pytest.approx(named[encoded[1].name]["loss"], abs=1e-3)
    usage = routing_usage(model, tokenizer, encoded)
    assert usage is not None
    assert usage.layers["prompt"].usage().tolist() == [[1, 0, 0]] * 3
    assert usage.layers["prompt"].tokens.tolist() == [6, 6, 6]  # prompts, one decision each


def test_usage_of_token_routers_counts_every_real_token_once(base_folder: Path, encoded: list[EncodedTask]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    usage = routing_usage(routed("smora", [t.name for t in encoded]), tokenizer, encoded, batch_size=4)
    assert usage is not None
    lengths = [sum(len(e.input_ids) for e in task.splits["test"]) for task in encoded]
    for layer in usage.layers.values():
        assert layer.tokens.tolist() == lengths
        assert layer.usage().sum(-1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert routing_usage(routed("lora"), tokenizer, encoded) is None


def test_a_method_routed_by_task_cannot_be_left_to_a_router(base_folder: Path, encoded: list[EncodedTask]) -> None:
    model = cases.adapted("moelora", tasks=[task.name for task in encoded])
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    with pytest.raises(AdapterError, match="routed by task and has no router that reads prompts: name the task"):
        evaluate_tasks(model, tokenizer, encoded, routing="auto", limit=2)
    assert evaluate_tasks(model, tokenizer, encoded, routing="named", limit=2)


def test_evaluation_leaves_every_module_in_its_mode() -> None:
    model = routed("moa").train()
    frozen = model.get_base_model().lm_head.eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not frozen.training


def test_two_processes_find_what_one_finds(
    base_folder: Path, task_folder: Path, encoded: list[EncodedTask], tmp_path: Path
) -> None:
    model, tokenizer = load_base(base_folder)
    found: list[Prediction] = []
    scores = evaluate_tasks(model, tokenizer, encoded, batch_size=2, predictions=found)
    mp.spawn(_evaluate_in_process, (tmp_path, base_folder, task_folder), nprocs=2)
    for rank in range(2):
        other_scores, other = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert [(p.task, p.index, p.prediction) for p in other] == [(p.task, p.index, p.prediction) for p in found]
        for task in scores:
            assert other_scores[task] == pytest.approx(scores[task], abs=1e-5)


def _evaluate_in_process(rank: int, folder: Path, base_folder: Path, task_folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model, tokenizer = load_base(base_folder)
    found: list[Prediction] = []
    scores = evaluate_tasks(model, tokenizer, encode_all(base_folder, task_folder), batch_size=2, predictions=found)
    torch.save((scores, found), folder / f"{rank}.pt")
    dist.destroy_process_group()


class _Ends:
    """All that a respondent asks of a tokenizer when it is given token ids."""

    pad_token_id, eos_token_id = 0, 2
