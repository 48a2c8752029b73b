"""What the server refuses, and how: each with a code that stays, in the shape OpenAI's clients read, and with no
harm to anybody else."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError
from serving_cases import PROMPT, Live, live_server, wait_for, write_loras

from loramux.bases import BUNDLED
from loramux.serving.api import build_app
from loramux.serving.api.admission import Admission
from loramux.serving.api.gate import JsonLines
from loramux.serving.api.schemas import ChatBody, CompletionBody
from loramux.serving.config import ServeConfig, load_serve_config
from loramux.serving.errors import ServingError
from loramux.serving.keys import Keys
from loramux.serving.launch import open_service
from loramux.serving.metrics import MIX, OTHER, Metrics
from loramux.serving.names import check_name
from loramux.support.config import parse
from loramux.support.errors import ConfigError

KEY, ADMIN = "client-key-0123456789", "admin-key-0123456789"
ENVIRONMENT = {"LORAMUX_API_KEYS": f"{KEY}, other-key-0123456789", "LORAMUX_ADMIN_KEY": ADMIN}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loras(tmp_path_factory.mktemp("loras"), "red", "green")


@pytest.fixture(scope="module")
def live(loras: Path) -> Iterator[Live]:
    limits = {"body_bytes": 20_000, "body_s": 1.0, "answers": 4, "answer_tokens": 100}
    with live_server(adapters=[str(loras)], limits=limits) as running:
        yield running


def error_of(reply) -> tuple[int, str, str]:
    """Status, code and message; the shape is checked on the way."""
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return reply.status_code, error["code"], error["message"]


# ---------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "message"),
    [
        ("completions", {"max_token": 3}, 400, "unknown_parameter", "max_token: unknown parameter; did you mean 'max"),
        ("completions", {"stream_options": {"usage": True}}, 400, "unknown_parameter", "'include_usage'"),
        ("completions", {"best_of": 3}, 400, "unsupported_parameter", "best_of: this server does not have this"),
        ("completions", {"prompt": None}, 400, "invalid_parameter", "prompt"),
        ("completions", {"prompt": ""}, 400, "invalid_parameter", "prompt"),
        ("completions", {"prompt": []}, 400, "invalid_parameter", "prompt"),
        ("completions", {"prompt": [5000]}, 400, "invalid_token", "token id 5000; the base knows ids below"),
        ("completions", {"prompt": "a " * 300}, 400, "context_length_exceeded", "at most 127 are allowed"),
        ("completions", {"max_tokens": 99, "prompt": "a " * 50}, 400, "context_length_exceeded", "together they may"),
        ("completions", {"max_tokens": 101}, 400, "max_tokens_too_large", "max_tokens (=101) may be at most 100"),
        ("completions", {"max_tokens": "5"}, 400, "invalid_parameter", "max_tokens: Input should be a valid int"),
        ("completions", {"temperature": -1}, 400, "invalid_parameter", "temperature"),
        ("completions", {"top_p": 0}, 400, "invalid_parameter", "top_p"),
        ("completions", {"seed": 2**70}, 400, "invalid_parameter", "seed"),
        ("completions", {"stop": [""]}, 400, "invalid_parameter", "stop"),
        ("completions", {"logit_bias": {"99999": 1}}, 400, "invalid_token", "logit_bias: token 99999"),
        ("completions", {"logit_bias": {"x": 1}}, 400, "invalid_parameter", "logit_bias"),
        ("completions", {"n": 5}, 400, "too_many_answers", "1 prompts with 5 answers each; at most 4"),
        ("completions", {"model": ""}, 400, "invalid_parameter", "model"),
        ("completions", {"model": "\x00"}, 404, "model_not_found", r"'\x00'"),
        ("completions", {"model": "../../etc/passwd"}, 404, "model_not_found", "is not served"),
        ("completions", {"model": "x" * 10_000}, 400, "invalid_parameter", "(10000 characters)"),
        ("completions", {"model": "red", "adapter": "green"}, 400, "conflicting_parameters", "model names one"),
        ("completions", {"adapter": "red", "adapters": {"red": 1}}, 400, "conflicting_parameters", "either"),
        ("completions", {"adapters": {"red": 1, "grean": 1}}, 404, "adapter_not_found", "grean"),
        ("completions", {"task": "who"}, 400, "conflicting_parameters", "task goes with a hosted mixture"),
        ("completions", {"stream_options": {}}, 400, "conflicting_parameters", "goes with stream: true"),
        ("chat/completions", {"top_logprobs": 2}, 400, "conflicting_parameters", "goes with logprobs: true"),
        ("chat/completions", {"tools": []}, 400, "unsupported_parameter", "tools"),
        ("completions", {f"k{n}": 1 for n in range(99)}, 400, "invalid_json", "at most 64 keys are allowed, got 101"),
        ("chat/completions", {"messages": []}, 400, "invalid_parameter", "messages"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, 400, "invalid_parameter", "json_schema"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(live, path, body, status, code, message):
    whole = {**CHAT, **body} if path.startswith("chat") else {"model": "base", "prompt": PROMPT, **body}
    reply = live.call("POST", f"/v1/{path}", json=whole)
    assert error_of(reply)[:2] == (status, code)
    assert message in error_of(reply)[2]
    assert len(reply.content) < 2000


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": [[]] * 10_000},
        {"prompt": ["a", *[1] * 10_000]},
        {"prompt": "a", **{f"k{n}": 1 for n in range(10_000)}},
        {"prompt": "a", "logit_bias": {f"k{n}": 1 for n in range(10_000)}},
        {"prompt": "a", "adapters": {f"k{n}": "x" for n in range(10_000)}},
        {"prompt": "a", "messages": [{}] * 10_000},
    ],
)
def test_a_request_that_is_wrong_everywhere_is_not_told_so_ten_thousand_times(wrong):
    kind = ChatBody if "messages" in wrong else CompletionBody
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "base", **wrong})
    assert caught.value.error_count() < 20


@pytest.mark.parametrize(
    ("content", "status", "code", "message"),
    [
        (b"", 400, "invalid_json", "the body is empty"),
        (b'{"model": "base", "prompt"', 400, "invalid_json", "the body is not JSON"),
        (b"[1]", 400, "invalid_json", "not a JSON object"),
        (b'{"model": "base", "prompt": "\xff\xfe"}', 400, "invalid_json", "cannot be read as JSON in UTF-8"),
        (b'{"model": "base", "prompt": "\\ud800"}', 400, "invalid_parameter", "prompt"),
        (b'{"model": "base", "prompt": "a", "\\ud800": 1}', 400, "invalid_json", "not a JSON object"),
        (b'{"model": "base", "prompt": "a", "temperature": NaN}', 400, "invalid_parameter", "temperature"),
        (b"[" * 15_000, 400, "invalid_json", ""),
        (b"x" * 20_001, 413, "body_too_large", "the body is larger than 20000 bytes"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(live, content, status, code, message):
    reply = live.call("POST", "/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert error_of(reply)[:2] == (status, code)
    assert message in error_of(reply)[2]
    assert live.complete(model="base").status_code == 200


def test_a_body_in_pieces_has_the_same_limit(live):
    pieces = (b"x" * 1000 for _ in range(21))
    reply = live.call("POST", "/v1/completions", content=pieces, headers={"Content-Type": "application/json"})
    assert error_of(reply)[:2] == (413, "body_too_large")


def test_other_content_types_and_routes_are_refused(live):
    form = live.call("POST", "/v1/completions", data={"model": "base"})
    assert error_of(form)[:2] == (415, "unsupported_media_type")
    assert error_of(live.call("GET", "/v1/nothing"))[:2] == (404, "route_not_found")
    assert error_of(live.call("GET", "/v1/completions"))[:2] == (405, "method_not_allowed")
    assert error_of(live.call("GET", "/page/../config.py"))[:2] == (404, "route_not_found")


def raw(live: Live, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Bytes sent as they are, and what comes back."""
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_s)
        reply = b""
        while not reply.endswith(b"}") and (part := connection.recv(65536)):  # a head may come before its body
            reply += part
        return reply


