"""What a hub does with input that is wrong, by mistake or on purpose: it says so, and keeps nothing of it."""

import contextlib
import http.client
import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from full_disk import files_limited_to
from hub_cases import RunningHub, running_hub
from hub_uploads import (
    SHARD_TAG,
    commit_lines,
    large,
    lfs_link,
    send_lfs,
    sha256,
    shard,
    small,
    words,
    xet_session,
    xorb,
)

from loramux.hub.server import HubError, Policy, Storage
from loramux.hub.server.files import Files, Incoming
from loramux.hub.server.links import Links
from loramux.hub.server.metadata import CardError, card_metadata
from loramux.hub.server.names import check_path, check_reference, repo_id
from loramux.support.errors import RunError

REPO = "someone/target"
COMMIT = f"/api/models/{REPO}/commit/main"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), Policy(inline_bytes=1 << 16)) as running:
        running.client().create_repo(REPO)
        yield running


@pytest.fixture
def web(hub: RunningHub) -> Iterator[httpx.Client]:
    """A client; after the test nothing may be left half received, and the repo must be as empty as before."""
    with hub.web() as client:
        yield client
    assert not any((hub.storage.root / "incoming").iterdir())
    assert hub.client().list_repo_files(REPO) == []


@pytest.mark.parametrize(
    "path",
    [
        *("../up", "a/../b", "/etc/passwd", "a//b", "./a", "a/.", "", ".git/config", "a/.GIT/hooks/x", "a\\b", "a\0b"),
        *("line\nbreak", "right\u202eleft", "C:/a", "x" * 300, "a/" * 600 + "b"),
    ],
)
def test_paths_that_could_mean_another_file_are_refused(web: httpx.Client, path: str) -> None:
    answer = web.post(COMMIT, content=commit_lines(small(path, b"evil")))
    assert answer.status_code == 400
    assert "Invalid path" in answer.json()["error"]


def test_links_cannot_be_uploaded_and_odd_names_stay_names(hub: RunningHub, tmp_path: Path) -> None:
    """A commit has files only: for a link clients send what it leads to. Names never reach the hub's disk."""
    client = hub.client()
    (tmp_path / "link.txt").symlink_to("/etc/hostname")
    client.create_repo("someone/links")
    client.upload_folder(repo_id="someone/links", folder_path=tmp_path)
    assert client.list_repo_files("someone/links") == ["link.txt"]
    assert not any(path.is_symlink() for path in hub.storage.root.rglob("*"))
    for odd in ("~", "$HOME", "%2e%2e", "CON", "…"):
        client.upload_file(repo_id="someone/links", path_or_fileobj=odd.encode(), path_in_repo=odd)
        assert Path(client.hf_hub_download("someone/links", odd, cache_dir=tmp_path / "cache")).read_text() == odd


@pytest.mark.parametrize("name", ["a--b", "a..b", ".a", "a.", "-a", "a-", "a.git", "a b", "a\0", "x" * 97, "ä", ""])
def test_names_that_the_hub_would_not_take_are_refused(web: httpx.Client, name: str) -> None:
    answer = web.post("/api/repos/create", json={"name": name, "organization": "someone"})
    assert answer.status_code == 400
    assert "Invalid repo name" in answer.json()["error"]
    answer = web.post("/api/repos/create", json={"name": "good", "organization": name or ".."})
    assert "Invalid namespace" in answer.json()["error"]


def test_names_are_taken_apart_after_the_path_is(web: httpx.Client, hub: RunningHub) -> None:
    """No quoting makes one part of an address into two, or leads out of the hub's folder."""
    for path in (
        "/..%2f..%2fetc/passwd/resolve/main/x",
        f"/{REPO}/resolve/main/..%2f..%2fhub.sqlite",
        "/%00/%00",
        "/%ff/x",
    ):
        connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
        connection.request("GET", path)
        assert connection.getresponse().status in (400, 404)
        connection.close()


