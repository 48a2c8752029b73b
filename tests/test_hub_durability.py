"""Killed hubs, many repos, large files."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_cases import RunningHub, running_hub
from hub_uploads import sha256

from loramux.hub.server.accounts import ANYBODY
from loramux.hub.server.history import Add
from loramux.hub.server.names import RepoId


@pytest.mark.slow
def test_a_kill_at_any_write_leaves_the_last_state_and_nothing_half(tmp_path: Path) -> None:
    program = Path(__file__).with_name("hub_killed.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    tries = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["killed"] for one in tries] == [True] * (len(tries) - 1) + [False]
    assert len(tries) > 20, "write points were missed"
    for one in tries:
        assert one["seen"]["wrong"] == [], one
        assert one["seen"]["state"] in ("old", "new"), one
        assert one["again"] == {"state": "new", "acknowledged": True, "wrong": []}, one
    states = [one["seen"]["state"] for one in tries]
    assert states == sorted(states, reverse=True), "old up to the commit, new from then on"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "count"),
    [("", 10_000), ("&filter=task:t7", 1000), ("&search=adapter-99", 111), ("&sort=downloads&words=t7%20org3", 200)],
)
def test_ten_thousand_repos_are_listed_in_time(many_repos: RunningHub, query: str, count: int) -> None:
    times, seen, address = [], [], f"/api/models?limit=100{query}"
    with many_repos.web() as web:
        while address:
            start = time.perf_counter()
            answer = web.get(address)
            times.append(time.perf_counter() - start)
            seen += [model["id"] for model in answer.json()]
            address = answer.links.get("next", {}).get("url")
    p95 = sorted(times)[math.ceil(0.95 * len(times)) - 1]
    print(f"{query or 'all'}: {len(seen)} repos in {len(times)} pages, p95 {1000 * p95:.1f} ms")
    assert len(seen) == len(set(seen)) == count
    assert p95 < 0.25, "50 ms on an idle machine; this allows for a busy one"


@pytest.fixture(scope="module")
def many_repos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """Ten thousand repos of ten tasks and fifty organisations, each with a card."""
    with running_hub(tmp_path_factory.mktemp("many")) as hub:
        storage = hub.storage
        with storage.database.write():
            for number in range(10_000):
                repo = RepoId("models", f"org{number % 50}", f"adapter-{number}")
                card = f"---\ntags: [lora, task:t{number % 10}]\nbase_model: some/base\n---\n# {repo}\n".encode()
                storage.repos.create(repo, private=False, author="someone")
                storage.history.add_contents({sha256(card): card})
                key = storage.repos.find(repo, ANYBODY).key
                change = Add("README.md", sha256(card), is_lfs=False)
                storage.history.apply(key, "main", [change], caller=ANYBODY, title="card")
        yield hub


@pytest.mark.slow
def test_a_gigabyte_passes_through_little_memory(tmp_path: Path) -> None:
    """By Xet and by LFS; `benchmarks/hub_throughput.py 4096` does it with 4 GiB."""
    program = Path(__file__).resolve().parents[1] / "benchmarks" / "hub_throughput.py"
    done = subprocess.run(
        [sys.executable, program, "1024", "--folder", tmp_path, "--json"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    for way in json.loads(done.stdout)["ways"]:
        assert way["server_peak_mib"] < 200, way
