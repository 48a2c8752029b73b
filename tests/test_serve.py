"""Serving a run: the routes clients speak, the right adapter for each name, and clear refusals."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
import torch
from training_cases import ANSWERS, make_recipe, write_base, write_tasks

from loramux.serve import MAX_BODY_BYTES, Engine, make_server
from loramux.training.run import train_run

Call = Callable[..., tuple[int, dict]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("served")
    recipe = make_recipe(write_base(folder / "base"), write_tasks(folder / "tasks"), "train.learning_rate=0.05")
    return Engine(train_run(recipe, folder / "run", evaluate=None))


@pytest.fixture(scope="module")
def call(engine: Engine) -> Iterator[Call]:
    server = make_server(engine, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def send(path: str, body: dict | bytes | None = None) -> tuple[int, dict]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    yield send
    server.shutdown()
    server.server_close()


def test_the_list_names_the_router_every_task_and_the_base(call):
    status, body = call("/v1/models")
    assert status == 200
    names = [model["id"] for model in body["data"]]
    assert (names[0], sorted(names[1:-1]), names[-1]) == ("auto", sorted(ANSWERS), "base")


@pytest.mark.parametrize("task", list(ANSWERS))
def test_a_named_task_answers_as_generate_does(engine, call, task):
    prompt = f"{task} of the cat"
    _, body = call("/v1/completions", {"model": task, "prompt": prompt, "max_tokens": 3, "temperature": 0})
    inputs = engine.tokenizer(prompt, return_tensors="pt")
    expected = engine.model.generate(
        inputs["input_ids"], routing_tasks=task, max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    answer = engine.tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert body["choices"][0]["text"] == answer
    assert body["choices"][0]["adapter"] == task
    assert body["usage"]["prompt_tokens"] == 4


def test_prompts_of_one_request_are_routed_one_by_one_and_say_by_whom(engine, call):
    prompts = ["colour of the dog", "sound of the horse of the cat is", "home of the fish"]
    _, body = call("/v1/completions", {"prompt": prompts, "max_tokens": 2, "temperature": 0})
    for index, prompt in enumerate(prompts):
        choice = body["choices"][index]
        assert choice["adapter"] in ANSWERS
        named = {"model": choice["adapter"], "prompt": prompt, "max_tokens": 2, "temperature": 0}
        assert call("/v1/completions", named)[1]["choices"][0]["text"] == choice["text"]


def test_the_base_is_served_without_any_adapter(engine, call):
    _, body = call("/v1/completions", {"model": "base", "prompt": "cat", "max_tokens": 4, "temperature": 0})
    ids = engine.tokenizer("cat", return_tensors="pt")["input_ids"]
    with engine.model.disable_adapter(), torch.no_grad():
        expected = engine.model.base_model.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert body["choices"][0]["text"] == engine.tokenizer.decode(expected[0, 1:], skip_special_tokens=True)


def test_a_seed_repeats_a_sampled_answer_and_a_stop_string_ends_it(call):
    request = {"model": "base", "prompt": "cat dog", "max_tokens": 12, "seed": 5, "temperature": 2}
    texts = {call("/v1/completions", request)[1]["choices"][0]["text"] for _ in range(2)}
    assert len(texts) == 1
    text = texts.pop()
    stop = text.split()[-1]
    choice = call("/v1/completions", {**request, "stop": stop})[1]["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "nobody", "prompt": "cat"}, 404, "model 'nobody' is not served; there are: auto, colour"),
        ({"prompt": ""}, 400, "none of them empty"),
        ({"prompt": ["cat"] * 65}, 400, "1 to 64 texts"),
        ({"prompt": "cat", "max_token": 3}, 400, "did you mean 'max_tokens'"),
        ({"prompt": "cat", "temperature": -1}, 400, "temperature"),
        ({"prompt": "cat " * 80}, 400, "the prompt has 80 tokens"),
        ({}, 400, "prompt: this key is required"),
        ({"prompt": "cat", "seed": 2**70}, 400, "seed"),
        (b"not json", 400, "the body is not JSON"),
        (b"[1]", 400, "not a JSON object"),
        (b"x" * (MAX_BODY_BYTES + 1), 413, "larger than"),
    ],
)
def test_a_bad_request_is_answered_with_the_reason(call, body, status, message):
    answered, reply = call("/v1/completions", body)
    assert answered == status
    assert message in reply["error"]["message"]
    assert call("/health") == (200, {"status": "ok"})


def test_unknown_routes_are_refused(call):
    assert call("/v1/nothing")[0] == 404
    assert call("/v1/nothing", {})[0] == 404
