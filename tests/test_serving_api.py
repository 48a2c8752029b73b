"""The routes that clients speak: what they answer, and that adapters, formats and streams are what OpenAI's clients
expect."""

import base64
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from serving_cases import PROMPT, Live, live_server, stock_text, write_loras

from loramux.bases import BUNDLED, load_base


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loras(tmp_path_factory.mktemp("loras"), "red", "green", "blue")


@pytest.fixture(scope="module")
def live(loras: Path) -> Iterator[Live]:
    with live_server(adapters=[str(loras)]) as running:
        yield running


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def events(reply: httpx.Response) -> list[dict]:
    """The objects of a stream, which has to end as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---------------------------------------------------------------------- what answers


def test_an_adapter_answers_as_stock_peft_does_and_the_base_as_itself(live, loras):
    for name in ("red", "green"):
        reply = live.complete(model=name)
        assert reply.json()["choices"][0]["text"] == stock_text(loras / name)
        assert (reply.headers["x-loramux-adapter"], reply.headers["x-loramux-weight"]) == (name, "1.0000")
        choice = reply.json()["choices"][0]
        assert (choice["adapter"], choice["adapter_weight"], reply.json()["model"]) == (name, 1, name)
        assert choice["adapter_generation"] == live.call("GET", f"/v1/lora_adapters/{name}").json()["generation"]
    for name in (BUNDLED, "base"):
        reply = live.complete(model=name)
        assert reply.json()["choices"][0]["text"] == stock_text(None)
        assert reply.headers["x-loramux-adapter"] == "base"


def test_the_adapter_of_a_request_can_be_named_beside_the_base_and_mixed_by_weight(live, loras):
    assert live.complete(model="base", adapter="red").json()["choices"][0]["text"] == stock_text(loras / "red")
    reply = live.complete(model="base", adapters={"red": 1.0, "green": 0.0})
    assert reply.json()["choices"][0]["text"] == stock_text(loras / "red")
    assert reply.headers["x-loramux-adapter"] == "red+green"
    assert reply.json()["choices"][0]["adapter_weights"] == {"red": 1.0, "green": 0.0}


def test_the_list_names_the_base_and_its_adapters_with_their_parent(live, client):
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {BUNDLED, "auto", "red", "green", "blue"}
    assert (listed[BUNDLED].parent, listed["red"].parent, listed["red"].kind) == (None, BUNDLED, "adapter")
    assert client.models.retrieve("red").id == "red"
    assert client.models.retrieve(BUNDLED).max_model_len == 128
    with pytest.raises(openai.NotFoundError, match="did you mean 'green'"):
        client.models.retrieve("grean")


def test_an_unknown_model_is_refused_and_never_the_base(live, client):
    with pytest.raises(openai.NotFoundError, match=r"model 'grene' is not served; did you mean 'green'\?") as caught:
        client.completions.create(model="grene", prompt=PROMPT)
    assert caught.value.code == "model_not_found"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_reads_whole_answers_and_streams(live, loras):
    body = {"model": "red", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}

    def curl(**more) -> str:
        words = ["curl", "-sS", "-N", f"{live.url}/v1/completions", "-H", "Content-Type: application/json"]
        words += ["-d", json.dumps({**body, **more})]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout

    assert json.loads(curl())["choices"][0]["text"] == stock_text(loras / "red")
    lines = curl(stream=True).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]]
    assert "".join(texts) == stock_text(loras / "red")


# ---------------------------------------------------------------------- OpenAI's client


def test_completions_of_several_prompts_and_several_answers(live, client):
    reply = client.completions.create(model="red", prompt=[PROMPT, "one old wolf\n"], n=2, max_tokens=6, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    again = client.completions.create(model="red", prompt=[PROMPT, "one old wolf\n"], n=2, max_tokens=6, seed=1)
    assert [choice.text for choice in again.choices] == [choice.text for choice in reply.choices]
    assert len({choice.text for choice in reply.choices[:2]}) == 2
    tokenizer = load_base(BUNDLED)[1]
    assert reply.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in (PROMPT, "one old wolf\n"))
    ids = [tokenizer(PROMPT)["input_ids"]]
    by_id = client.completions.create(model="red", prompt=ids, max_tokens=6, temperature=0)
    assert by_id.choices[0].text == live.complete(model="red", max_tokens=6).json()["choices"][0]["text"]


def test_a_stream_says_what_the_whole_answer_says_and_tells_its_tokens(live, client):
    whole = client.completions.create(model="green", prompt=PROMPT, max_tokens=8, temperature=0)
    stream = client.completions.create(
        model="green", prompt=PROMPT, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (pieces[-1].choices, pieces[-1].usage.total_tokens) == ([], whole.usage.total_tokens)
    assert pieces[0].choices[0].adapter == "green"


def test_a_stream_of_several_answers_keeps_them_apart(live):
    body = {"model": "red", "prompt": [PROMPT, "one old wolf\n"], "stream": True, "max_tokens": 8, "temperature": 0}
    reply = live.call("POST", "/v1/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    texts = {0: "", 1: ""}
    for event in events(reply):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    whole = live.call("POST", "/v1/completions", json={**body, "stream": False}).json()
    assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}


def test_chat_is_written_as_the_base_was_trained_to_read_it(live, client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    reply = client.chat.completions.create(model="red", messages=messages, max_tokens=6, temperature=0)
    plain = live.complete(model="red", prompt="System: Be brief.\nUser: Hi\nAssistant:", max_tokens=6).json()
    assert reply.choices[0].message.content == plain["choices"][0]["text"]
    more = [*messages, reply.choices[0].message, {"role": "user", "content": "More"}]
    assert client.chat.completions.create(model="red", messages=more, max_tokens=6).usage.completion_tokens
    stream = client.chat.completions.create(
        model="red", messages=messages, max_completion_tokens=6, temperature=0, stream=True
    )
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == reply.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")


def test_stop_strings_end_an_answer(live):
    text = live.complete(model="base", max_tokens=12).json()["choices"][0]["text"]
    stop = text.split()[-1]
    choice = live.complete(model="base", max_tokens=12, stop=[stop, "never said"]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_log_probabilities_are_those_of_the_model(live, client):
    reply = client.completions.create(model="base", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2)
    told = reply.choices[0].logprobs
    base, tokenizer = load_base(BUNDLED)
    with torch.inference_mode():
        logits = base(tokenizer(PROMPT, return_tensors="pt")["input_ids"]).logits[0, -1].log_softmax(-1)
    assert told.token_logprobs[0] == pytest.approx(float(logits.max()), abs=1e-3)
    assert told.tokens[0] == tokenizer.decode([int(logits.argmax())])
    assert [len(top) for top in told.top_logprobs] == [2, 2, 2]
    assert told.text_offset == [0, len(told.tokens[0]), len(told.tokens[0] + told.tokens[1])]
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(model="base", messages=messages, max_tokens=2, logprobs=True, top_logprobs=3)
    first = chat.choices[0].logprobs.content[0]
    assert bytes(first.bytes).decode() == first.token
    assert len(first.top_logprobs) == 3


def test_a_schema_is_obeyed(live, client):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    messages = [{"role": "user", "content": "A number"}]
    reply = client.chat.completions.create(
        model="red", messages=messages, response_format=wanted, temperature=0, max_tokens=60
    )
    assert reply.choices[0].finish_reason == "length" or isinstance(
        json.loads(reply.choices[0].message.content)["n"], int
    )
    assert reply.choices[0].message.content.lstrip().startswith("{")
    wrong = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="red", messages=messages, response_format=wrong)
    assert caught.value.code == "invalid_schema"


def test_embeddings_are_the_mean_of_the_bases_last_states(live, client):
    reply = client.embeddings.create(model=BUNDLED, input=[PROMPT, "one old wolf\n"])  # asks for base64
    base, tokenizer = load_base(BUNDLED)
    with torch.inference_mode():
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        expected = base.model(ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(torch.tensor(reply.data[0].embedding), expected, atol=1e-4, rtol=0)
    raw = live.call("POST", "/v1/embeddings", json={"model": BUNDLED, "input": PROMPT, "encoding_format": "base64"})
    decoded = base64.b64decode(raw.json()["data"][0]["embedding"])
    assert struct.unpack(f"<{len(decoded) // 4}f", decoded) == pytest.approx(reply.data[0].embedding, abs=1e-5)
    with pytest.raises(openai.NotFoundError, match="embeddings are of the base"):
        client.embeddings.create(model="red", input=PROMPT)
