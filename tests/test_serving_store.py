"""Adapters in memory: a name stands for one immutable content at a time; what is no adapter is refused with a code; the
least recently used leaves; files that change on disk harm nobody."""

import json
import os
import random
import resource
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from adapter_cases import BASE_NAMES, deltas, make_store, write_lora
from cases import tiny_llama
from hub_cases import RunningHub
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loramux.hub.remote import Remote
from loramux.serving.errors import ServingError
from loramux.serving.generations import Lease
from loramux.serving.runs import register_all
from loramux.serving.slots import layout_of
from loramux.serving.store import AdapterStore, StoreLimits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that no test changes: `a` to `d` alike in shape, `narrow` and `wide`."""
    root = tmp_path_factory.mktemp("originals")
    for seed, name in enumerate("abcd"):
        write_lora(root / name, seed)
    write_lora(root / "narrow", 5, rank=2, lora_alpha=5, target_modules=["q_proj"], rank_pattern={"layers.1": 1})
    write_lora(root / "wide", 6, rank=16, use_rslora=True, target_modules=["up_proj", "v_proj"])
    return root


@pytest.fixture
def root(originals: Path, tmp_path: Path) -> Path:
    """Copies of the adapters, for a test to change."""
    return Path(shutil.copytree(originals, tmp_path / "root"))


@pytest.fixture
def store(root: Path) -> AdapterStore:
    return make_store(root)


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> ServingError:
    with pytest.raises(ServingError) as caught:
        call(*arguments, **options)
    return caught.value


def configure(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def alter(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(t).contiguous() for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def vector(store: AdapterStore, name: str) -> torch.Tensor:
    with store.lease(name) as lease:
        return lease.route.parts[0][0].flat.clone()


_watched: list[str] | None = None


def _note(event: str, arguments: tuple) -> None:
    if event == "open" and _watched is not None:
        _watched.append(str(arguments[0]))


@pytest.fixture(scope="module")
def _hook() -> None:
    sys.addaudithook(_note)  # it cannot be taken out again


@pytest.fixture
def opened(_hook: None) -> Iterator[list[str]]:
    """The paths of the files that any thread opens during the test."""
    global _watched
    _watched = []
    yield _watched
    _watched = None


def states(store: AdapterStore) -> dict[str, str]:
    return {info.name: info.state for info in store.list()}


# ---------------------------------------------------------------------- what comes in is what it was


@pytest.mark.parametrize("name", ["a", "narrow", "wide"])
def test_a_lease_holds_what_stock_peft_would_add(name: str, root: Path, store: AdapterStore) -> None:
    info = store.load(name, root / name)
    with store.lease(name) as lease:
        ((lora, share),) = lease.route.parts
        found = deltas(layout_of(tiny_llama()), lora.flat, lora.rank)
        assert (lease.route.name, lease.route.weights, share) == (name, info.generation, 1.0)
    stock = PeftModel.from_pretrained(tiny_llama(), root / name).base_model.model
    adapted = {linear for linear in found if hasattr(stock.get_submodule(linear), "lora_A")}
    for linear, delta in found.items():
        expected = stock.get_submodule(linear).get_delta_weight("default") if linear in adapted else 0 * delta
        torch.testing.assert_close(delta, expected.detach(), atol=1e-5, rtol=1e-5)
    assert (info.modules, info.rank) == (len(adapted), lora.rank)


def test_factors_are_kept_in_the_precision_of_the_server_with_scales_folded_in_before(root: Path) -> None:
    base = tiny_llama()
    half = AdapterStore(layout_of(base), base, BASE_NAMES, [root], dtype=torch.bfloat16)
    exact = make_store(root)
    half.load("wide", "wide")
    exact.load("wide", "wide")
    assert torch.equal(vector(half, "wide"), vector(exact, "wide").bfloat16())
    assert half.held().nbytes * 2 == exact.held().nbytes


def test_the_list_says_what_there_is(root: Path, store: AdapterStore) -> None:
    store.load("first", "a", pin=True)
    store.register("second", root / "b")
    first, second = store.list()
    assert (first.name, first.state, first.pinned, first.leases, first.source) == ("first", "memory", True, 0, "a")
    assert (second.name, second.state, second.generation) == ("second", "disk", None)
    assert first.nbytes == store.held().nbytes
    with store.lease("second") as lease:
        assert store.list()[1].leases == 1
    second = store.list()[1]
    assert second.state == "memory"
    assert second.generation == lease.route.weights != first.generation


def test_an_adapter_on_disk_is_not_waited_for_where_nothing_may_be_waited_for(root: Path, store: AdapterStore) -> None:
    store.register("a", root / "a")
    assert store.lease_now("a") is None
    store.lease("a").release()
    with store.lease_now("a") as lease:
        assert lease.info.generation == lease.route.weights


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("damage", "code", "reason"),
    [
        (lambda f: configure(f, base_model_name_or_path="gpt2"), "adapter_of_another_base", "it names 'gpt2'"),
        (lambda f: configure(f, target_modules=["nowhere"]), "adapter_invalid", "Target modules .*nowhere.* not found"),
        (lambda f: configure(f, peft_type="IA3"), "adapter_invalid", "only LORA can be imported"),
        (lambda f: configure(f, use_dora=True), "adapter_invalid", "DoRA"),
        (lambda f: configure(f, lora_alpha="x"), "adapter_invalid", "lora_alpha"),
        (lambda f: configure(f, r=65536), "rank_limit_exceeded", "of rank 65536; at most 256"),
        (lambda f: (f / CONFIG).write_text("{"), "adapter_invalid", "not readable as JSON"),
        (lambda f: (f / CONFIG).unlink(), "adapter_invalid", "no PEFT adapter"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "adapter_invalid", "not a whole safe"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "adapter_invalid", "its weights are pickled"),
        (lambda f: (f / WEIGHTS).write_bytes(bytes(3_000_000)), "adapter_too_large", "3000000 bytes; at most 2000000"),
        (lambda f: (f / WEIGHTS).write_bytes(bytes(1_900_000)), "adapter_too_large", "1900000 bytes; at most"),
        (lambda f: alter(f, lambda t: t * float("nan")), "adapter_invalid", "values that are not finite"),
        (lambda f: alter(f, lambda t: t[:, :3]), "adapter_invalid", "has shape"),
        (lambda f: shutil.rmtree(f), "adapter_not_found", "no such folder"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_this_base_is_refused_and_harms_nobody(damage, code, reason, root: Path) -> None:
    store = make_store(root, file_bytes=2_000_000)
    store.load("good", "b")
    before = vector(store, "good")
    damage(root / "a")
    refused = refusal(store.load, "a", str(root / "a"))
    assert refused.code == code
    assert refused.status in (400, 404, 413)
    with pytest.raises(ServingError, match=reason):
        store.load("a", str(root / "a"))
    assert states(store) == {"good": "memory"}
    assert torch.equal(vector(store, "good"), before)


def test_an_adapter_of_the_output_layer_is_refused(root: Path, store: AdapterStore) -> None:
    write_lora(root / "head", target_modules=["lm_head", "q_proj"])
    refused = refusal(store.load, "head", "head")
    assert refused.code == "adapter_invalid"
    assert "it adapts 'lm_head', which this server leaves as it is" in refused.message


def test_values_that_the_servers_precision_cannot_hold_are_refused(root: Path) -> None:
    base = tiny_llama()
    store = AdapterStore(layout_of(base), base, BASE_NAMES, [root], dtype=torch.float16)
    alter(root / "a", lambda t: t * 1e6)
    refused = refusal(store.load, "a", "a")
    assert (refused.code, "too large for torch.float16" in refused.message) == ("adapter_invalid", True)


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../a", "a/b", "a\0b", "-a", ".a", "a\n", "ä", "a b", "x" * 129, "x" * 10_000, "a\u202eb"],
)
def test_names_that_are_none_are_refused(name: str, root: Path, store: AdapterStore) -> None:
    refused = refusal(store.load, name, "a")
    assert (refused.code, refused.status) == ("adapter_name_invalid", 400)
    assert len(refused.message) < 400
    assert refused.message.isprintable()
    assert refusal(store.lease, name).code == "adapter_not_found"
    assert refusal(store.register, name, root / "a").code == "adapter_name_invalid"


@pytest.mark.parametrize("name", ["auto", "base", "taken"])
def test_names_that_stand_for_something_else_are_refused(name: str, root: Path) -> None:
    base = tiny_llama()
    store = AdapterStore(layout_of(base), base, BASE_NAMES, [root], reserved=["taken"])
    refused = refusal(store.load, name, "a")
    assert (refused.code, refused.status) == ("adapter_name_reserved", 409)
    assert f"{name!r} stands for something else here" in refused.message


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("/etc", "adapter_path_forbidden"),
        ("../outside", "adapter_path_forbidden"),
        ("./../outside", "adapter_path_forbidden"),
        ("~/outside", "adapter_not_found"),
        ("link", "adapter_not_found"),
        ("./link", "adapter_path_forbidden"),
        ("weights-elsewhere", "adapter_path_forbidden"),
        ("circle", "adapter_not_found"),
        ("./nowhere", "adapter_not_found"),
        ("nowhere", "adapter_not_found"),
        ("", "adapter_not_found"),
        ("a\0b", "adapter_not_found"),
        ("/a\0b", "adapter_not_found"),
        ("x" * 10_000, "adapter_not_found"),
        ("/" + "x" * 10_000, "adapter_path_forbidden"),
        ("owner/name", "hub_disabled"),
        ("owner/name@" + "x" * 10_000, "adapter_not_found"),
        ("https://example.org/a", "adapter_not_found"),
    ],
)
def test_only_folders_below_the_roots_are_opened(source, code, root: Path, store: AdapterStore, opened) -> None:
    outside = Path(shutil.copytree(root / "a", root.parent / "outside"))
    (root / "link").symlink_to(outside)
    (root / "circle").symlink_to(root / "circle")
    shutil.copytree(root / "a", root / "weights-elsewhere")
    (root / "weights-elsewhere" / WEIGHTS).unlink()
    (root / "weights-elsewhere" / WEIGHTS).symlink_to(outside / WEIGHTS)
    opened.clear()
    refused = refusal(store.load, "a", source)
    assert refused.code == code
    assert len(refused.message) < 600
    assert not [path for path in opened if "outside" in path or "weights" in path]
    assert not store.list()


def test_a_folder_has_no_revisions(store: AdapterStore) -> None:
    refused = refusal(store.load, "a", "a", revision="main")
    assert (refused.code, refused.status) == ("adapter_not_found", 404)
    assert "a folder, which has no revisions" in refused.message


def test_a_link_inside_the_root_is_followed_until_it_leads_out(root: Path) -> None:
    (root / "current").symlink_to(root / "a")
    store = make_store(root, adapters=1)
    store.load("a", "current")
    store.load("b", "b")
    outside = Path(shutil.copytree(root / "a", root.parent / "outside"))
    shutil.rmtree(root / "a")
    (root / "a").symlink_to(outside)
    assert refusal(store.lease, "a").code == "adapter_path_forbidden"


# ---------------------------------------------------------------------- generations


def test_the_same_files_again_are_no_change_and_others_need_to_say_what_they_replace(store: AdapterStore) -> None:
    first = store.load("x", "a")
    assert store.load("x", "a") == first
    refused = refusal(store.load, "x", "b")
    assert (refused.code, refused.status) == ("adapter_exists", 409)
    second = store.replace("x", "b", expected_generation=first.generation)
    assert second.generation not in (None, first.generation)
    refused = refusal(store.replace, "x", "c", expected_generation=first.generation)
    assert (refused.code, refused.status) == ("generation_mismatch", 409)
    assert f"generation {second.generation}, not {first.generation}" in refused.message
    assert store.list() == (second,)
    assert refusal(store.replace, "y", "c", expected_generation=first.generation).code == "adapter_not_found"


def test_a_generation_is_config_and_weights_wherever_they_lie(root: Path, store: AdapterStore) -> None:
    shutil.copytree(root / "a", root / "copy")
    assert store.load("one", "a").generation == store.load("two", "copy").generation
    configure(root / "copy", lora_alpha=99)
    assert store.load("three", "copy").generation != store.list()[0].generation


def test_an_adapter_that_was_never_read_can_be_replaced_too(root: Path, store: AdapterStore) -> None:
    store.register("x", root / "a")
    generation = make_store(root).load("x", "a").generation
    assert refusal(store.replace, "x", "b", expected_generation="other").code == "generation_mismatch"
    assert refusal(store.load, "x", "b").code == "adapter_exists"
    assert store.replace("x", "b", expected_generation=generation).source == "b"


def test_requests_in_flight_finish_on_their_generation(store: AdapterStore) -> None:
    first = store.load("x", "a")
    old = vector(store, "x")
    with store.lease("x") as lease:
        store.replace("x", "b", expected_generation=first.generation)
        assert torch.equal(lease.route.parts[0][0].flat, old)
        assert lease.info.generation == first.generation
        assert not torch.equal(vector(store, "x"), old)
        assert store.held().nbytes == 2 * first.nbytes
    assert store.held().nbytes == first.nbytes


def test_unloading_waits_for_those_in_flight_and_refuses_new_ones(store: AdapterStore) -> None:
    store.load("x", "a")
    lease = store.lease("x")
    with ThreadPoolExecutor(1) as threads:
        unloading = threads.submit(store.unload, "x")
        while states(store)["x"] != "unloading":
            time.sleep(0.01)
        for call in (store.lease, store.lease_now, store.unload, store.pin):
            refused = refusal(call, "x")
            assert (refused.code, refused.status) == ("adapter_unloading", 409)
        assert refusal(store.load, "x", "a").code == "adapter_unloading"
        assert not unloading.done()
        lease.release()
        unloading.result(5)
    assert refusal(store.lease, "x").code == "adapter_not_found"
    assert (store.list(), store.held().nbytes) == ((), 0)
    store.load("x", "b")


def test_unloading_gives_up_after_its_time_and_the_adapter_is_served_on(store: AdapterStore) -> None:
    store.load("x", "a")
    with store.lease("x"):
        refused = refusal(store.unload, "x", timeout_s=0.05)
        assert (refused.code, refused.status) == ("adapter_busy", 409)
        assert "still used by 1 requests" in refused.message
        store.lease("x").release()


def test_unloading_by_force_leaves_those_in_flight_what_they_have(store: AdapterStore) -> None:
    store.load("x", "a")
    expected = vector(store, "x")
    lease = store.lease("x")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(store.unload, "x")
        while states(store)["x"] != "unloading":
            time.sleep(0.01)
        store.unload("x", force=True)
        waiting.result(5)
    assert not store.list()
    assert torch.equal(lease.route.parts[0][0].flat, expected)
    lease.release()
    lease.release()
    assert store.held().nbytes == 0


def test_whoever_holds_a_lease_has_the_bytes_of_its_generation_whatever_others_do(root: Path) -> None:
    """Eight threads lease, mix, load, replace, pin and unload four names over four contents, in memory for three."""
    reference = make_store(root)
    expected = {reference.load(name, name).generation: vector(reference, name) for name in "abcd"}
    store = make_store(root, adapters=3, nbytes=10**9)
    done: Counter[str] = Counter()
    allowed = {
        *("lease", "mix", "load", "replace", "unload", "pin"),
        *("adapter_not_found", "adapter_exists", "generation_mismatch", "adapter_unloading", "adapter_busy"),
        *("adapter_memory_full", "pin_limit_exceeded"),
    }

    def check(lease: Lease) -> None:
        with lease:
            time.sleep(0.002)
            for lora, generation in zip(lease.route.parts, lease.route.weights.split("+"), strict=True):
                assert torch.equal(lora[0].flat, expected[generation.split("*")[0]])

    def use(seed: int) -> None:
        dice = random.Random(seed)
        deeds: dict[str, Callable[[str, str], object]] = {
            "lease": lambda name, _: check(store.lease(name)),
            "mix": lambda name, other: check(store.mix({name: 0.5, other: 2.0})),
            "load": lambda name, other: store.load(name, other),
            "replace": lambda name, other: store.replace(name, other, expected_generation=dice.choice(list(expected))),
            "unload": lambda name, _: store.unload(name, force=dice.random() < 0.5, timeout_s=0.02),
            "pin": lambda name, _: store.pin(name, dice.random() < 0.5),
        }
        for _ in range(150):
            (deed,) = dice.choices(list(deeds), weights=[10, 4, 4, 4, 1, 1])
            try:
                deeds[deed](dice.choice("abcd"), dice.choice("abcd"))
                done[deed] += 1
            except ServingError as error:
                done[error.code] += 1

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(use, seed) for seed in range(8)]:
            future.result(120)
    assert min(done[deed] for deed in ("lease", "mix", "load", "replace", "unload", "pin", "generation_mismatch")) > 0
    assert set(done) <= allowed
    assert len([info for info in store.list() if info.state == "memory"]) <= 3
    for info in store.list():
        assert info.leases == 0
        store.unload(info.name)
    assert store.held().nbytes == 0


# ---------------------------------------------------------------------- memory and disk


def test_the_least_recently_used_leaves_and_comes_back_the_same(root: Path) -> None:
    store = make_store(root, adapters=2)
    for name in "ab":
        store.load(name, name)
    before = vector(store, "a")
    store.load("c", "c")
    assert states(store) == {"a": "memory", "b": "disk", "c": "memory"}
    store.lease("b").release()
    assert states(store) == {"a": "disk", "b": "memory", "c": "memory"}
    assert torch.equal(vector(store, "a"), before)


def test_bytes_are_a_limit_too(root: Path) -> None:
    size = make_store(root).load("a", "a").nbytes
    store = make_store(root, nbytes=5 * size)
    for name in "abcd":
        store.load(name, name)
    assert store.held().nbytes == 4 * size
    store.load("wide", "wide")  # four times as wide
    assert states(store) == {"a": "disk", "b": "disk", "c": "disk", "d": "memory", "wide": "memory"}
    refused = refusal(make_store(root, nbytes=size - 1).load, "a", "a")
    assert (refused.code, refused.status) == ("adapter_too_large", 413)
    assert f"{size} bytes in memory; all adapters together have {size - 1}" in refused.message


def test_who_finds_all_memory_in_use_waits_until_a_request_ends(root: Path) -> None:
    store = make_store(root, adapters=1)
    store.load("a", "a")
    store.register("d", root / "d")
    lease = store.lease("a")
    threading.Timer(0.3, lease.release).start()
    began = time.monotonic()
    with store.lease("d") as other:
        assert other.info.name == "d"
    assert 0.2 < time.monotonic() - began < 10


def test_pinned_and_leased_adapters_never_leave(root: Path) -> None:
    store = make_store(root, adapters=2, load_s=3)
    store.load("a", "a", pin=True)
    store.load("b", "b")
    with store.lease("b"):
        refused = refusal(store.load, "c", "c")
        assert (refused.code, refused.status) == ("adapter_memory_full", 503)
        assert "2 adapters are in use or pinned" in refused.message
        store.register("d", root / "d")
        assert refusal(store.lease, "d").code == "adapter_memory_full"
    store.load("c", "c")
    assert states(store) == {"a": "memory", "b": "disk", "c": "memory", "d": "disk"}
    refused = refusal(store.pin, "c")
    assert (refused.code, refused.status) == ("pin_limit_exceeded", 409)
    assert "'c' cannot be pinned: 1 adapters are" in refused.message
    assert refusal(store.load, "e", "b", pin=True).code == "pin_limit_exceeded"
    assert not store.pin("a", False).pinned
    assert store.pin("d", False).state == "disk"
    assert store.pin("b").pinned
    assert states(store) == {"a": "disk", "b": "memory", "d": "disk", "c": "memory"}
    assert store.replace("b", "d", expected_generation=store.list()[1].generation).pinned


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda f: shutil.rmtree(f), "adapter_files_gone"),
        (lambda f: (f / WEIGHTS).unlink(), "adapter_files_gone"),
        (lambda f: (f / WEIGHTS).write_bytes(b"no"), "adapter_invalid"),
        (lambda f: alter(f, lambda t: -t), "adapter_files_changed"),
        (lambda f: configure(f, lora_alpha=1), "adapter_files_changed"),
    ],
)  # fmt: skip
def test_files_that_change_while_an_adapter_is_on_disk_give_a_clear_error(damage, code, seen, root: Path) -> None:
    store = make_store(root, adapters=1)
    _ = store.load("a", "a") if seen else store.register("a", root / "a")
    store.load("b", "b")
    kept = Path(shutil.copytree(root / "a", root.parent / "kept"))
    damage(root / "a")
    if code == "adapter_files_changed" and not seen:
        store.lease("a").release()  # nothing was promised of its weights yet
        return
    for _ in range(2):
        assert refusal(store.lease, "a").code == code
    store.lease("b").release()
    shutil.copytree(kept, root / "a", dirs_exist_ok=True)
    store.lease("a").release()
    assert [info.leases for info in store.list()] == [0, 0]


def test_an_adapter_in_memory_does_not_mind_what_becomes_of_its_files(root: Path, store: AdapterStore) -> None:
    store.load("a", "a")
    shutil.rmtree(root / "a")
    store.lease("a").release()


def test_changed_files_are_served_once_they_replace_the_old(root: Path) -> None:
    store = make_store(root, adapters=1)
    generation = store.load("a", "a").generation
    store.load("b", "b")
    alter(root / "a", lambda t: -t)
    assert "replace it to serve the new ones" in refusal(store.lease, "a").message
    store.replace("a", "a", expected_generation=generation)
    assert states(store) == {"a": "memory", "b": "disk"}


def test_those_who_want_one_adapter_from_disk_read_it_once(root: Path, store: AdapterStore, opened) -> None:
    store.register("a", root / "a")
    opened.clear()
    barrier = threading.Barrier(16)

    def want() -> str:
        barrier.wait()
        with store.lease("a") as lease:
            return lease.route.weights

    with ThreadPoolExecutor(16) as threads:
        found = [future.result() for future in [threads.submit(want) for _ in range(16)]]
    assert len(set(found)) == 1
    assert len([path for path in opened if path.endswith(WEIGHTS)]) == 1


def test_more_waiting_loads_than_allowed_are_refused_and_those_in_memory_go_on(root: Path) -> None:
    store = make_store(root, loaders=1, waiting_loads=1)
    for name in "abcd":
        store.register(name, root / name)
    store.load("wide", "wide")
    go = threading.Event()
    blocked = [store._submit(go.wait) for _ in range(2)]
    refused = refusal(store.lease, "a")
    assert (refused.code, refused.status) == ("adapter_load_busy", 429)
    store.lease("wide").release()
    go.set()
    assert all(future.result(5) for future in blocked)
    store.lease("a").release()


def test_who_waits_too_long_for_the_disk_is_told_and_the_adapter_comes_in_all_the_same(root: Path) -> None:
    store = make_store(root, loaders=1, load_s=0.05)
    store.register("a", root / "a")
    go = threading.Event()
    store._submit(go.wait)
    refused = refusal(store.lease, "a")
    assert (refused.code, refused.status) == ("adapter_load_timeout", 504)
    go.set()
    while states(store)["a"] != "memory":
        time.sleep(0.01)
    assert store.list()[0].leases == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_no_memory_left_is_a_refusal_and_harms_nobody(root: Path) -> None:
    rank = 16384
    write_lora(root / "huge", rank=rank)
    store = make_store(root, rank=rank)
    store.load("a", "a")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), before[1]))
    try:
        refused = refusal(store.load, "huge", "huge")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert (refused.code, refused.status) == ("out_of_memory", 503)
    assert store.load("huge", "huge").rank == rank
    assert states(store) == {"a": "memory", "huge": "memory"}


# ---------------------------------------------------------------------- many


def test_a_folder_of_adapters_is_served_by_their_names_and_bad_ones_are_told(root: Path, store: AdapterStore) -> None:
    configure(root / "c", peft_type="IA3")
    (root / "d").rename(root / "not a name")
    (root / "b" / WEIGHTS).write_bytes((root / "b" / WEIGHTS).read_bytes()[:1000])
    refused = register_all((root,), (), store.register)
    assert {folder: error.code for folder, error in refused.items()} == {
        root / "b": "adapter_invalid",
        root / "c": "adapter_invalid",
        root / "not a name": "adapter_name_invalid",
    }
    assert "not a whole safetensors file" in refused[root / "b"].message
    assert states(store) == dict.fromkeys(["a", "narrow", "wide"], "disk")
    assert register_all((root,), (), store.register)[root / "a"].code == "adapter_exists"
    for name in states(store):
        store.lease(name).release()


def test_a_thousand_adapters_are_known_soon_and_kept_within_the_limits(root: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    for number in range(1000):
        (many / f"a{number}").mkdir(parents=True)
        for file in (CONFIG, WEIGHTS):
            os.link(root / "a" / file, many / f"a{number}" / file)
    size = make_store(root).load("a", "a").nbytes
    store = make_store(many, adapters=20, nbytes=50 * size)
    start = time.process_time()
    assert not register_all((many,), (), store.register)
    assert time.process_time() - start < 5
    assert store.held().nbytes == 0
    for number in range(0, 1000, 20):
        store.lease(f"a{number}").release()
        assert store.held().nbytes <= 20 * size
    assert len(store.list()) == 1000


# ---------------------------------------------------------------------- mixes


def test_a_mix_leases_all_its_adapters_and_gives_all_back(store: AdapterStore) -> None:
    infos = [store.load(name, name) for name in ("a", "wide")]
    with store.mix({"a": 0.25, "wide": -2}) as lease:
        route = lease.route
        assert (route.name, route.rank) == ("a+wide", 20)
        assert route.weights == f"{infos[0].generation}*0.25+{infos[1].generation}*-2.0"
        assert [share for _, share in route.parts] == [0.25, -2.0]
        assert [info.name for info in lease.infos] == ["a", "wide"]
        assert [info.leases for info in store.list()] == [1, 1]
    assert [info.leases for info in store.list()] == [0, 0]


def test_mixes_that_cannot_be_are_refused_and_hold_nothing(root: Path) -> None:
    store = make_store(root, rank=16)
    store.load("a", "a")
    store.load("wide", "wide")
    assert refusal(store.mix, {}).code == "mix_invalid"
    assert "1 to 16 adapters" in refusal(store.mix, {str(n): 1.0 for n in range(17)}).message
    assert refusal(store.mix, {"a": float("inf")}).code == "mix_invalid"
    refused = refusal(store.mix, {"a": 1.0, "wide": 1.0})
    assert refused.code == "rank_limit_exceeded"
    assert "the mix has rank 20" in refused.message
    assert refusal(store.mix, {"a": 1.0, "nobody": 1.0}).code == "adapter_not_found"
    assert [info.leases for info in store.list()] == [0, 0]


# ---------------------------------------------------------------------- from the Hub


@pytest.fixture
def repository(local_hub: RunningHub, root: Path, request: pytest.FixtureRequest) -> str:
    name = f"someone/{request.node.name[5:45].replace('_', '-').strip('-')}"
    local_hub.client().create_repo(name)
    local_hub.client().upload_folder(repo_id=name, folder_path=root / "a")
    return name


def hub_store(root: Path, hub: RunningHub, **limits) -> AdapterStore:
    base = tiny_llama()
    return AdapterStore(layout_of(base), base, BASE_NAMES, [root], StoreLimits(**limits), hub=Remote(hub.url))


def test_an_adapter_comes_from_the_hub_at_a_commit_that_is_kept(local_hub: RunningHub, repository, root: Path) -> None:
    store = hub_store(root, local_hub, adapters=1)
    first = store.load("x", repository)
    local_hub.client().upload_folder(repo_id=repository, folder_path=root / "b")
    assert (first.source, len(first.revision)) == (repository, 40)
    assert torch.equal(vector(store, "x"), vector_of(root / "a", root))
    now = store.replace("x", f"{repository}@main", expected_generation=first.generation)
    assert now.revision != first.revision
    assert torch.equal(vector(store, "x"), vector_of(root / "b", root))
    again = store.load("y", repository, revision=first.revision)
    assert (again.generation, again.revision) == (first.generation, first.revision)
    assert torch.equal(vector(store, "x"), vector_of(root / "b", root))


def vector_of(folder: Path, root: Path) -> torch.Tensor:
    store = make_store(root)
    store.load("one", folder)
    return vector(store, "one")


def test_what_the_hub_has_not_or_is_too_large_is_refused_before_it_is_fetched(local_hub, repository, root) -> None:
    store = hub_store(root, local_hub, file_bytes=1000)
    refused = refusal(store.load, "x", "someone/nothing-here")
    assert (refused.code, refused.status) == ("adapter_not_fetched", 502)
    assert "has no such repository" in refused.message
    assert "not that revision" in refusal(store.load, "x", repository, revision="v9").message
    refused = refusal(store.load, "x", repository)
    assert (refused.code, refused.status) == ("adapter_too_large", 413)
    local_hub.client().delete_file(WEIGHTS, repository)
    refused = refusal(store.load, "x", repository)
    assert refused.code == "adapter_invalid"
    assert f"has no {WEIGHTS}" in refused.message


def test_a_hub_that_does_not_answer_is_not_waited_for_forever(local_hub: RunningHub, root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        base = tiny_llama()
        remote = Remote(f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = AdapterStore(layout_of(base), base, BASE_NAMES, [root], StoreLimits(load_s=0.2), hub=remote)
        refused = [refusal(store.load, "x", "someone/thing") for _ in range(5)]
    assert [error.code for error in refused] == ["adapter_load_timeout"] * 4 + ["adapter_load_busy"]
    assert "not downloaded within 0.2 s" in refused[0].message