@pytest.mark.parametrize("name", ["..", "a/../b", "a..b", "/a", "a/", "a.lock", "a b", "@{", "a" * 40, "x" * 300, "-"])
def test_branches_and_tags_have_plain_names(web: httpx.Client, name: str) -> None:
    answer = web.post(f"/api/models/{REPO}/tag/main", json={"tag": name})
    assert answer.status_code == 400
    assert "Invalid branch or tag" in answer.json()["error"]


def test_the_wrong_content_is_refused(web: httpx.Client, hub: RunningHub) -> None:
    data = os.urandom(100_000)
    link = lfs_link(web, REPO, data)["actions"]["upload"]["href"]
    answer = web.put(link, content=data[::-1])
    assert answer.status_code == 400
    assert "Content does not match: announced sha256" in answer.json()["error"]
    assert web.put(link, content=data + b"more").status_code == 413
    assert web.put(link, content=data[:-1]).status_code == 400
    assert hub.storage.files.size(sha256(data)) is None
    answer = web.post(COMMIT, content=commit_lines(large("w.bin", data)))
    assert (answer.status_code, "was not uploaded" in answer.text) == (422, True)


@pytest.mark.parametrize("what", ["file", "commit"])
def test_a_body_that_is_cut_off_leaves_nothing(web: httpx.Client, hub: RunningHub, what: str) -> None:
    data = os.urandom(3_000_000)
    address = COMMIT if what == "commit" else lfs_link(web, REPO, data)["actions"]["upload"]["href"]
    body = commit_lines(small("a.txt", b"a"), small("b.txt", b"b")) if what == "commit" else data
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
    connection.putrequest("PUT" if what == "file" else "POST", f"{parts.path}?{parts.query}")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[: len(body) // 2])
    connection.close()
    assert web.get("/api/models").is_success  # the hub goes on
    assert hub.storage.files.size(sha256(data)) is None


def test_links_are_for_one_object_and_one_purpose_and_expire(web: httpx.Client, hub: RunningHub) -> None:
    data, other = os.urandom(100_000), os.urandom(100_000)
    actions = lfs_link(web, REPO, data)["actions"]
    query = urlsplit(actions["upload"]["href"]).query
    for address in (
        f"/_lfs/{sha256(other)}/{len(other)}",
        f"/_lfs/{sha256(data)}/5",
        f"/_lfs/{sha256(data)}/{len(data)}/verify",
    ):
        method, body = ("POST", b"") if address.endswith("verify") else ("PUT", other)
        answer = web.request(method, f"{address}?{query}", content=body)
        assert (answer.status_code, "for something else" in answer.text) == (403, True)
    assert web.put(f"/_lfs/{sha256(data)}/{len(data)}", content=data).status_code == 403
    assert web.put(actions["upload"]["href"].replace("user=local", "user=mia"), content=data).status_code == 403
    assert web.put(actions["upload"]["href"].replace("expires=1", "expires=9"), content=data).status_code == 403
    expired = Links(hub.storage.secret(), -1).sign(f"/_lfs/{sha256(data)}/{len(data)}", "local")
    assert "has expired" in web.put(expired, content=data).json()["error"]
    assert hub.storage.files.size(sha256(data)) is None


def test_a_link_that_is_used_again_changes_nothing(web: httpx.Client, hub: RunningHub) -> None:
    data = os.urandom(100_000)
    link = lfs_link(web, REPO, data)["actions"]["upload"]["href"]
    assert web.put(link, content=data).status_code == 200
    assert web.put(link, content=data).status_code == 200
    assert web.put(link, content=bytes(100_000)).status_code == 400
    assert hub.storage.files.path(sha256(data)).read_bytes() == data


def test_a_part_that_comes_late_cannot_change_a_file_that_is_whole(tmp_path: Path) -> None:
    """Its request was open before the others were complete, and its body stalled."""
    files, data = Files(tmp_path), os.urandom(1000)
    with files.open_partial("upload").writer_at(0) as stalled:
        with files.open_partial("upload").writer_at(0) as writer:
            writer.write_all([data])
        partial = files.open_partial("upload")
        with partial.closed():
            partial.keep(sha256(data), len(data))
        with pytest.raises(HubError, match="complete already") as caught:
            stalled.write_all([bytes(1000)])
    assert caught.value.status == 409
    assert files.path(sha256(data)).read_bytes() == data


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"a":' * 100_000, 400, "nested too deeply"),
        (b"1" * 100_000, 400, "not JSON"),
        (b'{"name": "' + b"x" * 5_000_000 + b'"}', 413, "larger than"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"", 400, "must have 'name'"),
        (b'{"name": {"a": 1}}', 400, "must have 'name'"),
        (b"[]", 400, "must have 'name'"),
        (b'{"name": "\\ud800"}', 400, "not JSON"),
    ],
)
def test_json_bombs(web: httpx.Client, body: bytes, status: int, message: str) -> None:
    answer = web.post("/api/repos/create", content=body)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