def test_half_a_body_is_not_waited_for(live):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 500\r\n\r\n"
    began = time.monotonic()
    reply = raw(live, head, b'{"model"')
    assert b" 408 " in reply
    assert b"body_timeout" in reply
    assert time.monotonic() - began < 5
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as connection:
        connection.sendall(head + b'{"model"')  # and gone
    assert live.complete(model="base").status_code == 200


def test_bytes_that_are_no_http_are_refused(live):
    assert b" 400 " in raw(live, b"\x00\x01\x02 nonsense\r\n\r\n")
    assert b" 400 " in raw(live, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n")
    assert live.call("GET", "/health").status_code == 200


def test_a_web_page_cannot_lead_a_browser_here_under_its_own_name(live):
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", ""):
        assert b"host_forbidden" in raw(live, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert b" 200 " in raw(live, b"GET /v1/models HTTP/1.1\r\nHost: localhost:8000\r\n\r\n")
    assert live.call("OPTIONS", "/v1/lora_adapters", headers={"Origin": "http://evil.example"}).status_code == 405


# ---------------------------------------------------------------------- keys


@pytest.fixture(scope="module")
def guarded(loras: Path) -> Iterator[Live]:
    with live_server(ENVIRONMENT, adapters=[str(loras)]) as running:
        yield running


def test_every_route_but_health_and_the_page_wants_a_key(guarded):
    paths = json.loads(guarded.call("GET", "/openapi.json").text)["paths"]
    assert len(paths) >= 14
    for path, methods in paths.items():
        for method in methods:
            url = path.replace("{name}", "red").replace("{model}", "red")
            reply = guarded.call(method.upper(), url, json={})
            assert (reply.status_code == 401) == (path not in ("/health", "/ready")), path
            if reply.status_code == 401:
                assert error_of(reply)[1] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", [KEY, "other-key-0123456789", ADMIN])
def test_any_key_asks_and_only_the_admin_key_changes(guarded, key):
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "red", "prompt": PROMPT}
    assert guarded.call("POST", "/v1/completions", json=body, headers=headers).status_code == 200
    change = guarded.call("POST", "/v1/unload_lora_adapter", json={"lora_name": "nobody"}, headers=headers)
    assert error_of(change)[:2] == ((404, "adapter_not_found") if key == ADMIN else (401, "invalid_api_key"))


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", "/v1/unload_lora_adapter", KEY, 401),
        ("DELETE", "/v1/lora_adapters/nobody", KEY, 401),
        ("DELETE", "/v1/lora_adapters/nobody", ADMIN, 404),
        ("GET", "/v1/lora_adapters", KEY, 200),
        ("GET", "/v1/lora_adapters", None, 401),
        ("GET", "/health", None, 200),
    ],
)
def test_keys_are_asked_for_below_a_prefix_as_well(guarded, method, path, key, status):
    async def ask() -> httpx.Response:
        below = httpx.ASGITransport(build_app(guarded.service), root_path="/api")
        async with httpx.AsyncClient(transport=below, base_url="http://localhost") as client:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return await client.request(method, f"/api{path}", headers=headers)

    assert asyncio.run(ask()).status_code == status


