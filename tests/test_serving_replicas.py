"""Two replicas on a local Ray behind the same routes: answers are those of stock PEFT, wherever they are made."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray", reason="the extra loramux[ray] is not installed")

from serving_cases import PROMPT, stock_text, wait_for, write_loras

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
KEY = "a key of the test alone"
NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loras(tmp_path_factory.mktemp("loras"), *NAMES)


@pytest.fixture(scope="module")
def url(loras: Path, tmp_path_factory: pytest.TempPathFactory):
    import ray
    from ray import serve

    from loramux.serving.replicas.app import build

    settings = tmp_path_factory.mktemp("settings") / "serve.yaml"
    settings.write_text(f"base: loramux/tiny\nadapters: [{loras}]\nanyone: true\n")
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LORAMUX_ADMIN_KEY": KEY}
    os.environ["LORAMUX_ADMIN_KEY"] = KEY
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=True, runtime_env={"env_vars": environment})
    serve.start(http_options={"port": 8123})
    serve.run(build({"config": str(settings), "replicas": "2"}))
    yield "http://127.0.0.1:8123"
    serve.shutdown()
    ray.shutdown()
    del os.environ["LORAMUX_ADMIN_KEY"]


def complete(url: str, model: str, **more: object) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def test_every_adapter_answers_as_stock_peft_does_many_times_at_once(url, loras):
    wanted = {name: stock_text(loras / name) for name in NAMES} | {"base": stock_text(None)}
    with ThreadPoolExecutor(16) as pool:
        names = list(wanted) * 10
        for name, reply in zip(names, pool.map(lambda name: complete(url, name), names), strict=True):
            assert reply.status_code == 200, reply.text
            assert reply.json()["choices"][0]["text"] == wanted[name]
            assert reply.headers["x-loramux-adapter"] == name


def test_streams_and_lists_and_refusals_are_those_of_one_server(url, loras):
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={"model": "red", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True},
        timeout=60,
    ) as stream:
        text = "".join(stream.iter_text())
    assert text.rstrip().endswith("data: [DONE]")
    models = {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]}
    assert {*NAMES, "loramux/tiny"} <= models
    assert complete(url, "grene").status_code == 404
    assert complete(url, "base", prompt="word " * 400).json()["error"]["code"] == "context_length_exceeded"
    refused = complete(url, "base", max_tokens=4000)  # by the replica, which alone knows what it has room for
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    listed = {one["name"]: one["generation"] for one in httpx.get(f"{url}/v1/lora_adapters").json()["data"]}
    assert complete(url, "red").headers["x-loramux-generation"] == listed["red"]
    mixed = complete(url, "base", adapters={"red": 1.0, "green": 0.0})
    assert mixed.json()["choices"][0]["text"] == stock_text(loras / "red")


def test_clients_that_leave_give_their_places_back(url):
    body = {"model": "red", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": True}
    for _ in range(4):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_text())
    wait_for(lambda: httpx.get(f"{url}/v1/status").json()["in_flight"] == 0)


def test_an_adapter_is_replaced_on_all_replicas_at_once(url, loras):
    admin = {"Authorization": f"Bearer {KEY}"}
    loaded = httpx.post(
        f"{url}/v1/load_lora_adapter",
        json={"lora_name": "changing", "lora_path": str(loras / "red")},
        headers=admin,
        timeout=60,
    )
    assert loaded.status_code == 200, loaded.text
    assert complete(url, "changing").json()["choices"][0]["text"] == stock_text(loras / "red")
    gone = httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "changing"}, headers=admin, timeout=60)
    assert gone.status_code == 200, gone.text
    again = httpx.post(
        f"{url}/v1/load_lora_adapter",
        json={"lora_name": "changing", "lora_path": str(loras / "green")},
        headers=admin,
        timeout=60,
    )
    assert again.status_code == 200, again.text
    wanted = stock_text(loras / "green")
    assert {complete(url, "changing").json()["choices"][0]["text"] for _ in range(8)} == {wanted}


def test_the_automatic_choice_is_a_deployment_that_follows_adapters(url, loras):
    admin = {"Authorization": f"Bearer {KEY}"}
    for name, prompts in (("numbers", ["7 12 3 19", "4 8 15"]), ("stories", ["Mia hid the red cup in the garden."])):
        body = {"name": name, "source": str(loras / "red"), "prompts": prompts}
        loaded = httpx.post(f"{url}/v1/lora_adapters", json=body, headers=admin, timeout=60)
        assert loaded.status_code == 201, loaded.text
    wait_for(lambda: complete(url, "auto", prompt="5 9 11 2").headers.get("x-loramux-adapter") == "numbers")
    assert complete(url, "auto").headers["x-loramux-adapter"] == "stories"
