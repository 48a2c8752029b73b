"""Adapters that come and go over HTTP, and the automatic choice: what clients and administrators see of both."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_cases import PROMPT, Live, live_server, stock_text, wait_for, write_loras


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_loras(tmp_path_factory.mktemp("allowed"), "red", "green", "blue")
    write_loras(folder.parent / "elsewhere", "secret")
    return folder


@pytest.fixture
def live(loras: Path) -> Iterator[Live]:
    with live_server(roots=[str(loras)]) as running:
        yield running


@pytest.fixture(scope="module")
def empty(loras: Path) -> Iterator[Live]:
    """A server for tests that change nothing."""
    with live_server(roots=[str(loras)]) as running:
        yield running


def load(live: Live, name: str, source: Path | str, **more) -> tuple[int, dict]:
    reply = live.call("POST", "/v1/lora_adapters", json={"name": name, "source": str(source), **more})
    return reply.status_code, reply.json()


def text(live: Live, model: str) -> str:
    return live.complete(model=model).json()["choices"][0]["text"]


def test_vllms_routes_load_replace_and_unload(live, loras):
    loaded = live.call("POST", "/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": str(loras / "red")})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert text(live, "mine") == stock_text(loras / "red")
    body = {"lora_name": "mine", "lora_path": str(loras / "green")}
    assert live.call("POST", "/v1/load_lora_adapter", json=body).json()["error"]["code"] == "adapter_exists"
    assert live.call("POST", "/v1/load_lora_adapter", json={**body, "load_inplace": True}).status_code == 200
    assert text(live, "mine") == stock_text(loras / "green")
    unloaded = live.call("POST", "/v1/unload_lora_adapter", json={"lora_name": "mine"})
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert live.complete(model="mine").json()["error"]["code"] == "model_not_found"
    assert live.call("POST", "/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 404


def test_an_adapter_is_replaced_only_where_it_is_what_was_expected(live, loras):
    status, first = load(live, "mine", loras / "red", pin=True)
    assert (status, first["name"], first["pinned"], first["state"]) == (201, "mine", True, "memory")
    other = {"source": str(loras / "green"), "expected_generation": "0" * 64}
    refused = live.call("PUT", "/v1/lora_adapters/mine", json=other)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "generation_mismatch")
    taken = live.call("PUT", "/v1/lora_adapters/mine", json={**other, "expected_generation": first["generation"]})
    assert taken.json()["generation"] != first["generation"]
    assert text(live, "mine") == stock_text(loras / "green")
    whatever = live.call("PUT", "/v1/lora_adapters/mine", json={"source": str(loras / "red")})
    assert whatever.json()["generation"] == first["generation"]
    assert live.call("PUT", "/v1/lora_adapters/nobody", json=other).status_code == 404


def test_adapters_are_listed_pinned_and_deleted(live, loras):
    load(live, "mine", loras / "red")
    assert [one["name"] for one in live.call("GET", "/v1/lora_adapters").json()["data"]] == ["mine"]
    assert live.call("POST", "/v1/lora_adapters/mine/pin", json={}).json()["pinned"] is True
    assert live.call("POST", "/v1/lora_adapters/mine/pin", json={"pinned": False}).json()["pinned"] is False
    assert live.call("GET", "/v1/lora_adapters/mine").json()["rank"] == 4
    assert live.call("DELETE", "/v1/lora_adapters/mine?force=true").json() == {"name": "mine", "deleted": True}
    missing = live.call("GET", "/v1/lora_adapters/mine").json()["error"]
    assert missing["code"] == "adapter_not_found"


@pytest.mark.parametrize(
    ("name", "source", "status", "code"),
    [
        ("../up", "red", 400, "adapter_name_invalid"),
        ("nul\x00", "red", 400, "adapter_name_invalid"),
        ("x" * 200, "red", 400, "adapter_name_invalid"),
        ("x" * 10_000, "red", 400, "invalid_parameter"),
        ("", "red", 400, "invalid_parameter"),
        ("auto", "red", 409, "adapter_name_reserved"),
        ("base", "red", 409, "adapter_name_reserved"),
        ("ok", "{elsewhere}/secret", 403, "adapter_path_forbidden"),
        ("ok", "../elsewhere/secret", 403, "adapter_path_forbidden"),
        ("ok", "/etc", 403, "adapter_path_forbidden"),
        ("ok", "\x00", 404, "adapter_not_found"),
        ("ok", "{allowed}/none", 404, "adapter_not_found"),
        ("ok", "somebody/something", 403, "hub_disabled"),
    ],
)
def test_hostile_names_and_places_are_refused(empty, loras, name, source, status, code):
    places = {"{allowed}": str(loras), "{elsewhere}": str(loras.parent / "elsewhere")}
    for mark, place in places.items():
        source = source.replace(mark, place)
    answered, body = load(empty, name, source)
    assert (answered, body["error"]["code"]) == (status, code)
    assert len(body["error"]["message"]) < 600
    assert empty.call("GET", "/v1/lora_adapters").json()["data"] == []


def test_an_adapter_whose_files_are_gone_harms_nobody(loras, tmp_path):
    shutil.copytree(loras, tmp_path / "own")
    with live_server(adapters=[str(tmp_path / "own")]) as live:
        shutil.rmtree(tmp_path / "own" / "red")
        assert live.complete(model="red").json()["error"]["code"] == "adapter_files_gone"
        assert text(live, "green") == stock_text(loras / "green")
        assert "adapter_files_gone" not in live.call("GET", "/health").text


def test_very_many_adapters_are_not_all_listed_in_a_refusal(loras, tmp_path):
    for number in range(201):
        (tmp_path / f"adapter{number}").symlink_to(loras / "red")
    with live_server(adapters=[str(tmp_path)], roots=[str(loras)]) as live:
        assert len(live.call("GET", "/v1/models").json()["data"]) == 203
        reply = live.complete(model="adaptor7").json()["error"]
        assert reply["message"] == "model 'adaptor7' is not served; GET /v1/models lists the 204 that are"
        assert text(live, "adapter7") == stock_text(loras / "red")


def test_the_metrics_tell_the_memory_of_what_was_unloaded_and_is_still_used(live, loras):
    load(live, "leaving", loras / "blue")
    with live.service.store.lease("leaving") as lease:
        before = live.service.gauges()["adapter_bytes"][2][""]
        live.service.store.unload("leaving", force=True)
        assert live.service.gauges()["adapter_bytes"][2][""] == before
    assert live.service.gauges()["adapter_bytes"][2][""] == before - lease.info.nbytes


def test_requests_in_flight_finish_on_what_they_began(live, loras):
    load(live, "mine", loras / "red")
    body = {"model": "mine", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "temperature": 0}
    before = live.call("POST", "/v1/completions", json=body).json()["choices"][0]["text"]
    answers: list[str] = []

    def ask() -> None:
        answers.append(live.call("POST", "/v1/completions", json=body).json()["choices"][0]["text"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: live.engine.stats().running == 4)
    live.call("PUT", "/v1/lora_adapters/mine", json={"source": str(loras / "green")})
    live.call("DELETE", "/v1/lora_adapters/mine?force=true")
    for thread in threads:
        thread.join()
    assert answers == [before] * 4


# ---------------------------------------------------------------------- the automatic choice


def test_auto_follows_the_example_prompts_of_adapters_as_they_come_and_go(live, loras):
    assert live.complete(model="auto").headers["x-loramux-adapter"] == "base"
    sentences = ["Mia hid the red cup in the garden.\n", "Tom found a blue hat in the kitchen.\n"]
    load(live, "where", loras / "red", prompts=sentences)
    load(live, "sort", loras / "green", prompts=["7 12 3 19\n", "4 8 15 16\n"])
    wait_for(lambda: live.complete(model="auto", prompt="9 1 5 30\n").headers["x-loramux-adapter"] == "sort")
    reply = live.complete(model="auto")
    choice = reply.json()["choices"][0]
    assert (choice["text"], choice["adapter"]) == (stock_text(loras / "red"), "where")
    assert reply.headers["x-loramux-weight"] == f"{choice['adapter_weight']:.4f}"
    assert sum(choice["adapter_weights"].values()) == pytest.approx(1, abs=1e-4)
    both = live.complete(model="auto", prompt=[PROMPT, "9 1 5 30\n"])
    assert [choice["adapter"] for choice in both.json()["choices"]] == ["where", "sort"]
    assert "x-loramux-adapter" not in both.headers  # sixty prompts would be more than proxies take
    assert live.complete(model="auto", adapter="sort").headers["x-loramux-adapter"] == "sort"
    live.call("DELETE", "/v1/lora_adapters/sort")
    assert live.complete(model="auto", prompt="9 1 5 30\n").headers["x-loramux-adapter"] == "where"
    metrics = live.call("GET", "/metrics").text
    assert 'loramux_router_choices_total{adapter="where"}' in metrics
    assert 'loramux_adapter_changes_total{change="unload",result="done"} 1.0' in metrics


def test_below_the_threshold_the_base_answers(loras):
    with live_server(roots=[str(loras)], threshold=1.0) as live:
        for name in ("red", "green"):
            load(live, name, loras / name, prompts=[PROMPT])
        wait_for(lambda: "red" in live.complete(model="auto").json()["choices"][0].get("adapter_weights", {}))
        reply = live.complete(model="auto")
        assert reply.headers["x-loramux-adapter"] == "base"
        assert 0 < float(reply.headers["x-loramux-weight"]) < 1


def test_without_a_choice_there_is_no_auto(loras):
    with live_server(adapters=[str(loras)], choice=False) as live:
        assert "auto" not in [model["id"] for model in live.call("GET", "/v1/models").json()["data"]]
        assert live.complete(model="auto").json()["error"]["code"] == "model_not_found"


def test_a_run_is_served_with_its_tasks_and_its_own_router(finished_job):
    with live_server(runs=[str(finished_job)]) as live:
        listed = {model["id"]: model for model in live.call("GET", "/v1/models").json()["data"]}
        assert set(listed) == {"somebody/tiny-base", "auto", "colour", "sound", "home"}
        assert listed["colour"]["parent"] == "somebody/tiny-base"
        reply = live.complete(model="auto", prompt="colour of the cat").json()["choices"][0]
        assert reply["adapter"] in ("colour", "sound", "home")
        assert set(reply["adapter_weights"]) == {"colour", "sound", "home"}
        named = live.complete(model=reply["adapter"], prompt="colour of the cat").json()["choices"][0]
        assert named["text"] == reply["text"]


def test_a_mixture_that_routes_tokens_is_a_model_of_its_own(tmp_path):
    from training_cases import make_recipe, write_base, write_tasks

    from loramux.training.main_job import train_job

    base, tasks = write_base(tmp_path / "base"), write_tasks(tmp_path / "data")
    recipe = make_recipe(
        base,
        tasks,
        "method.name=molora",
        "method.options={rank: 2, experts: 2}",
        "train.steps=4",
        "export.enabled=false",
    )
    train_job(recipe, tmp_path / "run")
    with live_server(runs=[str(tmp_path / "run")]) as live:
        listed = {model["id"]: model["kind"] for model in live.call("GET", "/v1/models").json()["data"]}
        assert listed["molora"] == "mixture"
        mixed = live.complete(model="molora", prompt="colour of the cat").json()["choices"][0]
        assert mixed["adapter"] == "molora"
        assert live.complete(model="molora", prompt="cat", task="x").json()["error"]["code"] == "invalid_task"
        assert load(live, "molora", tmp_path)[1]["error"]["code"] == "adapter_name_reserved"