@pytest.mark.parametrize("header", ["Bearer nearly-right", f"Basic {KEY}", KEY, "Bearer \xff"])
def test_a_wrong_key_is_refused(guarded, header):
    reply = guarded.call("GET", "/v1/models", headers={"Authorization": header.encode("latin-1")})
    assert error_of(reply)[:2] == (401, "invalid_api_key")
    assert "nearly" not in reply.text


def test_without_an_admin_key_nobody_changes_anything(loras):
    keys = Keys.read(ServeConfig(), {"LORAMUX_API_KEYS": KEY})
    with pytest.raises(Exception, match="has no admin key") as caught:
        keys.check_admin(f"Bearer {KEY}")
    assert caught.value.status == 403


def test_where_anyone_may_ask_nobody_changes_anything_without_a_key():
    for host in ("127.0.0.1", "0.0.0.0"):
        keys = Keys.read(ServeConfig(host=host, anyone=True), {})
        keys.check_client(None)
        with pytest.raises(ServingError, match="has no admin key"):
            keys.check_admin(None)


def test_a_server_behind_another_host_wants_keys():
    message = "other machines can reach this server: give api_keys_file"
    with pytest.raises(ConfigError, match=message):
        Keys.read(ServeConfig(), {}, is_local=False)
    with pytest.raises(ServingError, match="API key is missing"):
        Keys.read(ServeConfig(), {"LORAMUX_API_KEYS": KEY}, is_local=False).check_client(None)


def test_a_key_file_without_a_key_does_not_open_the_server(tmp_path):
    (tmp_path / "keys").write_text("\n \n")
    for setting in ("api_keys_file", "admin_key_file"):
        with pytest.raises(ConfigError, match="keys: holds no key; write one a line, or leave the setting out"):
            Keys.read(parse(ServeConfig, {setting: str(tmp_path / "keys")}, where="settings"), {})


