"""`loramux serve` and `loramux chat` as people run them: processes, signals, a terminal client."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from serving_cases import PROMPT, live_server, stock_text, wait_for, write_loras

from loramux.cli import main
from loramux.cli.main import build_parser
from loramux.serving.chat import Conversation, Refused, talk
from loramux.serving.config import ServeConfig
from loramux.support.config import to_data
from loramux.support.errors import ConfigError

KEY = "client-key-0123456789"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loras(tmp_path_factory.mktemp("loras"), "red", "green")


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server in a process of its own: the process, its address, and what it prints."""
    command = [sys.executable, "-W", "ignore", "-m", "loramux.cli", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, bufsize=1
    )
    printed: list[str] = []
    errors: list[str] = []
    for stream, lines in ((process.stdout, printed), (process.stderr, errors)):
        threading.Thread(target=lambda s=stream, kept=lines: kept.extend(s), daemon=True).start()
    try:
        wait_for(lambda: any("try  " in line for line in printed) or process.poll() is not None, 120)
        assert process.poll() is None, "".join(errors)
        yield process, re.search(r"http://[\d.]+:\d+", printed[0])[0], errors
    finally:
        process.kill()
        process.wait(20)


def test_sigterm_under_load_loses_no_answer_and_later_requests_are_told(loras):
    with serving("--adapters", str(loras), "--set", "memory.slots=2") as (process, url, errors):
        body = {"model": "red", "prompt": PROMPT, "max_tokens": 110, "ignore_eos": True, "stream": False}
        replies: list[httpx.Response] = []

        def ask(stream: bool) -> None:
            replies.append(httpx.post(f"{url}/v1/completions", json={**body, "stream": stream}, timeout=60))

        threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(8)]
        for thread in threads:
            thread.start()
        wait_for(lambda: httpx.get(f"{url}/v1/status").json()["in_flight"] == 8)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        refused = httpx.post(f"{url}/v1/completions", json=body)
        for thread in threads:
            thread.join(60)
        assert process.wait(30) == 0
    assert [reply.status_code for reply in replies] == [200] * 8
    assert all("[DONE]" in reply.text or reply.json()["usage"]["completion_tokens"] == 110 for reply in replies)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert refused.headers["retry-after"]
    lines = [json.loads(line) for line in errors if line.startswith("{")]
    assert sum(line["message"] == "request" and line["status"] == 200 for line in lines) >= 8


def test_a_second_signal_does_not_wait(loras):
    with live_server(adapters=[str(loras)]) as live:
        body = {"model": "red", "prompt": PROMPT, "max_tokens": 110, "ignore_eos": True, "n": 64, "stream": True}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=60) as reply:
            live.server.handle_exit(signal.SIGTERM, None)
            assert live.call("GET", "/ready").status_code == 503
            assert live.thread.is_alive()
            live.server.handle_exit(signal.SIGTERM, None)
            live.thread.join(20)
            assert not live.thread.is_alive()
            assert reply.status_code == 200


def test_what_takes_longer_than_the_drain_is_told(loras):
    with live_server(adapters=[str(loras)], limits={"drain_s": 0.01}) as live:
        body = {"model": "red", "prompt": PROMPT, "max_tokens": 110, "ignore_eos": True, "n": 64, "stream": True}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=60) as reply:
            live.server.handle_exit(signal.SIGTERM, None)
            assert '"code":"shutting_down"' in reply.read().decode()
        live.thread.join(20)
        assert not live.thread.is_alive()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--set", "limit.queue=3"], "settings: limit: unknown key; did you mean 'limits'?"),
        (["serve", "--host", "0.0.0.0"], "other machines can reach this server: give api_keys_file"),
        (["serve", "--adapters", "/no/such"], "adapters: /no/such is not a folder"),
        (["serve", "/no/such/run"], "/no/such/run: not a run folder"),
        (["serve", "--config", "/no/such.yaml"], "/no/such.yaml: no such file"),
        (["chat", "http://127.0.0.1:9"], "no server at http://127.0.0.1:9"),
        (["chat", "--key-file", "/no/such"], "/no/such: the key cannot be read: No such file"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"loramux {arguments[0]}: ")
    assert message in error


def test_a_taken_port_is_told(loras, capsys):
    with live_server() as live:
        port = live.url.rpartition(":")[2]
        assert main(["serve", "--port", port]) == 2
    assert f"127.0.0.1:{port}: cannot listen there (Address already in use)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["serve", "chat"])