def test_compressed_bodies_are_not_unpacked(web: httpx.Client) -> None:
    answer = web.post("/api/repos/create", content=b"zip bomb", headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, "Compressed bodies" in answer.text) == (415, True)


@pytest.mark.parametrize(
    ("lines", "status", "message"),
    [
        ([b'{"key": "file"}'], 400, "is not an object"),
        ([b'{"key": "explode", "value": {"path": "a"}}'], 400, "Unknown operation 'explode'"),
        ([b'{"key": "file", "value": {"path": "a"}}'], 400, "'content' is missing"),
        ([b'{"key": "file", "value": {"path": "a", "content": "?", "encoding": "base64"}}'], 400, "not base64"),
        ([b'{"key": "lfsFile", "value": {"path": "a", "oid": "../../x"}}'], 400, "Invalid oid"),
        ([b'{"key": "deletedFile", "value": {"path": "a"}}'], 404, "no file 'a'"),
        ([b'{"key": "deletedFolder", "value": {"path": "a/"}}'], 404, "no folder 'a'"),
        ([b'{"key": "file", "value": {"path": "a", "content": "' + b"x" * 400_000 + b'"}}'], 413, "A line of the body"),
        ([b"not json"], 400, "not JSON"),
        ([b'{"key": "header", "value": {"summary": "\\ud800"}}'], 400, "not JSON"),
    ],
)
def test_commits_that_make_no_sense(
    web: httpx.Client, hub: RunningHub, lines: list[bytes], status: int, message: str
) -> None:
    good = json.dumps({"key": "file", "value": {"path": "good.txt", "content": "x"}}).encode()
    answer = web.post(COMMIT, content=b"\n".join([good, *lines]))
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
    assert hub.storage.history.content(sha256(b"x")) is None, "the good file before it is not kept"


def test_pull_requests_are_refused_by_name(web: httpx.Client) -> None:
    answer = web.post(f"{COMMIT}?create_pr=1", content=commit_lines(small("a", b"a")))
    assert "no pull requests" in answer.json()["error"]


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("a: &a [1]\nb: [*a, *a]", "aliases"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper"),
        ("a: " + "x" * 300_000, "larger than"),
        ("- a\n- b", "not a mapping"),
        ("a: [", "expected"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!timestamp nonsense", "groupdict"),
    ],
)
def test_cards_that_would_harm_their_readers(front: str, message: str) -> None:
    text = f"---\n{front}\n---\n"
    with pytest.raises(CardError, match=message):
        card_metadata(text)


def test_a_card_is_plain_data_whatever_yaml_makes_of_it() -> None:
    card = card_metadata("---\na: .nan\nb: 2024-01-01\n3: [yes, {c: !!set {x}}]\n---\n# Text")
    assert card == {"a": None, "b": "2024-01-01", "3": [True, {"c": ["x"]}]}
    assert card_metadata("no metadata") == {}


def test_a_harmful_card_does_not_stop_its_repo(hub: RunningHub) -> None:
    client = hub.client()
    client.create_repo("someone/harmful")
    with hub.web() as web:
        body = commit_lines(
            small("README.md", b"---\na: &a [1]\nb: *a\n---\n"), small("adapter_config.json", b"[" * 9999)
        )
        assert web.post("/api/models/someone/harmful/commit/main", content=body).is_success
        refused = web.post("/api/validate-yaml", json={"content": "---\na: &a [1]\nb: *a\n---\n"})
    assert refused.status_code == 400
    assert "aliases" in refused.json()["errors"][0]["message"]
    assert client.model_info("someone/harmful").card_data is None


