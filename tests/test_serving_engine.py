"""The engine answers every request as stock PEFT would, whatever else is in the batch."""

import json
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from engine_cases import GREEDY, Answer, generated, packed, route, save_lora, stock_answer, tiny_base
from peft import PeftModel, get_peft_model
from serving_cases import wait_for
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, MambaForCausalLM, MistralConfig, Qwen2Config

from loramux.adapters import LoramuxConfig
from loramux.serving.engine import Engine, EngineOptions
from loramux.serving.errors import ServingError
from loramux.serving.factors import PackedLora
from loramux.serving.kv_timeline import KvTimeline
from loramux.serving.mixtures import Mixtures
from loramux.serving.packed import pack_linears
from loramux.serving.request import BASE, Failed, Finished, Request, Route, Sampling
from loramux.serving.slots import adaptable_linears, layout_of
from loramux.serving.threads import compute_on_one_thread
from loramux.support.errors import ConfigError

KINDS = [(4, "all-linear"), (8, ["q_proj", "v_proj"]), (2, ["down_proj"]), (16, "all-linear")]
REPORTING = replace(GREEDY, logprobs=1)


@pytest.fixture(scope="module")
def tiny():
    return tiny_base()


@pytest.fixture(scope="module")
def served():
    """The base under the engines, packed as servers do; answers are compared with those of another one, as it is."""
    model, tokenizer = tiny_base()
    assert pack_linears(model) == len(adaptable_linears(model)) + 1
    return model, tokenizer


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Adapters of different ranks and target modules."""
    place = tmp_path_factory.mktemp("adapters")
    return [save_lora(place / f"a{i}", tiny[0], i, rank, targets) for i, (rank, targets) in enumerate(KINDS)]


@pytest.fixture(scope="module")
def routes(tiny, folders):
    layout = layout_of(tiny[0])
    return [*(route(folder.name, (packed(folder, tiny[0], layout), 1.0)) for folder in folders), BASE]


@pytest.fixture
def engine(served):
    with_engine = Engine(*served, layout_of(served[0]), EngineOptions(max_rows=6, prefill_chunk=16, prefill_tokens=128))
    with_engine.start()
    yield with_engine
    with_engine.stop(drain=False)
    assert not with_engine.is_alive


def some_prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 500) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def expected(tiny, folders, prompts):
    kinds = [*folders, None]
    for i, prompt in enumerate(prompts):
        folder = kinds[i % len(kinds)]
        yield generated(tiny[0], prompt, 8) if folder is None else stock_answer(tiny[0], folder, prompt)


def test_a_mixed_batch_answers_as_stock_generate_does_with_each_adapter(engine, tiny, folders, routes):
    prompts = some_prompts(20)
    answers = [Answer(engine, prompt, REPORTING, routes[i % len(routes)]) for i, prompt in enumerate(prompts)]
    for answer, tokens in zip(answers, expected(tiny, folders, prompts), strict=True):
        assert answer.tokens == tokens
        assert answer.text == tiny[1].decode(tokens, skip_special_tokens=True)
        assert answer.last.reason == ("stop" if tokens[-1] == tiny[1].eos_token_id else "length")


def test_a_second_request_reuses_what_was_read_and_answers_the_same(engine, routes):
    prompt = some_prompts(1, seed=5)[0][:30] * 3
    first = Answer(engine, prompt, REPORTING, routes[0]).wait()
    second = Answer(engine, [*prompt, 7, 8], REPORTING, routes[0]).wait()
    other = Answer(engine, [*prompt, 7, 8], REPORTING, routes[1]).wait()
    assert first.last.cached_tokens == 0
    assert second.last.cached_tokens >= len(prompt)
    assert other.last.cached_tokens == 0, "keys and values belong to the adapter that made them"
    fresh = Answer(engine, [*prompt, 7, 8], REPORTING, replace(routes[0], weights="as if never seen"))
    assert second.tokens == fresh.tokens


def test_a_weighted_mix_is_the_mix_of_stock_peft(engine, tiny, folders, routes):
    parts = ((routes[0].parts[0][0], 0.7), (routes[1].parts[0][0], 0.4))
    model = PeftModel.from_pretrained(tiny[0], folders[0], adapter_name="one")
    model.load_adapter(folders[1], "two")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "mix", combination_type="cat")
    model.set_adapter("mix")
    prompt = some_prompts(1, seed=2)[0]
    wanted = generated(model, prompt, 8)
    model.unload()
    assert Answer(engine, prompt, REPORTING, route("mix", *parts)).tokens == wanted


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(sliding_window=16, num_key_value_heads=2, num_hidden_layers=2, hidden_size=32, vocab_size=600),
        Qwen2Config(num_key_value_heads=2, num_hidden_layers=2, hidden_size=32, vocab_size=600),
        GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=600),
    ],
    ids=["sliding windows", "biases and grouped queries", "learned positions and Conv1D"],
)
def test_other_architectures_answer_as_generate_does(tiny, config, tmp_path):
    if config.model_type != "gpt2":
        config.intermediate_size, config.num_attention_heads = 64, 4
    config.eos_token_id = config.bos_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # at their initial size, answers hardly depend on the prompt
    folder = save_lora(tmp_path / "lora", model, 0, size=2.0)
    layout = layout_of(model)
    prompts = some_prompts(8, longest=40)
    wanted = [stock_answer(model, folder, p) if i % 2 == 0 else generated(model, p, 8) for i, p in enumerate(prompts)]
    engine = Engine(model, tiny[1], layout, EngineOptions(max_rows=4, prefill_chunk=8))
    engine.start()
    where = [route("lora", (packed(folder, model, layout), 1.0)), BASE]
    sampling = replace(REPORTING, ignore_eos=True)
    answers = [Answer(engine, prompt, sampling, where[i % 2]) for i, prompt in enumerate(prompts)]
    assert [answer.tokens for answer in answers] == wanted
    engine.stop()


@pytest.mark.parametrize(
    ("method", "options", "task"),
    [("smora", {"rank": 8, "top_k": 2}, None), ("molora", {"rank": 4, "experts": 3}, None),
     ("task_aware_moe", {"rank": 4, "experts": 3, "top_k": 1}, "two")],
)  # fmt: skip
def test_token_routed_mixtures_share_a_batch_with_adapters(tiny, folders, method, options, task):
    base, tokenizer = tiny_base()
    config = LoramuxConfig(
        method=method, options=options, tasks=["one", "two"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "loramux_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompts = some_prompts(6)
    named = {} if task is None else {"routing_tasks": task}
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **named
            )
        wanted.append(out[0, len(prompt) :].tolist())
    hub = model.base_model
    mixtures = Mixtures(hub, {"mixture": "default"})
    assert mixtures.tasks("mixture") == ([] if task is None else ["one", "two"])
    layout = layout_of(hub.model)
    engine = Engine(hub.model, tokenizer, layout, EngineOptions(max_rows=6, prefill_chunk=16), mixtures)
    engine.start()
    mixture = Route("mixture", "mixture", mixture="mixture", task=task)
    lora = route("a0", (packed(folders[0], tiny[0], layout), 1.0))
    mixed = [Answer(engine, prompt, REPORTING, where) for prompt in prompts for where in (mixture, lora, BASE)]
    assert [answer.tokens for answer in mixed[::3]] == wanted
    assert [answer.tokens for answer in mixed[1::3]] == [stock_answer(tiny[0], folders[0], p) for p in prompts]
    assert [answer.tokens for answer in mixed[2::3]] == [generated(tiny[0], p, 8) for p in prompts]
    engine.stop()


@pytest.mark.parametrize(
    ("method", "reason"), [("moa", "does not route tokens"), ("xlora", "a first pass of the base")]
)
def test_mixtures_that_cannot_share_a_batch_are_refused(tiny, method, reason):
    config = LoramuxConfig(method=method, tasks=["one", "two"], target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_base()[0], config)
    with pytest.raises(ConfigError, match=reason):
        Mixtures(model.base_model, {"mixture": "default"})


def test_models_with_another_kind_of_cache_are_refused(tiny):
    model = MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=16, vocab_size=600))
    with pytest.raises(ConfigError, match="only keys and values of tokens can be batched"):
        Engine(model, tiny[1], layout_of(model))


def test_sampling_with_a_seed_repeats_whatever_else_is_in_the_batch(engine, routes):
    prompt = some_prompts(1)[0]
    drawn = Sampling(max_tokens=12, temperature=1.0, top_p=0.95, top_k=50, seed=3, logprobs=0, ignore_eos=True)
    alone = Answer(engine, prompt, drawn, routes[0]).tokens
    crowd = [Answer(engine, other, GREEDY, routes[1]) for other in some_prompts(8, seed=9)]
    assert Answer(engine, prompt, drawn, routes[0]).tokens == alone
    assert Answer(engine, prompt, replace(drawn, seed=4), routes[0]).tokens != alone
    assert all(isinstance(other.last, Finished) for other in crowd)


def test_logprobs_are_those_of_the_model(engine, tiny):
    prompt = some_prompts(1)[0]
    answer = Answer(engine, prompt, replace(REPORTING, logprobs=3, temperature=0.0)).wait()
    first = answer.events[0].tokens[0]
    with torch.inference_mode():
        wanted = tiny[0](torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert first.logprob == pytest.approx(float(wanted[first.token]), abs=1e-4)
    assert [token for token, _, _ in first.top] == wanted.topk(3).indices.tolist()


def test_a_stop_string_ends_the_answer_before_it(engine, tiny):
    prompt = tiny[1]("one old wolf")["input_ids"]
    whole = Answer(engine, prompt, replace(GREEDY, max_tokens=24, ignore_eos=True)).text
    stop = whole[5:8]
    answer = Answer(engine, prompt, replace(GREEDY, max_tokens=24, ignore_eos=True, stop=(stop,)))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.last.reason == "stop"


def test_an_answer_obeys_its_json_schema(engine, tiny):
    schema = {"type": "object", "properties": {"n": {"enum": ["a", "b"]}}, "required": ["n"]}
    schema = json.dumps({**schema, "additionalProperties": False})
    answer = Answer(engine, tiny[1]("{")["input_ids"], Sampling(max_tokens=60, seed=1, schema=schema))
    assert json.loads(answer.text)["n"] in ("a", "b")
    assert answer.last.reason == "stop"


def test_answers_to_one_schema_do_not_share_their_way_through_it(engine):
    sampling = Sampling(max_tokens=60, seed=1, schema=json.dumps({"enum": ["one", "two", "three"]}))
    answers = [Answer(engine, [5, 6], replace(sampling, seed=seed)) for seed in range(8)]
    assert {json.loads(answer.text) for answer in answers} <= {"one", "two", "three"}


def test_a_schema_that_takes_too_much_work_fails_its_answer_and_no_other(engine):
    schema = json.dumps({"type": "string", "pattern": "^(.{0,300}a.{0,300}){3}$"})
    bad = Answer(engine, [5, 6], Sampling(max_tokens=120, temperature=2.0, seed=0, schema=schema, ignore_eos=True))
    good = Answer(engine, [5, 6], replace(GREEDY, max_tokens=120, ignore_eos=True))
    assert bad.last.code == "invalid_schema"
    assert "the JSON schema cannot be followed: lexer error: too many" in bad.last.message
    assert good.last.completion_tokens == 120
    huge = Answer(engine, [5, 6], replace(GREEDY, schema=json.dumps({"enum": ["x" * 200_000]})))
    assert "at most 131072 are followed" in huge.last.message


def test_a_schema_that_cannot_be_followed_fails_alone(engine):
    bad = Answer(engine, [5, 6], replace(GREEDY, schema='{"type": "no such type"}'))
    good = Answer(engine, [5, 6])
    assert isinstance(bad.last, Failed)
    assert bad.last.code == "invalid_schema"
    assert isinstance(good.last, Finished)


def test_a_request_that_is_cancelled_leaves_and_others_go_on(engine, routes):
    long = replace(GREEDY, max_tokens=120, ignore_eos=True)
    gone, stays = Answer(engine, [5], long, routes[0]), Answer(engine, [6], REPORTING, routes[1])
    gone.request.cancel()
    assert gone.last.reason == "cancelled"
    assert gone.last.completion_tokens < 120
    assert stays.last.reason in ("stop", "length")


def test_a_deadline_ends_an_answer_with_what_there_is(engine):
    answer = Answer(engine, [5], replace(GREEDY, max_tokens=120, ignore_eos=True), deadline=time.monotonic() + 0.02)
    assert answer.last.reason == "deadline"


def test_no_name_waits_for_another_names_crowd(engine, routes):
    crowd = [Answer(engine, [5, 6], replace(GREEDY, max_tokens=30, ignore_eos=True), routes[0]) for _ in range(40)]
    single = Answer(engine, [5, 6], replace(GREEDY, max_tokens=30, ignore_eos=True), routes[1]).wait()
    waiting = [answer for answer in crowd if not any(isinstance(event, Finished) for event in answer.events)]
    assert len(waiting) > 20
    assert isinstance(single.last, Finished)
    for answer in crowd:
        answer.wait()


def test_an_adapter_whose_values_overflow_fails_alone(engine, tiny, folders, routes):
    lora = routes[0].parts[0][0]
    broken = route("broken", (replace(lora, flat=lora.flat * 1e30), 1.0))
    prompt = some_prompts(1)[0]
    wanted = stock_answer(tiny[0], folders[1], prompt)
    answers = []
    for _ in range(6):
        answers.append((Answer(engine, prompt, REPORTING, broken), Answer(engine, prompt, REPORTING, routes[1])))
    for bad, good in answers:
        assert bad.last.code == "not_finite"
        assert good.tokens == wanted


def test_requests_that_cannot_be_served_are_refused_at_once(engine):
    with pytest.raises(ServingError, match="no tokens") as refused:
        Answer(engine, [])
    assert refused.value.code == "empty_prompt"
    with pytest.raises(ServingError, match="together they may have at most") as refused:
        Answer(engine, [5] * engine.max_length)
    assert refused.value.code == "context_length_exceeded"


def test_a_full_queue_refuses(tiny):
    engine = Engine(*tiny, layout_of(tiny[0]), EngineOptions(max_waiting=2))  # never started, so nothing leaves
    for _ in range(2):
        Answer(engine, [5])
    with pytest.raises(ServingError, match="are waiting already") as refused:
        Answer(engine, [5])
    assert (refused.value.code, refused.value.status) == ("queue_full", 429)


@pytest.mark.parametrize("drain", [True, False])
def test_stopping_finishes_or_drops_and_takes_no_more(served, drain):
    engine = Engine(*served, layout_of(served[0]), EngineOptions(max_rows=2))
    engine.start()
    answers = [Answer(engine, [5], replace(GREEDY, max_tokens=40, ignore_eos=True)) for _ in range(6)]
    engine.stop(drain=drain)
    reasons = {answer.last.reason for answer in answers}
    assert reasons == {"length"} if drain else "cancelled" in reasons
    with pytest.raises(ServingError, match="shutting down"):
        Answer(engine, [5])


def test_embeddings_are_the_mean_hidden_state_of_the_base(engine, tiny, routes):
    busy = Answer(engine, [5], replace(GREEDY, max_tokens=50, ignore_eos=True), routes[0])
    prompts = some_prompts(3)
    found = engine.embed(prompts).result(30)
    for prompt, vector in zip(prompts, found, strict=True):
        with torch.inference_mode():
            wanted = tiny[0].model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, wanted, atol=1e-5)
    assert busy.last.completion_tokens == 50
    endless = [5, 6, 7] * engine.max_length
    cut = engine.embed([endless[: engine.max_length]]).result(30)
    assert torch.allclose(engine.embed([endless]).result(30), cut, atol=1e-6)


def test_many_embeddings_are_made_between_the_steps_of_others(tiny):
    engine = Engine(*tiny, layout_of(tiny[0]), EngineOptions(prefill_tokens=100))
    engine.start()
    prompts = some_prompts(12)
    busy = Answer(engine, [5], replace(GREEDY, max_tokens=100, ignore_eos=True))
    cancelled = engine.embed(prompts * 50)
    found, steps = engine.embed(prompts).result, engine.stats().steps
    assert cancelled.cancel()
    for prompt, vector in zip(prompts, found(30), strict=True):
        assert torch.allclose(vector, engine.embed([prompt]).result(30)[0], atol=1e-5)
    assert engine.stats().steps > steps
    assert isinstance(busy.last, Finished)
    engine.stop()


def test_an_adapter_that_cannot_be_laid_out_harms_none_that_are_being_decoded(engine, routes):
    endless = replace(REPORTING, max_tokens=100, ignore_eos=True)
    wanted = Answer(engine, [5], endless, routes[0]).tokens
    wrong = PackedLora(4, torch.zeros(3), frozenset({0}))
    others = [Answer(engine, [5], endless, routes[0]) for _ in range(4)]
    wait_for(lambda: engine.stats().running == len(others))
    assert Answer(engine, [5], GREEDY, route("wrong", (wrong, 1.0))).last.code == "engine_error"
    assert [answer.tokens for answer in others] == [wanted] * 4
    assert Answer(engine, [5], endless, routes[0]).tokens == wanted


def test_a_batch_that_has_no_memory_to_grow_fails_whole_and_the_engine_goes_on(engine, monkeypatch):
    def full(self: KvTimeline, other: KvTimeline, row: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(KvTimeline, "join", full)
        answers = [Answer(engine, [5]) for _ in range(3)]
        assert {answer.last.code for answer in answers} == {"out_of_memory"}
    assert isinstance(Answer(engine, [5]).last, Finished)


def test_who_cannot_take_events_harms_nobody_else(engine):
    def refuse(event: object) -> None:
        raise RuntimeError("nobody is here")

    engine.submit(Request([5], GREEDY, BASE, refuse))
    assert isinstance(Answer(engine, [5]).last, Finished)
    assert engine.is_alive


def test_nobody_minds_an_embedding_that_is_not_wanted_any_more(engine):
    busy = Answer(engine, [5], replace(GREEDY, max_tokens=50, ignore_eos=True))
    unwanted = [engine.embed([[5, 6]]) for _ in range(8)]
    assert any([future.cancel() for future in unwanted])
    assert engine.embed([[5, 6]]).result(30).shape[0] == 1
    assert busy.last.completion_tokens == 50


def test_rows_come_and_go_at_random_and_every_answer_is_its_own(engine, tiny, folders, routes):
    prompts = some_prompts(5, seed=11)
    wanted = list(expected(tiny, folders, prompts))
    draw, failures = random.Random(3), []

    def client() -> None:
        for _ in range(6):
            i = draw.randrange(5)
            answer = Answer(engine, prompts[i], REPORTING, routes[i])
            if draw.random() < 0.3:
                answer.request.cancel()
                answer.wait()
            elif answer.tokens != wanted[i]:
                failures.append((i, answer.tokens))

    clients = [threading.Thread(target=client) for _ in range(12)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(120)
    assert not failures
    stats = engine.stats()
    assert (stats.waiting, stats.prefilling) == (0, 0)


def test_the_engine_computes_on_its_threads_however_many_others_take(served, tiny):
    model, tokenizer = served
    used, before = set(), torch.get_num_threads()
    hook = model.register_forward_pre_hook(lambda *_: used.add(torch.get_num_threads()))
    engine = Engine(model, tokenizer, layout_of(model), EngineOptions(threads=2))
    used.clear()
    engine.start()
    another = threading.Thread(target=compute_on_one_thread)  # as those that load adapters do, before the first step
    another.start()
    another.join()
    try:
        assert Answer(engine, [5, 6, 7], REPORTING, BASE).tokens == generated(tiny[0], [5, 6, 7], 8)
    finally:
        engine.stop(drain=False)
        hook.remove()
        torch.set_num_threads(before)
    assert used == {2}