def test_an_admin_key_alone_leaves_the_server_to_this_machine(loras):
    with live_server({"LORAMUX_ADMIN_KEY": ADMIN}, base=BUNDLED) as live:
        assert b"host_forbidden" in raw(live, b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert live.call("GET", "/v1/models").status_code == 200


def test_keys_come_from_files_and_never_show(tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n\nother-key-0123456789\n")
    (tmp_path / "admin").write_text(ADMIN)
    (tmp_path / "serve.yaml").write_text("api_keys_file: keys\nadmin_key_file: admin\n")
    keys = Keys.read(load_serve_config(tmp_path / "serve.yaml", [], {}), {})
    keys.check_client(f"Bearer {KEY}")
    keys.check_admin(f"Bearer {ADMIN}")
    assert "key-0123" not in repr(keys)


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"host": "0.0.0.0"}, {}, "other machines can reach this server: give api_keys_file"),
        ({}, {"LORAMUX_API_KEYS": "short"}, "a key has 5 characters; give at least 16"),
        ({}, {"LORAMUX_ADMIN_KEY": f"{ADMIN}\n{KEY}"}, "there is one admin key, and 2 are given"),
        ({"api_keys_file": "/no/such"}, {}, "/no/such: the keys cannot be read: No such file"),
    ],
)
def test_keys_that_cannot_be_used_are_told_at_the_start(settings, environment, message):
    with pytest.raises(ConfigError, match=message.split(":")[0]) as caught:
        Keys.read(parse(ServeConfig, settings, where="settings"), environment)
    assert message in str(caught.value)


