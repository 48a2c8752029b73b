"""What the stock client does with a hub, step by step. `hub_matrix.py` and a test run it, each in a fresh process.

    HF_ENDPOINT=http://127.0.0.1:8000 HF_TOKEN=any python benchmarks/hub_client.py [MEGABYTES]

It needs nothing but huggingface_hub, of any version from 0.36 on, prints one JSON line and fails at the first surprise.
"""

import io
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CARD = "---\nlibrary_name: peft\nbase_model: tiny/base\ntags: [lora, task:sst2]\nlicense: mit\n---\n# An adapter\n"


def write_safetensors(path: Path, megabytes: float) -> None:
    """A valid file of random weights, without safetensors itself."""
    count = int(megabytes * 2**20) // 4
    header = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(4 * count))


def refused(kind: type[HfHubHTTPError], call: Callable[[], object], status: int | None = None) -> None:
    """The call must fail so. (The clients' environments have no pytest.)"""
    found = None
    try:
        call()
    except kind as error:
        found = error
    assert found is not None, f"{kind.__name__} was expected"
    assert status in (None, found.response.status_code), found


class Client:
    """One run through everything; every step leaves the repo for the next."""

    def __init__(self, folder: Path, megabytes: float) -> None:
        self.api, self.folder, self.megabytes = HfApi(), folder, megabytes
        self.source, self.cache = folder / "source", str(folder / "cache")
        self.repo = "someone/adapter-a"
        self.times: dict[str, float] = {}

    def create(self) -> None:
        assert self.api.whoami()["name"]
        assert self.api.create_repo(self.repo, exist_ok=True).repo_id == self.repo
        assert self.api.create_repo(self.repo, exist_ok=True).repo_id == self.repo
        refused(HfHubHTTPError, lambda: self.api.create_repo(self.repo), 409)

    def upload_folder(self) -> None:
        (self.source / "sub").mkdir(parents=True)
        write_safetensors(self.source / "adapter_model.safetensors", self.megabytes)
        (self.source / "README.md").write_text(CARD)
        (self.source / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny/base", "r": 8}')
        (self.source / "sub" / "note.txt").write_text("note")
        (self.source / "empty.txt").write_text("")
        self.first = self.api.upload_folder(repo_id=self.repo, folder_path=str(self.source), commit_message="first").oid
        again = self.api.upload_folder(repo_id=self.repo, folder_path=str(self.source), commit_message="same")
        assert again.oid == self.first, "an unchanged upload made a commit"

    def list(self) -> None:
        info = self.api.model_info(self.repo, files_metadata=True)
        files = {path.relative_to(self.source).as_posix() for path in self.source.rglob("*") if path.is_file()}
        assert info.sha == self.first
        assert {file.rfilename for file in info.siblings} == files
        assert {"peft", "lora", "task:sst2", "base_model:adapter:tiny/base", "license:mit"} <= set(info.tags), info.tags
        assert info.card_data.library_name == "peft"
        found = [model.id for model in self.api.list_models(filter=["peft", "task:sst2"], author="someone")]
        assert found == [self.repo], found
        assert [model.id for model in self.api.list_models(search="ADAPTER-A", limit=1)] == [self.repo]
        assert not list(self.api.list_models(filter="nothing-has-this"))

    def snapshot_download(self) -> None:
        snapshot = Path(snapshot_download(self.repo, cache_dir=self.cache))
        assert snapshot.name == self.first
        for path in self.source.rglob("*"):
            if path.is_file():
                assert (snapshot / path.relative_to(self.source)).read_bytes() == path.read_bytes(), path
        local = snapshot_download(self.repo, local_dir=str(self.folder / "local"), allow_patterns="*.json")
        assert [path.name for path in Path(local).iterdir() if path.is_file()] == ["adapter_config.json"]

    def commit(self) -> None:
        config = self.source / "adapter_config.json"
        config.write_text('{"base_model_name_or_path": "tiny/base", "r": 16}')
        arguments = {"repo_id": self.repo, "path_in_repo": config.name, "parent_commit": self.first}
        self.api.upload_file(path_or_fileobj=str(config), **arguments)
        refused(HfHubHTTPError, lambda: self.api.upload_file(path_or_fileobj=b"late", **arguments), 412)
        self.api.create_commit(
            self.repo,
            [
                CommitOperationAdd("added.bin", b"\0" * 3_000_000),
                CommitOperationAdd("stream.bin", io.BytesIO(os.urandom(3_000_000))),
                CommitOperationCopy("adapter_model.safetensors", "copy.safetensors"),
                CommitOperationDelete("sub/"),
            ],
            commit_message="several at once",
        )
        files = set(self.api.list_repo_files(self.repo))
        assert {"added.bin", "stream.bin", "copy.safetensors"} <= files
        assert "sub/note.txt" not in files
        assert self.api.file_exists(self.repo, "copy.safetensors")
        assert not self.api.file_exists(self.repo, "no")

    def revisions(self) -> None:
        self.api.create_tag(self.repo, tag="v1", revision=self.first)
        self.api.create_branch(self.repo, branch="feat/x", revision="v1")
        self.api.create_branch(self.repo, branch="feat/x", exist_ok=True)
        self.api.upload_file(repo_id=self.repo, path_or_fileobj=b"here only", path_in_repo="b.txt", revision="feat/x")
        assert self._rank("v1") == 8
        assert self._rank("main") == 16
        assert self._rank("feat/x") == 8
        with open(self._fetch("b.txt", "feat/x")) as file:
            assert file.read() == "here only"
        refs = self.api.list_repo_refs(self.repo)
        assert {branch.name for branch in refs.branches} == {"main", "feat/x"}
        assert [tag.name for tag in refs.tags] == ["v1"]
        titles = [commit.title for commit in self.api.list_repo_commits(self.repo)]
        assert [titles[0], titles[-1]] == ["several at once", "initial commit"]
        self.api.delete_tag(self.repo, tag="v1")
        self.api.delete_branch(self.repo, branch="feat/x")
        assert not self.api.revision_exists(self.repo, "feat/x")

    def read_parts(self) -> None:
        files = HfFileSystem()
        with files.open(f"{self.repo}/adapter_model.safetensors", "rb") as file:
            file.seek(1 << 20)
            part = file.read(1000)
        assert part == (self.source / "adapter_model.safetensors").read_bytes()[1 << 20 : (1 << 20) + 1000]
        weights = self.api.parse_safetensors_file_metadata(self.repo, "adapter_model.safetensors")
        assert set(weights.tensors) == {"w"}
        refused(EntryNotFoundError, lambda: self._fetch("missing.txt", "main"))
        refused(RevisionNotFoundError, lambda: self._fetch("README.md", "no-such-branch"))
        refused(RepositoryNotFoundError, lambda: hf_hub_download("someone/nothing", "x", cache_dir=self.cache))

    def move_and_delete(self) -> None:
        self.api.move_repo(self.repo, "someone/adapter-b")
        assert self.api.repo_exists("someone/adapter-b")
        assert not self.api.repo_exists(self.repo)
        self.api.delete_repo("someone/adapter-b")
        assert not self.api.repo_exists("someone/adapter-b")
        self.api.delete_repo("someone/adapter-b", missing_ok=True)

    def run(self) -> None:
        for step in STEPS:
            start = time.perf_counter()
            getattr(self, step)()
            self.times[step] = round(time.perf_counter() - start, 2)

    def _fetch(self, path: str, revision: str) -> str:
        return hf_hub_download(self.repo, path, revision=revision, cache_dir=self.cache)

    def _rank(self, revision: str) -> int:
        with open(self._fetch("adapter_config.json", revision)) as file:
            return json.load(file)["r"]


STEPS = (
    *("create", "upload_folder", "list", "snapshot_download", "commit", "revisions", "read_parts"),
    "move_and_delete",
)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        client = Client(Path(folder), float(sys.argv[1]) if len(sys.argv) > 1 else 30)
        client.run()
    print(json.dumps({"huggingface_hub": huggingface_hub.__version__, "seconds": client.times}))
