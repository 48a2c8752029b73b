"""Copies of hubs: the same history, brought up to date again and again, whatever happened to source or copy."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_cases import RunningHub, running_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from loramux.cli import main
from loramux.hub.mirror import Mirrored, mirror
from loramux.hub.remote import Remote
from loramux.support.errors import RemoteError, RunError

REPO = "mia/adapter"


@pytest.fixture
def hubs(tmp_path: Path) -> Iterator[list[RunningHub]]:
    with running_hub(tmp_path / "one") as one, running_hub(tmp_path / "two") as two:
        yield [one, two]


def copy(source: RunningHub, target: RunningHub, **options: str) -> Mirrored:
    return mirror(Remote(source.url, False), Remote(target.url, False), **options)


def commit(hub: RunningHub, *deleted: str, revision: str = "main", **files: str) -> str:
    operations = [
        *(CommitOperationDelete(name) for name in deleted),
        *(CommitOperationAdd(name, text.encode()) for name, text in files.items()),
    ]
    hub.client().create_repo(REPO, exist_ok=True)
    return hub.client().create_commit(REPO, operations, commit_message="change", revision=revision).oid


def contents(hub: RunningHub, revision: str = "main") -> dict[str, str]:
    listed = hub.client().list_repo_files(REPO, revision=revision)
    return {name: Path(hub.client().hf_hub_download(REPO, name, revision=revision)).read_text() for name in listed}


def state(client: HfApi) -> dict[str, object]:
    """Files by hash and titles of each revision."""
    return {
        revision: (
            {(file.path, file.blob_id) for file in client.list_repo_tree(REPO, revision=revision)},
            [commit.title for commit in client.list_repo_commits(REPO, revision=revision)],
        )
        for revision in ("main", "v1", "trial")
    }


def test_a_mirror_has_the_same_history_and_goes_on_where_it_stopped(hubs: list[RunningHub]) -> None:
    source, target = (hub.client() for hub in hubs)
    source.create_repo(REPO, private=True)
    source.create_repo("mia/data", repo_type="dataset")
    source.upload_file(repo_id="mia/data", repo_type="dataset", path_or_fileobj=b"{}", path_in_repo="a.json")
    commit(hubs[0], first="1")
    source.upload_file(repo_id=REPO, path_or_fileobj=os.urandom(1_200_000), path_in_repo="w.safetensors")
    source.create_tag(REPO, tag="v1")
    source.create_branch(REPO, branch="trial")
    commit(hubs[0], t="t", revision="trial")
    commit(hubs[0], "first")

    assert copy(*hubs).commits == 5
    assert copy(*hubs).commits == 0
    assert state(target) == state(source)
    assert target.list_repo_files("mia/data", repo_type="dataset") == ["a.json"]
    assert target.model_info(REPO).private

    commit(hubs[0], second="2")
    done = copy(*hubs, only=REPO, author="mia")
    assert (done.repos, done.commits, done.failed) == (1, 1, {})
    assert state(target) == state(source)


def test_a_copy_becomes_private_with_its_source_and_public_by_nobody_but_its_owner(hubs: list[RunningHub]) -> None:
    source, target = (hub.client() for hub in hubs)
    commit(hubs[0], a="a")
    copy(*hubs)
    source.update_repo_settings(REPO, private=True)
    commit(hubs[0], b="secret")
    copy(*hubs)
    assert target.model_info(REPO).private
    source.update_repo_settings(REPO, private=False)
    copy(*hubs)
    assert target.model_info(REPO).private


def test_a_mirror_of_a_mirror_goes_on_where_it_stopped_too(hubs: list[RunningHub], tmp_path: Path) -> None:
    with running_hub(tmp_path / "three") as third:
        commit(hubs[0], w="v1")
        commit(hubs[0], w="v2")
        copy(*hubs)
        assert copy(hubs[1], third).commits == 2
        assert copy(hubs[1], third).commits == 0
        assert contents(third) == {"w": "v2"}


def test_files_that_a_squashed_history_does_not_have_leave_the_copy(hubs: list[RunningHub]) -> None:
    commit(hubs[0], one="1", secret="s")
    copy(*hubs)
    commit(hubs[0], "one", two="2")
    hubs[0].client().super_squash_history(REPO)
    assert copy(*hubs).commits == 1
    assert contents(hubs[1]) == contents(hubs[0]) == {"secret": "s", "two": "2"}
    assert copy(*hubs).commits == 0


def test_a_branch_that_was_made_anew_elsewhere_is_followed(hubs: list[RunningHub]) -> None:
    client = hubs[0].client()
    early = commit(hubs[0], a="a")
    client.create_branch(REPO, branch="trial")
    commit(hubs[0], b="b", revision="trial")
    copy(*hubs)
    client.delete_branch(REPO, branch="trial")
    client.create_branch(REPO, branch="trial", revision=early)
    assert copy(*hubs).commits == 1
    assert contents(hubs[1], "trial") == {"a": "a"}
    assert copy(*hubs).commits == 0


def test_what_the_owner_of_the_copy_added_stays(hubs: list[RunningHub]) -> None:
    commit(hubs[0], a="a")
    copy(*hubs)
    commit(hubs[1], notes="mine")
    commit(hubs[0], a="b")
    copy(*hubs)
    assert contents(hubs[1]) == {"a": "b", "notes": "mine"}


def test_tags_on_commits_that_no_branch_reaches_are_told(hubs: list[RunningHub]) -> None:
    commit(hubs[0], a="a")
    hubs[0].client().create_tag(REPO, tag="v1")
    commit(hubs[0], b="b")
    hubs[0].client().super_squash_history(REPO)
    done = copy(*hubs)
    assert done.failed == {REPO: "copied but for its tags v1: they are on commits that no branch reaches"}
    assert contents(hubs[1]) == {"a": "a", "b": "b"}


def test_a_mirror_tells_what_it_could_not_copy(hubs: list[RunningHub], capsys: pytest.CaptureFixture[str]) -> None:
    hubs[0].client().create_repo(REPO)
    hubs[1].storage.accounts.create_token("bob")
    assert main(["hub", "mirror", hubs[0].url, hubs[1].url]) == 2
    told = capsys.readouterr()
    assert "not copied: mia/adapter; the same command goes on" in told.err
    assert f"model mia/adapter: mia/adapter: {hubs[1].url} says: " in told.out
    with pytest.raises(RunError, match="no repo 'mia/other' that this token may see"):
        copy(*hubs, only="mia/other")
    with pytest.raises(RemoteError, match=r"the list of repositories: http://.* says: .*401"):
        mirror(Remote(hubs[1].url, "hf_wrong"), Remote(hubs[0].url, False))


def test_a_hub_that_cannot_be_reached(hubs: list[RunningHub], capsys: pytest.CaptureFixture[str]) -> None:
    commit(hubs[0], a="a")
    dead = "http://127.0.0.1:9"
    assert main(["hub", "mirror", hubs[0].url, dead]) == 2
    assert f"model mia/adapter: {dead} cannot be reached" in capsys.readouterr().out


def test_a_hub_hears_no_token_but_the_one_that_is_named_for_it(
    hubs: list[RunningHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(hubs[0], a="a")
    token = hubs[1].storage.accounts.create_token("mia")
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["hub", "mirror", hubs[0].url, hubs[1].url]) == 2, "the user's own token went to a hub"
    (tmp_path / "token").write_text(f"{token}\n")
    assert main(["hub", "mirror", hubs[0].url, hubs[1].url, "--target-token-file", str(tmp_path / "token")]) == 0


def test_a_token_file_without_a_token_is_refused_before_any_hub_is_asked(tmp_path: Path, capsys) -> None:
    (tmp_path / "token").write_text("\n")
    nowhere = ["http://127.0.0.1:9", "http://127.0.0.1:9"]
    assert main(["hub", "mirror", *nowhere, "--source-token-file", str(tmp_path / "token")]) == 2
    assert f"{tmp_path / 'token'}: holds no token" in capsys.readouterr().err