def test_text_that_is_no_unicode_and_endless_numbers_never_reach_a_listing(hub: RunningHub) -> None:
    client = hub.client()
    client.create_repo("someone/poison_")
    config = (
        b'{"peft_type": "LORA", "task_type": "\\ud800", "base_model_name_or_path": "\\udfff", "\\ud800": 1, "r": 1e999}'
    )
    card = b"---\nlicense: mit\na: 0x" + b"f" * 5000 + b"\n---\n"
    with hub.web() as web:
        body = commit_lines(small("adapter_config.json", config), small("README.md", card))
        assert web.post("/api/models/someone/poison_/commit/main", content=body).is_success
        for address in ("/api/models", "/api/models?filter=peft&full=1", "/_page/models/someone/poison_"):
            assert web.get(address).status_code == 200
    info = client.model_info("someone/poison_")
    assert info.config == {"peft": {"peft_type": "LORA"}}
    assert info.card_data.to_dict() == {"license": "mit"}


def test_good_and_bad_xet_uploads(web: httpx.Client, hub: RunningHub) -> None:
    """The one good upload goes last: each bad one before it differs from it in one thing."""
    name, data = "cd" * 32, os.urandom(90_000)
    chunks = [data[:50_000], data[50_000:]]
    good = shard(name, len(data), 2, sha256(data))

    def send(body: bytes, describes: bytes, headers: dict[str, str] | None = None) -> tuple[int, str]:
        address, right = xet_session(web, REPO)
        answer = web.post(f"{address}/v1/xorbs/default/{name}", content=body, headers=headers or right)
        if answer.is_success:
            answer = web.post(f"{address}/v1/shards", content=describes, headers=headers or right)
        return answer.status_code, answer.text

    plain = xorb(*chunks)
    bad = [
        (plain, shard("ef" * 32, len(data), 2, sha256(data)), "was not uploaded with it"),
        (plain, shard(name, len(data), 2, "00" * 32), "Content does not match"),
        (plain, shard(name, len(data) + 1, 2, sha256(data)), f"has {len(data)} bytes, not {len(data) + 1}"),
        (plain, good[:-60], "Malformed shard: it is cut short"),
        (plain, b"nonsense" * 100, "Malformed shard: it does not start"),
        (plain[:-5], good, "last chunk is cut short"),
        (b"\x07" + plain, good, "a header that no chunk has"),
        (xorb(*chunks, scheme=1), good, "Malformed chunk"),
        (xorb(*chunks, scheme=9), good, "Unknown chunk compression 9"),
        (xorb(*chunks, raw_sizes=[50_000, 39_999]), good, "A chunk has 40000 bytes, not 39999"),
    ]
    for body, describes, message in bad:
        status, text = send(body, describes)
        assert (status, message in text) == (400, True), text
        assert hub.storage.files.size(sha256(data)) is None
    assert send(plain, good, {"Authorization": "Bearer 1.2.local"})[0] == 401
    assert send(plain, good)[0] == 200
    assert hub.storage.files.path(sha256(data)).read_bytes() == data
    assert send(plain, good)[0] == 200, "the client did not hear of it and sends it again"
    assert not any((hub.storage.root / "xorbs").glob("*/" + "ef" * 32))


def test_xet_chunks_do_not_unpack_to_more_than_they_say(web: httpx.Client) -> None:
    import lz4.frame

    bomb = lz4.frame.compress(bytes(50_000_000))
    address, right = xet_session(web, REPO)
    sent = web.post(f"{address}/v1/xorbs/default/{'cd' * 32}", content=xorb(bomb, raw_sizes=[1000]), headers=right)
    assert sent.status_code == 200
    answer = web.post(f"{address}/v1/shards", content=shard("cd" * 32, 1000, 1, "00" * 32), headers=right)
    assert "bytes, not 1000" in answer.json()["error"]