def test_both_commands_explain_themselves(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"examples:\n  loramux {name}" in capsys.readouterr().out


# ---------------------------------------------------------------------- what the docs show


def shown(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_three_commands_of_the_readme_train_serve_and_call(repository, finished_job):
    block = next(block for block in shown((repository / "README.md").read_text(), "sh") if "loramux serve" in block)
    train, serve, curl = (shlex.split(line) for line in block.splitlines())
    assert build_parser().parse_args(train[1:]).to == build_parser().parse_args(serve[1:]).runs[0]
    with live_server(runs=[str(finished_job)]) as live:
        body = json.loads(curl[curl.index("-d") + 1])
        reply = live.call("POST", urllib.parse.urlsplit(curl[1]).path, json=body)
    assert reply.status_code == 200
    assert reply.headers["x-loramux-adapter"] in ("colour", "sound", "home")


def test_commands_and_settings_of_the_docs_exist(repository):
    docs = (repository / "docs" / "serving.md").read_text()
    lines = [
        shlex.split(line, comments=True)
        for block in shown(docs, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    for words in lines:
        if words[:1] == ["loramux"]:
            assert build_parser().parse_args(words[1:]).command == words[1]
    rows = docs.partition("| key | default | |")[2].partition("\n\n")[0].splitlines()[2:]
    named: set[str] = set()
    for row in rows:
        keys = re.findall(r"`([\w.]+)`", row.split("|")[1])
        group = keys[0].rpartition(".")[0]
        named |= {f"{group}.{key}" if group and "." not in key else key for key in keys}
    settings = to_data(ServeConfig())
    known = {key for key, value in settings.items() if not isinstance(value, dict)}
    known |= {f"{group}.{key}" for group in ("limits", "memory") for key in settings[group]}
    assert named == known


# ---------------------------------------------------------------------- chat


def test_chat_shows_who_answers(loras):
    shown = io.StringIO()
    lines = [
        PROMPT.strip(),
        "/model grene",
        "/model green",
        "",
        PROMPT,
        "/models",
        "/new",
        "/what",
        "/quit",
        "not read",
    ]
    with live_server(adapters=[str(loras)]) as live:
        talk(Conversation(live.url, model="red", max_tokens=8), lines, Console(file=shown, soft_wrap=True))
    text = shown.getvalue()
    assert text.startswith(f"red: {stock_text(loras / 'red')}")
    assert "! the server has no model 'grene'; it has loramux/tiny, auto, green, red" in text
    assert f"green: {stock_text(loras / 'green')}" in text
    assert "loramux/tiny, auto, green, red\na new conversation\n/models " in text
    assert "not read" not in text


def test_chat_sends_a_conversation_where_the_base_has_a_chat_template(loras):
    with live_server(adapters=[str(loras)]) as live:
        live.service.tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
        )
        conversation = Conversation(live.url, model="red", max_tokens=4)
        first = "".join(text for text, _ in conversation.ask("Hi"))
        second = "".join(text for text, _ in conversation.ask("More"))
        whole = f"user: Hi\nassistant: {first}\nuser: More\nassistant:"
        expected = live.complete(model="red", prompt=whole, max_tokens=4).json()["choices"][0]["text"]
        assert second == expected
        with pytest.raises(Refused, match="at most"):
            list(conversation.ask("too long " * 200))
        third = "".join(text for text, _ in conversation.ask("x"))
        whole += f" {second}\nuser: x\nassistant:".replace("  ", " ")
        expected = live.complete(model="red", prompt=whole, max_tokens=4).json()["choices"][0]["text"]
        assert third == expected, "what was refused is not sent again"
        assert "".join(text for text, _ in Conversation(live.url, model="base", max_tokens=4).ask("Hi"))


def test_what_the_server_refuses_is_told_in_its_words(loras):
    with live_server({"LORAMUX_API_KEYS": KEY}, adapters=[str(loras)]) as live:
        with pytest.raises(Refused, match="an API key is missing"):
            Conversation(live.url)
        with pytest.raises(ConfigError, match="the server has no model 'x'; it has loramux/tiny, auto"):
            Conversation(live.url, key=KEY, model="x")
        conversation = Conversation(live.url, key=KEY, max_tokens=5000)
        with pytest.raises(Refused, match="may be at most 4096"):
            list(conversation.ask("Hi"))
