"""Publishing to a hub: what is sent, that it is one commit or none, and what is refused."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hub_cases import RunningHub, running_hub
from huggingface_hub import CommitOperationAdd, ModelCard
from transformers import AutoModelForCausalLM

from loramux.cli import main
from loramux.hub.leaks import Examples, find_leaks, refuse_leaks
from loramux.hub.publish import Change, PublishConfig, plan_publication, publish
from loramux.hub.remote import Remote
from loramux.hub.server import Storage
from loramux.support.errors import ConfigError, LeakFound, RemoteError

FILES = {
    *(f"{task}/{name}" for task in ("colour", "sound", "home") for name in ("adapter_config.json", "export.json")),
    *(f"{folder}/adapter_model.safetensors" for folder in ("colour", "sound", "home", "mixture")),
    *("mixture/adapter_config.json", "README.md", "loramux.json", "recipe.yaml", "environment.json", "metrics.jsonl"),
    *("results.json", "routing.json", "scores.png", "losses.png", "routing.png"),
}
STRANGER = """
import sys
sys.modules["loramux"] = None  # any import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, "mia/three", subfolder="sound").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 13)[None]).logits, sys.argv[2])
"""


def put(place: Path, name: str, hub: RunningHub, **settings: object) -> list[Change]:
    remote = Remote(hub.url)
    config = PublishConfig(**settings)
    changes = plan_publication(place, name, config, remote)
    for change in changes:
        publish(change, remote, private=config.private)
    return changes


@pytest.fixture(scope="module")
def published(local_hub: RunningHub, finished_job: Path) -> list[Change]:
    return put(finished_job, "mia/three", local_hub, licence="apache-2.0")


@pytest.fixture
def copy(finished_job: Path, tmp_path: Path) -> Path:
    """A copy of the job to change."""
    shutil.copytree(finished_job, tmp_path / "run")
    shutil.copytree(finished_job.parent / "data", tmp_path / "data")
    return tmp_path / "run"


def test_a_run_is_one_repository_made_in_one_commit(local_hub: RunningHub, published: list[Change]) -> None:
    api = local_hub.client()
    assert {entry.path for entry in published[0].sent} == FILES
    assert set(api.list_repo_files("mia/three")) - {".gitattributes"} == FILES
    commits = api.list_repo_commits("mia/three")
    assert sum(commit.title.startswith("Publish with loramux") for commit in commits) == 1
    assert len(commits) <= 2  # the hub's own first one, with nothing in it


def test_the_hub_finds_it_by_base_method_and_library(local_hub: RunningHub, published: list[Change]) -> None:
    wanted = ["peft", "loramux:moa", "base_model:adapter:somebody/tiny-base"]
    assert "mia/three" in [found.id for found in local_hub.client().list_models(filter=wanted)]


def test_the_hubs_own_validation_takes_the_card(local_hub: RunningHub, published: list[Change], monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", local_hub.url)
    text = next(entry.content for entry in published[0].entries if entry.path == "README.md")
    assert isinstance(text, bytes)
    ModelCard(text.decode()).validate()


def test_somebody_else_loads_a_task_with_stock_peft_in_a_process_without_loramux(
    local_hub: RunningHub, published: list[Change], finished_job: Path, tmp_path: Path
) -> None:
    base = finished_job.parent / "base"
    environment = {**os.environ, "HF_ENDPOINT": local_hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", STRANGER, str(base), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    from peft import PeftModel

    here = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(finished_job / "exports" / "sound")
    ).eval()
    with torch.no_grad():
        expected = here(input_ids=torch.arange(3, 13)[None]).logits
    # Nearly: the two processes may compute on different numbers of threads.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-5, rtol=0)


def test_the_same_again_makes_no_commit(local_hub: RunningHub, published: list[Change], finished_job: Path) -> None:
    before = local_hub.client().model_info("mia/three").sha
    (change,) = put(finished_job, "mia/three", local_hub)  # the licence stays as it was given
    assert change.is_empty
    assert local_hub.client().model_info("mia/three").sha == before


def test_only_what_changed_is_sent_and_what_is_gone_is_removed(local_hub: RunningHub, copy: Path) -> None:
    put(copy, "mia/changing", local_hub)
    api = local_hub.client()
    card = api.hf_hub_download("mia/changing", "README.md")
    by_hand = Path(card).read_text().replace("# changing\n", "# Changing\n\nAsk Mia.\n").encode()
    own = [CommitOperationAdd("README.md", by_hand), CommitOperationAdd("notes.txt", b"mine")]
    api.create_commit("mia/changing", own, commit_message="by hand")
    (copy / "scores.png").unlink()
    (copy / "metrics.jsonl").write_text("")
    (change,) = put(copy, "mia/changing", local_hub)
    states = {entry.path: entry.state for entry in change.entries if entry.state != "unchanged"}
    assert states == {
        "metrics.jsonl": "changed",
        "README.md": "changed",
        "loramux.json": "changed",
        "scores.png": "removed",
    }
    files = api.list_repo_files("mia/changing")
    assert "notes.txt" in files
    assert "scores.png" not in files
    assert "Ask Mia." in Path(api.hf_hub_download("mia/changing", "README.md")).read_text()


def test_a_commit_by_somebody_else_meanwhile_is_not_overwritten(local_hub: RunningHub, copy: Path) -> None:
    put(copy, "mia/busy", local_hub)
    (copy / "metrics.jsonl").write_text("")
    remote = Remote(local_hub.url)
    (change,) = plan_publication(copy, "mia/busy", PublishConfig(), remote)
    local_hub.client().create_commit("mia/busy", [CommitOperationAdd("x.txt", b"x")], commit_message="theirs")
    with pytest.raises(RemoteError, match="mia/busy: somebody else changed it meanwhile, so nothing was"):
        publish(change, remote)
    (again,) = put(copy, "mia/busy", local_hub)
    assert {entry.path for entry in again.sent} == {"metrics.jsonl", "loramux.json"}


def test_a_repository_that_somebody_else_makes_meanwhile_is_not_overwritten(
    local_hub: RunningHub, finished_job: Path
) -> None:
    remote, api = Remote(local_hub.url), local_hub.client()
    (change,) = plan_publication(finished_job / "exports" / "home", "mia/raced", PublishConfig(private=True), remote)
    api.create_repo("mia/raced")
    api.create_commit("mia/raced", [CommitOperationAdd("README.md", b"theirs")], commit_message="theirs")
    with pytest.raises(RemoteError, match="mia/raced: somebody else changed it meanwhile, so nothing was"):
        publish(change, remote, private=True)
    assert set(api.list_repo_files("mia/raced")) == {"README.md"}
    assert not api.model_info("mia/raced").private


def test_a_branch_that_somebody_else_makes_meanwhile_is_not_overwritten(
    local_hub: RunningHub, finished_job: Path
) -> None:
    put(finished_job / "exports" / "home", "mia/raced-branch", local_hub)
    remote, api = Remote(local_hub.url), local_hub.client()
    sound = finished_job / "exports" / "sound"
    (change,) = plan_publication(sound, "mia/raced-branch", PublishConfig(revision="trial"), remote)
    api.create_branch("mia/raced-branch", branch="trial")
    with pytest.raises(RemoteError, match="mia/raced-branch: somebody else changed it meanwhile"):
        publish(change, remote)
    (change,) = plan_publication(sound, "mia/raced-branch", PublishConfig(revision="other"), remote)
    api.create_commit("mia/raced-branch", [CommitOperationAdd("x.txt", b"x")], commit_message="theirs")
    publish(change, remote)  # starts from the commit it was planned for
    assert "x.txt" not in api.list_repo_files("mia/raced-branch", revision="other")


def test_adapters_that_would_be_each_others_files_are_refused(
    local_hub: RunningHub, finished_job: Path, copy: Path, tmp_path: Path
) -> None:
    for name in ("v1", "v2"):
        shutil.copytree(finished_job / "exports" / "home", tmp_path / "versions" / name)
    remote = Remote(local_hub.url)
    for split in (False, True):
        with pytest.raises(ConfigError, match=r"two different files would be home/adapter_config.json in mia/twice"):
            plan_publication(tmp_path / "versions", "mia/twice", PublishConfig(split=split), remote)
    report = copy / "exports" / "home" / "export.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"task": "mixture"}))
    with pytest.raises(ConfigError, match=r"two different files would be mixture/adapter_config.json in mia/twice"):
        plan_publication(copy, "mia/twice", PublishConfig(), remote)


def test_an_upload_that_breaks_off_leaves_nothing_and_the_next_one_completes(
    local_hub: RunningHub, finished_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(local_hub.url)
    for error, told in (
        (ConnectionError("the line went dead"), r"cannot be reached \(the line went dead\); is it running"),
        (RuntimeError("a shard is missing"), r"did not take it \(a shard is missing\); try again"),
    ):
        (change,) = plan_publication(finished_job, "mia/broken", PublishConfig(), remote)
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub._commit_api._send_commit", Mock(side_effect=error))
            with pytest.raises(RemoteError, match=told):
                publish(change, remote)
    assert not set(local_hub.client().list_repo_files("mia/broken")) - {".gitattributes"}
    put(finished_job, "mia/broken", local_hub)
    assert set(local_hub.client().list_repo_files("mia/broken")) >= FILES


def test_a_repository_for_each_task(local_hub: RunningHub, finished_job: Path) -> None:
    changes = put(finished_job, "mia/apart", local_hub, split=True)
    assert [c.repository for c in changes] == ["mia/apart-colour", "mia/apart-sound", "mia/apart-home", "mia/apart"]
    assert {entry.path for entry in changes[1].sent} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "export.json"),
        *("loramux.json", "recipe.yaml"),
    }
    assert {entry.path for entry in changes[3].sent} >= {"mixture/adapter_config.json", "routing.png", "results.json"}
    card = Path(local_hub.client().hf_hub_download("mia/apart-sound", "README.md")).read_text()
    assert 'from_pretrained(base, "mia/apart-sound")' in card


def test_one_adapter_goes_to_the_root(local_hub: RunningHub, finished_job: Path) -> None:
    (change,) = put(finished_job / "exports" / "home", "mia/home", local_hub)
    assert {entry.path for entry in change.sent} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_branch_is_made_and_main_stays(local_hub: RunningHub, published: list[Change], finished_job: Path) -> None:
    put(finished_job / "exports" / "home", "mia/branched", local_hub)
    before = local_hub.client().model_info("mia/branched").sha
    (change,) = put(finished_job / "exports" / "sound", "mia/branched", local_hub, revision="trial/one")
    assert change.sent
    assert local_hub.client().model_info("mia/branched").sha == before
    assert local_hub.client().model_info("mia/branched", revision="trial/one").sha != before
    assert plan_publication(
        finished_job / "exports" / "sound", "mia/branched", PublishConfig(revision="trial/one"), Remote(local_hub.url)
    )[0].is_empty


def test_private_repositories(local_hub: RunningHub, published: list[Change], finished_job: Path) -> None:
    put(finished_job / "exports" / "home", "mia/secret", local_hub, private=True)
    assert local_hub.client().model_info("mia/secret").private
    with pytest.raises(ConfigError, match="mia/three: it is there already and public, which --private does not"):
        put(finished_job, "mia/three", local_hub, private=True)


def test_a_dry_run_shows_what_would_be_sent_and_sends_nothing(
    local_hub: RunningHub, finished_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["publish", str(finished_job), "mia/dry", "--endpoint", local_hub.url]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in FILES)
    assert "nothing was sent" in shown
    assert not local_hub.client().repo_exists("mia/dry")
    assert main(command) == 0
    assert f"published: {local_hub.url}/mia/dry/commit/" in capsys.readouterr().out
    assert main(command) == 0
    assert "mia/dry: nothing new, so no commit" in capsys.readouterr().out


def test_a_hub_that_asks_for_a_token(finished_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = finished_job / "exports" / "home"
    with running_hub(tmp_path / "hub") as hub:
        token = hub.storage.accounts.create_token("mia")
        with pytest.raises(RemoteError, match=f"mia/home: {hub.url} says: .*"):
            put(home, "mia/home", hub)
        monkeypatch.setenv("HF_TOKEN", token)
        put(home, "mia/home", hub, private=True)
        assert hub.client(token).model_info("mia/home").private
        with pytest.raises(RemoteError, match=f"tom/home: {hub.url} says: .*"):
            put(home, "tom/home", hub)
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(RemoteError, match=r"has no such repository, or it is private and you are not logged in"):
            Remote(hub.url).commit("mia/home")


@pytest.mark.parametrize("name", ["three", "mia/a/b", "mia/three!"])
def test_a_name_that_is_none(name: str, local_hub: RunningHub, finished_job: Path) -> None:
    with pytest.raises(ConfigError, match=r"owner/name|Repo id must"):
        plan_publication(finished_job, name, PublishConfig(), Remote(local_hub.url))


def test_a_hub_that_is_not_there(finished_job: Path) -> None:
    with pytest.raises(RemoteError, match=r"http://127.0.0.1:9 cannot be reached \(.*\); is it running\?"):
        plan_publication(finished_job, "mia/three", PublishConfig(), Remote("http://127.0.0.1:9"))


def test_what_looks_private_stops_everything(
    local_hub: RunningHub, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = json.loads((copy / "environment.json").read_text())
    secrets = {"key": "hf_" + "a1" * 17, "where": "/home/mia/runs", "said": "sound of the mouse of the snake is"}
    (copy / "environment.json").write_text(json.dumps(noted | secrets, indent=2))
    command = ["publish", str(copy), "mia/leaky", "--endpoint", local_hub.url]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "environment.json, line" in told
    assert "token (hf_a1a...)" in told
    assert "a1a1a1a1" not in told
    assert "home-path (/home/mia)" in told
    assert "example (sound of the mouse of the snake is)" in told
    assert "--allow token --allow home-path --allow example" in told
    assert not local_hub.client().repo_exists("mia/leaky")
    with pytest.raises(LeakFound, match="nothing was published"):
        put(copy, "mia/leaky", local_hub, allow=("token", "home-path"))
    put(copy, "mia/leaky", local_hub, allow=("token", "home-path", "example"))


def test_an_answer_on_the_card_may_be_the_prompt_of_another_example(local_hub: RunningHub, copy: Path) -> None:
    rows = [json.loads(line) for line in (copy / "predictions.jsonl").read_text().splitlines()]
    said = "sound of the mouse of the snake is"
    changed = [row | {"prediction": said, "reference": said} if row["index"] == 0 else row for row in rows]
    (copy / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    (change,) = plan_publication(copy, "mia/answers", PublishConfig(), Remote(local_hub.url))
    assert said.encode() in next(entry.content for entry in change.sent if entry.path == "README.md")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("token", "ghp_" + "x" * 36),
        ("token", "github_pat_" + "x" * 60),
        ("token", "sk-proj-" + "x" * 40),
        ("token", "AKIA" + "ABCD" * 4),
        ("token", "https://mia:secret@example.org/x"),
        ("token", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3.abcdefghijkl"),
        ("private-key", "-----BEGIN " + "OPENSSH PRIVATE KEY-----"),
        ("home-path", "data: /Users/mia/data"),
        ("home-path", r"C:\Users\mia\data"),
        ("home-path", "/root/runs"),
    ],
)
def test_known_shapes_are_found_with_their_line(kind: str, text: str) -> None:
    (leak,) = find_leaks({"a.txt": f"one\ntwo {text}\n".encode()}, Examples((), ()))
    assert (leak.kind, leak.file, leak.line) == (kind, "a.txt", 2)


@pytest.mark.parametrize(
    "text", ["a hash " + "0123456789abcdef" * 4, "https://example.org/home/page", "hf_token", "the /homepage", "sk-8"]
)
def test_what_is_no_leak(text: str) -> None:
    assert find_leaks({"a.txt": text.encode()}, Examples((), ())) == []


def test_tokens_of_ones_own_hub_are_found(local_hub: RunningHub, tmp_path: Path) -> None:
    with contextlib.closing(Storage(tmp_path)) as storage:
        for _ in range(8):
            text = storage.accounts.create_token("mia").encode()
            assert [leak.kind for leak in find_leaks({"a.txt": text}, Examples((), ()))] == ["token"]


def test_headers_of_weights_are_looked_at(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"from": "/home/mia/x"})
    (leak,) = find_leaks({"a.safetensors": tmp_path / "a.safetensors"}, Examples((), ()))
    assert str(leak) == "a.safetensors, line 1: home-path (/home/mia)"


def test_examples_are_found_however_they_are_broken_unless_they_were_chosen() -> None:
    prompts = ["Mia hid the red cup.", "Tom saw the sea.", "7 12 3 19", "Hello there"]
    examples = Examples(prompts, ["as in: Tom saw the sea. -> Tom"])
    text = 'x\n"| mia  hid the\\nred cup |" Tom saw the sea. 7 12 3 19 Hello there'
    assert [(leak.kind, leak.line) for leak in find_leaks({"a.md": text.encode()}, examples)] == [("example", 2)]


def test_many_leaks_are_cut_short() -> None:
    leaks = find_leaks({"a.txt": b"/home/mia\n" * 20}, Examples((), ()))
    with pytest.raises(LeakFound, match=r"and 8 more\nIf it may be: --allow home-path$"):
        refuse_leaks(leaks, ())