def test_xet_segments_write_no_more_than_they_say(web: httpx.Client, hub: RunningHub) -> None:
    written: list[int] = []

    class Watched(Incoming):
        def write(self, data: bytes) -> None:
            written.append(len(data))
            super().write(data)

    with pytest.MonkeyPatch.context() as patch:
        address, right = xet_session(web, REPO)
        web.post(f"{address}/v1/xorbs/default/{'cd' * 32}", content=xorb(*[bytes(1000)] * 50), headers=right)
        patch.setattr("loramux.hub.server.files.Incoming", Watched)
        describes = shard("cd" * 32, 2500, 50, "00" * 32)
        answer = web.post(f"{address}/v1/shards", content=describes, headers=right)
    assert (answer.status_code, "has more than 2500 bytes" in answer.text) == (400, True)
    assert sum(size for size in written if size == 1000) == 2000
    many = SHARD_TAG + words("ab" * 32) + struct.pack("<II", 0, 1 << 20) + bytes(8)
    answer = web.post(f"{address}/v1/shards", content=many, headers=right)
    assert (answer.status_code, "A file in 1048576 segments" in answer.text) == (413, True)


def test_xet_addresses_and_tokens_of_others_are_refused(tmp_path: Path) -> None:
    links = Links(b"secret", 60)
    token, expires = links.token("mia")
    assert links.check_token(token) == "mia"
    links.check_session(links.session("mia"), "mia")
    with pytest.raises(HubError, match="not given to you"):
        links.check_session(links.session("bob"), "mia")
    for wrong in (token.replace("mia", "bob"), token.replace(str(expires), str(expires + 9)), "", "1", "1.2.3"):
        with pytest.raises(HubError, match="Invalid or expired Xet token"):
            links.check_token(wrong)
    with pytest.raises(HubError, match="Invalid or expired"):
        links.check_token(Links(b"secret", -1).token("mia")[0])


def test_files_larger_than_the_hub_takes(tmp_path: Path) -> None:
    with (
        running_hub(tmp_path, Policy(inline_bytes=10, max_file_bytes=1000)) as hub,
        hub.web() as web,
    ):
        hub.client().create_repo(REPO)
        assert "larger than this hub takes" in lfs_link(web, REPO, bytes(1001))["error"]["message"]
        address, right = xet_session(web, REPO)
        answer = web.post(f"{address}/v1/shards", content=shard("cd" * 32, 1001, 1, "00" * 32), headers=right)
        assert (answer.status_code, "larger than this hub takes" in answer.text) == (413, True)


