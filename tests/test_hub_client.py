"""What unchanged clients do with the local hub, and what it tells them."""

import base64
import json
import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from hub_cases import RunningHub, running_hub
from hub_uploads import commit_lines, large, lfs_link, send_lfs, sha256, small
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError

from loramux.hub.server import Policy, Storage
from loramux.hub.server.accounts import ANYBODY
from loramux.hub.server.clean import clean
from loramux.hub.server.history import Commit, History
from loramux.hub.server.names import repo_id
from loramux.hub.server.tree import Entry, RecentTrees, Tree

HUGE_CURSOR = base64.urlsafe_b64encode(f'[{10**40}, "a/b"]'.encode()).decode()
ROUND_TRIP = Path(__file__).resolve().parents[1] / "benchmarks" / "hub_client.py"


@pytest.fixture
def http(local_hub: RunningHub) -> httpx.Client:
    return local_hub.web()


@pytest.fixture
def repo(local_hub: RunningHub, request: pytest.FixtureRequest) -> str:
    """A repo of this test's own."""
    name = f"someone/{request.node.name.split('[')[0].replace('_', '-')[-60:].strip('-')}"
    return local_hub.client().create_repo(name).repo_id


def environment(hub: RunningHub, home: Path, **more: str) -> dict[str, str]:
    """A fresh process's environment that points stock clients at the hub."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**clean, "HF_ENDPOINT": hub.url, "HF_TOKEN": "any", "HF_HOME": str(home), **more}


@pytest.mark.parametrize("xet", ["0", "1"], ids=["xet", "lfs"])
def test_the_stock_client_does_everything_in_a_fresh_process(local_hub: RunningHub, tmp_path: Path, xet: str) -> None:
    """create, upload_folder, list, snapshot_download, commit, revisions, ranges, move, delete."""
    env = environment(local_hub, tmp_path, HF_HUB_DISABLE_XET=xet)
    done = subprocess.run([sys.executable, str(ROUND_TRIP), "3"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["seconds"]) >= {"create", "upload_folder", "snapshot_download", "revisions"}
    assert not any((local_hub.storage.root / "incoming").iterdir())


@pytest.mark.slow
def test_the_hf_command_line_uploads_and_downloads(local_hub: RunningHub, repo: str, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("by hand")
    hf = str(Path(sys.executable).parent / "hf")
    for arguments in (["upload", repo, "note.txt", "note.txt"], ["download", repo, "--local-dir", "back"]):
        env = environment(local_hub, tmp_path / "home")
        done = subprocess.run([hf, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "note.txt").read_text() == "by hand"


def test_sixteen_committers_at_once_lose_nothing(local_hub: RunningHub, repo: str) -> None:
    def commit(number: int) -> str:
        client = local_hub.client()
        return client.upload_file(repo_id=repo, path_or_fileobj=b"%d" % number, path_in_repo=f"{number}.txt").oid

    with ThreadPoolExecutor(16) as pool:
        commits = set(pool.map(commit, range(16)))
    client = local_hub.client()
    assert len(commits) == 16
    assert set(client.list_repo_files(repo)) == {f"{number}.txt" for number in range(16)}
    assert {commit.commit_id for commit in client.list_repo_commits(repo)} > commits


def test_a_large_file_in_parts_is_one_file(tmp_path: Path) -> None:
    data = os.urandom(700_001)
    with (
        running_hub(tmp_path, Policy(inline_bytes=1000, part_bytes=1 << 16)) as hub,
        hub.web() as http,
    ):
        hub.client().create_repo("someone/parts")
        actions = lfs_link(http, "someone/parts", data)["actions"]
        header = {int(name): link for name, link in actions["upload"]["header"].items() if name.isdigit()}
        assert len(header) == 11
        for part, link in sorted(header.items(), reverse=True):  # in any order
            piece = data[(part - 1) << 16 : part << 16]
            assert http.put(link, content=piece).headers["etag"] == f'"{part}"'
        assert http.post(actions["upload"]["href"], json={}).status_code == 200
        assert http.post(actions["upload"]["href"], json={}).status_code == 200, "the first answer got lost"
        assert http.post(actions["verify"]["href"], json={}).status_code == 200
        assert "actions" not in lfs_link(http, "someone/parts", data)


def test_uploads_know_by_hash_what_is_here_already(local_hub: RunningHub, http: httpx.Client, repo: str) -> None:
    client, data = local_hub.client(), os.urandom(1_500_000)
    client.upload_file(repo_id=repo, path_or_fileobj=data, path_in_repo="a.bin")
    client.upload_file(repo_id=repo, path_or_fileobj=b"small", path_in_repo="a.txt")
    files = [
        {"path": path, "size": size, "sample": ""} for path, size in (("a.bin", 1_500_000), ("a.txt", 5), ("n", 1))
    ]
    told = http.post(f"/api/models/{repo}/preupload/main", json={"files": files}).json()["files"]
    listed = {file.path: file for file in client.get_paths_info(repo, ["a.bin", "a.txt"])}
    assert [file["uploadMode"] for file in told] == ["lfs", "regular", "regular"]
    assert [file["oid"] for file in told] == [listed["a.bin"].lfs.sha256, listed["a.txt"].blob_id, None]


@pytest.mark.parametrize("size", [1000, 1_500_000], ids=["small", "large"])
def test_ranges(local_hub: RunningHub, http: httpx.Client, size: int) -> None:
    repo, data = local_hub.client().create_repo("someone/ranges", exist_ok=True).repo_id, os.urandom(size)
    local_hub.client().upload_file(repo_id=repo, path_or_fileobj=data, path_in_repo="w.bin")

    def get(range_: str) -> httpx.Response:
        return http.get(f"/{repo}/resolve/main/w.bin", headers={"Range": range_})

    whole = http.get(f"/{repo}/resolve/main/w.bin")
    assert whole.content == data
    assert whole.headers["accept-ranges"] == "bytes"
    assert http.head(f"/{repo}/resolve/main/w.bin").headers["content-length"] == str(size)
    for range_, wanted in (("bytes=10-19", data[10:20]), ("bytes=900-", data[900:]), ("bytes=-7", data[-7:])):
        answer = get(range_)
        assert (answer.status_code, answer.content) == (206, wanted)
        assert answer.headers["etag"] == whole.headers["etag"]
    assert get("bytes=0-").content == data
    assert get(f"bytes={size}-").status_code == 416


def test_an_interrupted_download_goes_on(local_hub: RunningHub, repo: str, http: httpx.Client) -> None:
    data = os.urandom(2_000_000)
    local_hub.client().upload_file(repo_id=repo, path_or_fileobj=data, path_in_repo="w.bin")
    with http.stream("GET", f"/{repo}/resolve/main/w.bin") as answer:
        first = next(answer.iter_bytes(100_000))
    rest = http.get(f"/{repo}/resolve/main/w.bin", headers={"Range": f"bytes={len(first)}-"})
    assert first + rest.content == data


def test_trees_of_many_files_come_in_pages(local_hub: RunningHub, repo: str, http: httpx.Client) -> None:
    operations = [small(f"folder/{number:04}.txt", b"%d" % number) for number in range(1100)]
    assert http.post(f"/api/models/{repo}/commit/main", content=commit_lines(*operations)).status_code == 200
    first = http.get(f"/api/models/{repo}/tree/main?recursive=true")
    assert len(first.json()) == 1000
    assert 'rel="next"' in first.headers["link"]
    client = local_hub.client()
    assert len(client.list_repo_files(repo)) == 1100
    assert [entry.path for entry in client.list_repo_tree(repo)] == ["folder"]
    assert len(list(client.list_repo_tree(repo, "folder"))) == 1100


def test_lists_are_filtered_sorted_and_paged(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        client = hub.client()
        for number in range(7):
            card = f"---\ntags: [task:{'odd' if number % 2 else 'even'}, Method:MoA]\nlicense: mit\n---\n"
            client.create_repo(f"org{number % 3}/adapter-{number}")
            client.upload_file(
                repo_id=f"org{number % 3}/adapter-{number}", path_or_fileobj=card.encode(), path_in_repo="README.md"
            )
        for _ in range(2):
            httpx.get(f"{hub.url}/org0/adapter-3/resolve/main/README.md")

        def ids(**query: object) -> list[str]:
            return [model.id.split("-")[1] for model in client.list_models(**query)]

        assert ids() == ["6", "5", "4", "3", "2", "1", "0"]
        assert ids(filter="task:odd") == ["5", "3", "1"]
        assert ids(filter=["task:even", "method:moa", "license:mit"], author="ORG0") == ["6", "0"]
        assert ids(search="ADAPTER-2") == ["2"]
        assert ids(search="adapter_2") == []
        assert ids(sort="downloads", limit=1) == ["3"]
        one_by_one = httpx.get(f"{hub.url}/api/models?limit=1")
        seen = [*one_by_one.json()]
        while link := one_by_one.links.get("next"):
            one_by_one = httpx.get(link["url"])
            seen += one_by_one.json()
        assert [model["id"].split("-")[1] for model in seen] == ["6", "5", "4", "3", "2", "1", "0"]
        full = next(client.list_models(full=True, filter="task:odd"))
        assert [file.rfilename for file in full.siblings] == ["README.md"]
        assert full.card_data.license == "mit"


def test_an_adapter_is_known_by_its_config_whatever_its_card_says(local_hub: RunningHub, repo: str) -> None:
    """`PeftModel.push_to_hub` leaves a card of transformers, without the base."""
    client = local_hub.client()
    config = {"base_model_name_or_path": "tiny/base", "peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM"}
    operations = [
        CommitOperationAdd("README.md", b"---\nlibrary_name: transformers\ntags: []\n---\n"),
        CommitOperationAdd("mixture/adapter_config.json", b'{"peft_type": "LORAMUX", "r": 99}'),
        CommitOperationAdd("who/adapter_config.json", json.dumps(config).encode()),
    ]
    client.create_commit(repo, operations, commit_message="adapter")
    info = client.model_info(repo)
    assert info.library_name == "peft"
    assert {"peft", "base_model:tiny/base", "base_model:adapter:tiny/base"} <= set(info.tags)
    assert info.config == {"peft": config}


def test_datasets_live_beside_models(local_hub: RunningHub, tmp_path: Path) -> None:
    client = local_hub.client()
    client.create_repo("someone/same-name", repo_type="dataset")
    client.create_repo("someone/same-name")
    client.upload_file(repo_id="someone/same-name", repo_type="dataset", path_or_fileobj=b"{}", path_in_repo="a.json")
    assert client.list_repo_files("someone/same-name", repo_type="dataset") == ["a.json"]
    assert client.list_repo_files("someone/same-name") == []
    assert "someone/same-name" in {found.id for found in client.list_datasets()}
    fetched = client.hf_hub_download("someone/same-name", "a.json", repo_type="dataset", cache_dir=tmp_path)
    assert Path(fetched).read_text() == "{}"


def test_downloads_are_counted_once_for_each_fetch_of_the_config(
    local_hub: RunningHub, repo: str, tmp_path: Path
) -> None:
    client = local_hub.client()
    for path in ("adapter_config.json", "adapter_model.safetensors"):  # clients fetch equal contents once
        client.upload_file(repo_id=repo, path_or_fileobj=path.encode(), path_in_repo=path)
    for _ in range(2):  # the second comes from the client's cache
        client.snapshot_download(repo, cache_dir=tmp_path)
    assert client.model_info(repo).downloads == 1


def test_a_download_goes_on_when_it_cannot_be_counted(local_hub: RunningHub, repo: str, http: httpx.Client) -> None:
    """As on a full disk, or beside another process that writes for long: here SQLite refuses every change."""
    local_hub.client().upload_file(repo_id=repo, path_or_fileobj=b"{}", path_in_repo="config.json")
    writer = local_hub.storage.database._writer
    writer.execute("PRAGMA query_only = ON")
    try:
        answer = http.get(f"/{repo}/resolve/main/config.json")
        with pytest.raises(sqlite3.OperationalError), local_hub.storage.database.write() as connection:
            connection.execute("DELETE FROM settings")
    finally:
        writer.execute("PRAGMA query_only = OFF")
    assert (answer.status_code, answer.content) == (200, b"{}")


def test_a_commit_that_fails_takes_nothing_from_another_with_equal_files(local_hub: RunningHub, repo: str) -> None:
    history, data = local_hub.storage.history, b"in both commits"
    one: set[str] = set()
    other: set[str] = set()
    for added in (one, other):
        history.add_contents({sha256(data): data}, added)
    history.settle_contents(other)
    assert history.content(sha256(data)) == data
    history.settle_contents(one)
    assert history.content(sha256(data)) is None


def test_the_parent_of_a_commit_may_be_named_by_the_start_of_its_id(local_hub: RunningHub, repo: str) -> None:
    client, add = local_hub.client(), [CommitOperationAdd("a.txt", b"a")]
    first = client.model_info(repo).sha
    client.create_commit(repo, add, commit_message="second", parent_commit=first[:7])
    for stale in (first, first[:7], client.model_info(repo).sha[:6]):
        with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
            client.create_commit(repo, [CommitOperationAdd("a.txt", b"b")], commit_message="no", parent_commit=stale)
        assert caught.value.response.status_code == 412


def test_changes_of_a_commit_are_made_in_their_order(local_hub: RunningHub, repo: str, http: httpx.Client) -> None:
    remove = ("deletedFolder", {"path": "a/b/"})
    stay, gone = small("a/c.txt", b"1"), small("a/b/d/e.txt", b"2")
    body = commit_lines(stay, gone, remove, small("a/b/f.txt", b"3"))
    assert http.post(f"/api/models/{repo}/commit/main", content=body).is_success
    client = local_hub.client()
    assert client.list_repo_files(repo) == ["a/b/f.txt", "a/c.txt"]
    assert [entry.path for entry in client.list_repo_tree(repo, "a")] == ["a/b", "a/c.txt"]
    told = client.get_paths_info(repo, ["a", "a/b", "a/b/d", "a/c.txt", "c.txt"])
    assert [entry.path for entry in told] == ["a", "a/b", "a/c.txt"]
    twice = http.post(f"/api/models/{repo}/commit/main", content=commit_lines(remove, remove))
    assert (twice.status_code, "no folder 'a/b'" in twice.text) == (404, True)


def test_trees_are_kept_in_memory_up_to_so_many_files() -> None:
    loaded = []

    def load(digest: str) -> Tree:
        loaded.append(digest)
        return Tree({f"{number}.txt": Entry("", 0, "", is_lfs=False) for number in range(int(digest))})

    trees = RecentTrees(load, max_files=100)
    for digest in ("60", "30", "60", "20", "60", "30", "500", "20"):
        assert len(trees.read(digest)) == int(digest)
        assert trees.files <= 100
    assert loaded == ["60", "30", "20", "30", "500", "20"]


def test_files_move_aside_for_folders_only_when_asked(local_hub: RunningHub, repo: str) -> None:
    client = local_hub.client()
    client.upload_file(repo_id=repo, path_or_fileobj=b"file", path_in_repo="a")
    with pytest.raises(HfHubHTTPError, match="'a' would be a file and a folder"):
        client.upload_file(repo_id=repo, path_or_fileobj=b"file", path_in_repo="a/b")
    operations = [CommitOperationDelete("a"), CommitOperationAdd("a/b", b"file")]
    client.create_commit(repo, operations, commit_message="folder")
    assert client.list_repo_files(repo) == ["a/b"]


@pytest.mark.parametrize(
    ("method", "address", "status", "code"),
    [
        ("GET", "/api/models/someone/nothing", 404, "RepoNotFound"),
        ("GET", "/api/models/gpt2", 404, "RepoNotFound"),
        ("GET", "/someone/nothing/resolve/main/x", 404, "RepoNotFound"),
        ("GET", "/api/models/{repo}/revision/no", 404, "RevisionNotFound"),
        ("GET", "/{repo}/resolve/main/no.txt", 404, "EntryNotFound"),
        ("GET", "/api/models/{repo}/tree/main/no", 404, "EntryNotFound"),
        ("DELETE", "/api/models/{repo}/tag/no", 404, "RevisionNotFound"),
        ("DELETE", "/api/models/{repo}/branch/main", 400, None),
        ("GET", "/gpt2/resolve/main/config.json", 404, "RepoNotFound"),
        ("GET", "/api/models/gpt2/tree/main", 404, "RepoNotFound"),
        ("GET", "/api/models/{repo}/discussions", 404, None),
        ("GET", "/api/nothing", 404, None),
        ("GET", "/api/models?cursor=WzFlOTk5LCAiYSJd", 400, None),
        ("GET", f"/api/models?cursor={HUGE_CURSOR}", 400, None),
        ("PATCH", "/api/models/{repo}", 405, None),
        ("GET", "/api/models?cursor=abc", 400, None),
        ("GET", "/api/models?limit=many", 400, None),
    ],
)
def test_refusals_have_the_codes_clients_know(
    local_hub: RunningHub, http: httpx.Client, method: str, address: str, status: int, code: str | None
) -> None:
    repo = local_hub.client().create_repo("someone/refusals", exist_ok=True).repo_id
    answer = http.request(method, address.format(repo=repo))
    assert (answer.status_code, answer.headers.get("x-error-code")) == (status, code), answer.text
    assert answer.json()["error"] == answer.headers["x-error-message"]


def test_missing_files_come_with_the_commit_so_that_clients_remember(local_hub: RunningHub, repo: str) -> None:
    answer = httpx.head(f"{local_hub.url}/{repo}/resolve/main/no.txt")
    assert answer.headers["x-repo-commit"] == local_hub.client().model_info(repo).sha


@pytest.mark.parametrize(
    "body",
    [{}, None, 5, [{}], {"visibility": "protected"}, {"private": "yes"}, {"private": True, "visibility": "public"}],
)
def test_a_private_repo_stays_so_unless_it_is_told_plainly(
    local_hub: RunningHub, http: httpx.Client, body: object
) -> None:
    client = local_hub.client()
    client.create_repo("someone/guarded", private=True, exist_ok=True)
    answer = http.put("/api/models/someone/guarded/settings", json=body)
    assert (answer.status_code, "is private or public" in answer.text) == (400, True)
    if isinstance(body, dict) and body:
        answer = http.post("/api/repos/create", json={"name": "unclear", "organization": "someone", **body})
        assert (answer.status_code, "is private or public" in answer.text) == (400, True)
    assert client.model_info("someone/guarded").private
    assert not client.repo_exists("someone/unclear")


def test_a_squashed_branch_has_one_commit_and_all_files(local_hub: RunningHub, repo: str) -> None:
    client = local_hub.client()
    for number in range(3):
        client.upload_file(repo_id=repo, path_or_fileobj=b"%d" % number, path_in_repo=f"{number}.txt")
    client.super_squash_history(repo, commit_message="all in one")
    assert [commit.title for commit in client.list_repo_commits(repo)] == ["all in one"]
    assert len(client.list_repo_files(repo)) == 3


def test_what_a_squash_forgets_is_gone(local_hub: RunningHub, repo: str, http: httpx.Client) -> None:
    """Commits that a tag or another branch reaches stay, and so do their files."""
    client, large_one = local_hub.client(), os.urandom(1_200_000)

    def commit(name: str, data: bytes, branch: str = "main") -> str:
        return client.upload_file(repo_id=repo, path_or_fileobj=data, path_in_repo=name, revision=branch).oid

    tagged = commit("tagged.txt", b"tagged")
    client.create_tag(repo, tag="v1")
    secret = commit("secret.bin", large_one)
    client.create_branch(repo, branch="other")
    other = commit("other.txt", b"other", "other")
    client.delete_file("secret.bin", repo)
    client.delete_file("secret.bin", repo, revision="other")
    client.super_squash_history(repo, branch="main")
    assert http.get(f"/{repo}/resolve/{secret}/secret.bin").status_code == 200, "the other branch came by there"

    client.super_squash_history(repo, branch="other")
    for forgotten in (secret, other):
        assert http.get(f"/{repo}/resolve/{forgotten}/secret.bin").headers["x-error-code"] == "RevisionNotFound"
    assert http.get(f"/{repo}/resolve/{tagged}/tagged.txt").text == "tagged"
    assert http.get(f"/{repo}/resolve/other/other.txt").text == "other"
    client.create_branch(repo, branch="given-up")
    given_up = commit("given-up.txt", b"given up", "given-up")
    client.delete_branch(repo, branch="given-up")
    assert http.get(f"/{repo}/resolve/{given_up}/given-up.txt").text == "given up", "it may have been a mistake"
    clean(local_hub.storage, timedelta(seconds=-1))
    assert http.get(f"/{repo}/resolve/{given_up}/given-up.txt").status_code == 404
    assert local_hub.storage.files.size(sha256(large_one)) is None
    assert http.get(f"/{repo}/resolve/v1/tagged.txt").text == "tagged"


def test_squashes_between_commits_lose_none_of_them(local_hub: RunningHub, repo: str, tmp_path: Path) -> None:
    def change(number: int) -> None:
        client = local_hub.client()
        if number % 4:
            client.upload_file(repo_id=repo, path_or_fileobj=b"%d" % number, path_in_repo=f"{number}.txt")
        else:
            client.super_squash_history(repo)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(24)))
    client = local_hub.client()
    client.super_squash_history(repo)
    clean(local_hub.storage, timedelta(seconds=-1))
    kept = Path(client.snapshot_download(repo, cache_dir=tmp_path))
    assert {path.name: path.read_text() for path in kept.iterdir()} == {f"{n}.txt": str(n) for n in range(24) if n % 4}


def test_who_reads_a_branch_while_it_is_squashed_sees_it_whole(tmp_path: Path, monkeypatch) -> None:
    storage = Storage(tmp_path)
    storage.repos.create(repo_id("models", "someone/busy"), private=False, author="someone")
    key = storage.repos.find(repo_id("models", "someone/busy"), ANYBODY).key
    history, commit = storage.history, History.commit

    def squash() -> None:
        history.squash(key, "main", "all in one", "someone")
        clean(storage, timedelta(seconds=-1))

    def squashed_just_before(self: History, key: int, commit_id: str) -> Commit:
        monkeypatch.undo()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(squash).result()
        return commit(self, key, commit_id)

    monkeypatch.setattr(History, "commit", squashed_just_before)
    found, tree = history.at(key, "main")
    assert (found.title, dict(tree)) == ("initial commit", {})
    storage.close()


def test_a_file_that_a_private_repo_has_is_not_given_away_by_its_hash(tmp_path: Path) -> None:
    data = os.urandom(1_200_000)
    with running_hub(tmp_path) as hub:
        mia = hub.storage.accounts.create_token("mia")
        bob = hub.storage.accounts.create_token("bob")
        hub.client(mia).create_repo("mia/secret", private=True)
        with hub.web(mia) as http:
            send_lfs(http, "mia/secret", data)
        hub.client(mia).upload_file(repo_id="mia/secret", path_or_fileobj=data, path_in_repo="w.bin")
        hub.client(bob).create_repo("bob/thief")
        with hub.web(bob) as http:
            taken = http.post("/api/models/bob/thief/commit/main", content=commit_lines(large("w.bin", data)))
            assert (taken.status_code, "was not uploaded" in taken.text) == (422, True)
            offered = lfs_link(http, "bob/thief", data)["actions"]
            assert http.post(offered["verify"]["href"]).status_code == 404, "nor is it told that somebody has it"
            send_lfs(http, "bob/thief", data)
            assert http.post("/api/models/bob/thief/commit/main", content=commit_lines(large("w.bin", data))).is_success