def test_settings_that_are_wrong_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"settings: limits.que: unknown key; did you mean 'queue'"):
        load_serve_config(None, ["limits.que=3"], {})
    (tmp_path / "serve.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="give keys and values, such as `port: 8000`"):
        load_serve_config(tmp_path / "serve.yaml", [], {})


# ---------------------------------------------------------------------- limits of all together


def occupied(live: Live, count: int, tokens: int = 100) -> list[threading.Thread]:
    """Answers of many tokens, asked for at once; when this returns, all are in the making or wait."""
    body = {"model": "base", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
    threads = [
        threading.Thread(target=live.call, args=("POST", "/v1/completions"), kwargs={"json": body})
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: live.service.admission.in_flight >= count)
    return threads


def test_a_full_queue_says_when_to_come_back():
    with live_server(memory={"slots": 1}, limits={"queue": 1}) as live:
        threads = occupied(live, 2)
        reply = live.complete(model="base")
        assert error_of(reply)[:2] == (429, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()
        assert live.complete(model="base").status_code == 200


def test_an_answer_that_is_late_is_refused_whole_and_streamed():
    with live_server(limits={"deadline_s": 0.02}) as live:
        body = {"model": "base", "max_tokens": 100, "ignore_eos": True}
        assert error_of(live.complete(**body))[:2] == (504, "deadline_exceeded")
        streamed = live.complete(**body, stream=True)
        assert '"code":"deadline_exceeded"' in streamed.text
        assert live.service.admission.in_flight == 0


def test_the_time_that_an_adapter_takes_to_come_counts(loras, monkeypatch):
    with live_server(adapters=[str(loras)], limits={"deadline_s": 0.3}) as live:
        store = live.service.store
        read = store.lease
        monkeypatch.setattr(store, "lease", lambda name: time.sleep(0.5) or read(name))
        assert error_of(live.complete(model="red"))[:2] == (504, "deadline_exceeded")
        text = live.call("GET", "/metrics").text
    assert float(re.search(r'request_seconds_sum\{adapter="red"\} (\S+)', text)[1]) >= 0.5


def test_who_cannot_come_in_is_told_before_anything_is_read(live):
    live.service.admission.is_draining = True
    try:
        assert error_of(live.complete(model="base", prompt="a " * 300))[:2] == (503, "shutting_down")
        chat = live.call("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 101})
        assert error_of(chat)[:2] == (503, "shutting_down")
        embedding = live.call("POST", "/v1/embeddings", json={"model": "base", "input": "a " * 300})
        assert error_of(embedding)[:2] == (503, "shutting_down")
    finally:
        live.service.admission.is_draining = False
    assert error_of(live.complete(model="base", prompt="a " * 300))[1] == "context_length_exceeded"
    assert live.service.admission.in_flight == 0


def test_a_request_that_can_never_fit_is_not_told_to_come_back():
    admission = Admission(slots=1, queue=1)
    with pytest.raises(ServingError, match="wants 3 answers, and there is room for 2 in all") as caught:
        admission.take(3)
    assert (caught.value.code, caught.value.status) == ("too_many_answers", 400)


def test_headers_stay_small_however_many_prompts_there_are(live):
    mixed = {"model": "base", "adapters": {"red": 0.1234567, "green": 0.7654321}}
    alike = live.complete(**mixed, prompt=[PROMPT] * 4)
    assert alike.headers["x-loramux-adapter"] == "red+green"
    assert len(alike.headers["x-loramux-generation"]) < 200


def test_a_client_that_leaves_frees_its_place(live):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for stream in (False, True):
        body = json.dumps(
            {"model": "red", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": stream}
        ).encode()
        steps = live.engine.stats().steps
        with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as connection:
            connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(lambda: live.service.admission.in_flight == 1)
        wait_for(lambda: live.service.admission.in_flight == 0)
        assert live.engine.stats().steps < steps + 95
        assert next(info for info in live.service.store.list() if info.name == "red").leases == 0


# ---------------------------------------------------------------------- what is written down


def test_every_request_has_an_id_and_a_line_without_secrets(guarded, caplog):
    with caplog.at_level(logging.INFO, "loramux.serving"):
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine-1"}
        body = {"model": "red", "prompt": PROMPT, "max_tokens": 4}
        reply = guarded.call("POST", "/v1/completions", json=body, headers=headers)
        assert reply.headers["x-request-id"] == "mine-1"
        other = guarded.call(
            "GET", "/v1/models", headers={"X-Request-Id": "no\tgood", "Authorization": f"Bearer {KEY}"}
        )
        assert len(other.headers["x-request-id"]) == 32
        wait_for(lambda: len([record for record in caplog.records if record.message == "request"]) >= 2)
    lines = [JsonLines().format(record) for record in caplog.records if record.message == "request"]
    line = next(json.loads(line) for line in lines if "mine-1" in line)
    assert (line["status"], line["adapter"], line["method"], line["path"]) == (200, "red", "POST", "/v1/completions")
    assert line["completion_tokens"] <= 4
    assert not [line for line in lines if KEY in line or "Mia" in line]


def test_metrics_count_by_adapter_and_know_few_of_them(loras):
    with live_server(adapters=[str(loras)], limits={"adapter_labels": 1}) as live:
        for name in ("red", "green", "base"):
            live.complete(model=name)
        live.complete(model="nobody")
        text = live.call("GET", "/metrics").text
    assert 'loramux_requests_total{adapter="red",end=' in text
    assert 'adapter="green"' not in text
    assert 'adapter="nobody"' not in text
    assert 'loramux_tokens_total{adapter="(other)",kind="completion"}' in text
    assert 'loramux_http_requests_total{route="/v1/completions",status="404"} 1.0' in text
    for name in ("slots", "answers_running", "adapters_in_memory", "queue_seconds", "first_token_seconds"):
        assert f"\nloramux_{name}" in text


def test_a_late_answer_of_an_adapter_that_is_gone_takes_no_place_among_the_labels():
    served = {"red"}
    metrics = Metrics(dict, served.__contains__, labels=1)
    metrics.note_failure("red", "early")
    served.clear()
    metrics.forget("red")
    metrics.note_failure("red", "late")
    served.add("green")
    metrics.note_failure("green", "early")
    assert b'adapter="red"' not in metrics.text()
    assert metrics.text().count(b'loramux_requests_total{adapter="green",end="early"} 1.0') == 1
    assert metrics.text().count(b'loramux_requests_total{adapter="(other)",end="late"} 1.0') == 1


@pytest.mark.parametrize("label", [OTHER, MIX])
def test_no_adapter_is_called_as_all_others_are(label):
    with pytest.raises(ServingError, match="an adapter cannot be called"):
        check_name(label, ())


def test_every_code_is_in_the_docs(repository):
    source = "".join(path.read_text(encoding="utf-8") for path in (repository / "serving").rglob("*.py"))
    codes = set(re.findall(r'(?:ServingError|Failed|error_response)\(\s*"([a-z_]+)"', source))
    codes |= set(re.findall(r'return "([a-z_]+)", f?"', source))
    assert {"queue_full", "adapter_invalid", "unknown_parameter", "internal_error"} <= codes
    docs = (repository / "docs" / "serving.md").read_text(encoding="utf-8")
    assert not [code for code in sorted(codes) if f"`{code}`" not in docs]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"base": BUNDLED}, "the runs bring theirs"), ({"quantize": "8bit"}, "a run belong to its whole base")],
)
def test_what_contradicts_a_run_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        open_service(parse(ServeConfig, {"runs": [str(tmp_path)], **settings}, where="settings"), {})