def test_a_full_disk_is_told_and_leaves_the_last_state(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub, hub.web() as web:
        client, data = hub.client(), os.urandom(3_000_000)
        client.create_repo(REPO)
        client.upload_file(repo_id=REPO, path_or_fileobj=b"before", path_in_repo="a.txt")
        link = lfs_link(web, REPO, data)["actions"]["upload"]["href"]
        address, right = xet_session(web, REPO)
        full = commit_lines(*(small(f"{number}.bin", os.urandom(900_000)) for number in range(6)))
        with files_limited_to(1_000_000):
            answers = [
                web.put(link, content=data),
                web.post(COMMIT, content=full),
                web.post(
                    f"{address}/v1/xorbs/default/{'cd' * 32}", content=xorb(*[bytes(100_000)] * 30), headers=right
                ),
            ]
        # Xet clients would try again for minutes after a 507.
        assert [answer.status_code for answer in answers] == [507, 507, 413], [answer.text for answer in answers]
        assert all("disk is full" in answer.json()["error"] for answer in answers)
        assert not any((hub.storage.root / "incoming").iterdir())
        assert client.list_repo_files(REPO) == ["a.txt"]
        assert web.put(link, content=data).status_code == 200
        assert web.post(COMMIT, content=full).status_code == 200
        assert len(client.list_repo_files(REPO)) == 7


def test_files_that_cannot_fit_are_refused_before_they_are_sent(web: httpx.Client) -> None:
    files = [{"path": "w.bin", "size": 1 << 60, "sample": ""}]
    answer = web.post(f"/api/models/{REPO}/preupload/main", json={"files": files})
    assert (answer.status_code, "bytes left, and these files have" in answer.text) == (507, True)


def test_uploads_that_were_given_up_are_swept_up_in_time(hub: RunningHub) -> None:
    storage, xet = hub.storage, hub.hub.xet
    partial = storage.root / "incoming" / "given-up.parts"
    session = storage.root / "xorbs" / "given-up"
    partial.touch()
    session.mkdir()
    storage.files.sweep(60)
    xet.sweep(60)
    assert partial.exists()
    assert session.exists()
    for path in (partial, session):
        os.utime(path, (0, 0))
    storage.files.sweep(60)
    xet.sweep(60)
    assert not partial.exists()
    assert not session.exists()


def test_pages_of_other_sites_cannot_use_the_browser(web: httpx.Client, hub: RunningHub) -> None:
    body = {"name": "planted", "organization": "someone"}
    answer = web.post("/api/repos/create", json=body, headers={"Origin": "https://evil.example"})
    assert (answer.status_code, "may not change this hub" in answer.text) == (403, True)
    for wrong in ("http://[", "null"):
        assert web.post("/api/repos/create", json=body, headers={"Origin": wrong}).status_code == 403
    rebound = web.get("/api/models", headers={"Host": "evil.example"})
    assert (rebound.status_code, "answers on this machine only" in rebound.text) == (403, True)
    assert web.post("/api/validate-yaml", json={"content": ""}, headers={"Origin": hub.url}).is_success


def test_files_are_not_shown_as_pages(hub: RunningHub) -> None:
    client = hub.client()
    client.create_repo("someone/page")
    for name in ("evil.html", "evil.svg"):
        client.upload_file(repo_id="someone/page", path_or_fileobj=b"<script>1</script>", path_in_repo=name)
        answer = httpx.get(f"{hub.url}/someone/page/resolve/main/{name}")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]


def test_what_fails_inside_is_told_without_its_insides(hub: RunningHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(hub.storage.repos, "list", fail)
    answer = httpx.get(f"{hub.url}/api/models")
    assert answer.status_code == 500
    assert answer.json()["error"] == "The hub failed at this request (KeyError); its log says more."


def test_names_by_themselves() -> None:
    assert str(repo_id("models", "HuggingFaceTB/SmolLM2-135M")) == "HuggingFaceTB/SmolLM2-135M"
    assert repo_id("datasets", "a/b").page == "/datasets/a/b"
    assert repo_id("models", "a_/_model_").name == "_model_"
    with pytest.raises(HubError, match="no '_' first"):  # as `/_page` and `/_lfs` are the hub's own
        repo_id("models", "_page/hub.js")
    assert check_path("a/b c/ü.txt") == "a/b c/ü.txt"
    assert check_reference("refs/heads/feat/x+1") == "refs/heads/feat/x+1"
    with pytest.raises(HubError, match="Invalid repo type 'cats'"):
        repo_id("cats", "a/b")


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    first, second = Storage(tmp_path), Storage(tmp_path)
    first.lock()
    with pytest.raises(RunError, match="another `loramux hub serve` has this folder"):
        second.lock()
    first.close()
    second.close()


def test_a_file_is_no_place_for_a_hub(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match="a file lies there; a hub needs a folder of its own"):
            Storage(root)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        hub.client().create_repo(REPO)

    def version(set_to: int | None = None) -> int:
        with contextlib.closing(sqlite3.connect(tmp_path / "hub.sqlite")) as connection:
            if set_to is not None:
                connection.execute(f"PRAGMA user_version = {set_to}")
            return connection.execute("PRAGMA user_version").fetchone()[0]

    assert version() == 1
    version(set_to=0)  # from before there were versions
    with running_hub(tmp_path) as hub:
        assert hub.client().repo_exists(REPO)
    assert version() == 1
    version(set_to=7)
    with pytest.raises(RunError, match="a hub of version 7; this loramux knows versions up to 1"):
        Storage(tmp_path)


def test_sending_again_what_is_there_costs_nothing(hub: RunningHub, web: httpx.Client) -> None:
    data = os.urandom(100_000)
    send_lfs(web, REPO, data)
    assert "actions" not in lfs_link(web, REPO, data)
