"""Pulling from a hub: what is fetched, what is checked before anything is used, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_cases import RunningHub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loramux.adapters
from loramux.cli import main
from loramux.hub.checks import skeleton
from loramux.hub.publish import PublishConfig, plan_publication, publish
from loramux.hub.pull import Pulled, pull
from loramux.hub.remote import Remote
from loramux.support.errors import AdapterError, ConfigError, RemoteError, TrustError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

EMBEDDINGS = "model.embed_tokens.weight"

pytestmark = pytest.mark.usefixtures("beside_the_base")


@pytest.fixture(scope="module")
def published(local_hub: RunningHub, finished_job: Path) -> str:
    remote = Remote(local_hub.url)
    for change in plan_publication(finished_job, "mia/three", PublishConfig(), remote):
        publish(change, remote)
    return "mia/three"


@pytest.fixture
def adapter(finished_job: Path, tmp_path: Path) -> Path:
    """A copy of one export to spoil."""
    return Path(shutil.copytree(finished_job / "exports" / "home", tmp_path / "home"))


def put(folder: Path, name: str, hub: RunningHub) -> str:
    hub.client().create_repo(name, exist_ok=True)
    hub.client().upload_folder(repo_id=name, folder_path=folder)
    return name


def get(name: str, hub: RunningHub, **options: object) -> Pulled:
    return pull(name, Remote(hub.url), **options)


def test_what_comes_is_what_was_published_with_its_commit_noted(
    local_hub: RunningHub, published: str, finished_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", published, "--to", "here", "--endpoint", local_hub.url]) == 0
    noted = json.loads(Path("here/pulled.json").read_text())
    sha = local_hub.client().model_info(published).sha
    assert (noted["repository"], noted["revision"], noted["commit"]) == (published, "main", sha)
    for task in ("colour", "sound", "home"):
        mine = (finished_job / "exports" / task / WEIGHTS).read_bytes()
        assert Path("here", task, WEIGHTS).read_bytes() == mine
    told = capsys.readouterr().out
    assert f"{published} at commit {sha}" in told
    assert "here/mixture" in told


def test_the_mixture_runs_as_it_did(local_hub: RunningHub, published: str, finished_job: Path) -> None:
    pulled = get(published, local_hub)
    ids, both = torch.arange(3, 13)[None], []
    for folder in (pulled.folder / "mixture", finished_job / "mixture"):
        base = AutoModelForCausalLM.from_pretrained("somebody/tiny-base")
        with torch.no_grad():
            both.append(PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids, routing_tasks="home").logits)
    assert torch.equal(*both)
    assert loramux.adapters.LoramuxConfig.from_pretrained(str(pulled.folder / "mixture")).method == "moa"


def test_a_revision_is_pinned_and_a_second_pull_comes_from_the_cache(local_hub: RunningHub, adapter: Path) -> None:
    put(adapter, "mia/moving", local_hub)
    first = local_hub.client().model_info("mia/moving").sha
    (adapter / "notes.md").write_text("more")
    put(adapter, "mia/moving", local_hub)
    old = get(f"mia/moving@{first}", local_hub, to=Path("old"))
    assert (old.commit, (old.folder / "notes.md").exists()) == (first, False)
    new = get("mia/moving", local_hub, to=Path("old"))  # the folder that a pull made is replaced
    assert (new.commit != first, (new.folder / "notes.md").exists()) == (True, True)
    assert get("mia/moving", local_hub).folder == get("mia/moving", local_hub).folder


def test_code_and_pickles_are_left_where_they_are(local_hub: RunningHub, adapter: Path) -> None:
    for name in ("modeling.py", "training_args.bin", "optimizer.pt"):
        (adapter / name).write_bytes(b"\x80")
    pulled = get(put(adapter, "mia/more", local_hub), local_hub, to=Path("here"))
    assert set(pulled.left) - {".gitattributes"} == {"modeling.py", "training_args.bin", "optimizer.pt"}
    assert {path.name for path in Path("here").iterdir()} == {*pulled.files, "pulled.json"}


def test_a_cache_that_was_touched_is_fetched_anew(local_hub: RunningHub, adapter: Path) -> None:
    name = put(adapter, "mia/cached", local_hub)
    pulled = get(name, local_hub)
    right = (pulled.folder / CONFIG).read_bytes()
    (pulled.folder / CONFIG).resolve().write_bytes(right.replace(b"LORA", b"LIRA"))
    assert (get(name, local_hub).folder / CONFIG).read_bytes() == right


def test_a_file_that_is_not_what_the_hub_says_is_refused(
    local_hub: RunningHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = put(adapter, "mia/lying", local_hub)
    remote = Remote(local_hub.url)
    honest = remote.commit

    def lie(*given: str | None) -> object:
        commit = honest(*given)
        object.__setattr__(commit.files[CONFIG], "blob_id", "0" * 40)
        return commit

    monkeypatch.setattr(remote, "commit", lie)
    with pytest.raises(TrustError, match=rf"mia/lying: {CONFIG} is not what http://.* says it is"):
        pull(name, remote)


def config(folder: Path, **change: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def reshaped(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, folder / WEIGHTS)


def embeddings_too(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    base = load_file("somebody/tiny-base/model.safetensors")
    save_file({**tensors, f"base_model.model.{EMBEDDINGS}": base[EMBEDDINGS]}, folder / WEIGHTS)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def huge(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "x": "y" * (1 << 20)}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled, "its weights are pickled .adapter_model.bin., and reading a pickle can run any code"),
        (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS} beside its {CONFIG}"),
        (reshaped, r"tensor '.*' has shape \(8, 47\); its config and this base want \(8, 48\)"),
        (embeddings_too, f"holds a tensor 'base_model.model.{EMBEDDINGS}', which is no part of a plain LoRA"),
        (cut, "not a whole safetensors file"),
        (huge, "no adapter's config is larger than 1 MiB"),
        (lambda f: config(f, peft_type="IA3"), "of PEFT type IA3"),
        (lambda f: config(f, use_dora=True), "use_dora = True"),
        (lambda f: config(f, r=4), "its config and this base want"),
        (lambda f: config(f, base_model_name_or_path=7), "base_model_name_or_path must be a name, got 7"),
        (lambda f: config(f, peft_type=None), "peft_type and revision must be names, got .None. and"),
        (lambda f: config(f, base_model_name_or_path=None), "do not name one base .*say which .--base MODEL"),
        (lambda f: (f / CONFIG).write_text("[1"), "not readable as JSON .JSONDecodeError"),
    ],
)
def test_an_adapter_that_is_not_what_it_should_be(
    spoil: object, message: str, local_hub: RunningHub, adapter: Path, request: pytest.FixtureRequest
) -> None:
    spoil(adapter)
    name = put(adapter, f"mia/bad-{abs(hash(request.node.name))}", local_hub)
    with pytest.raises(AdapterError, match=message):
        get(name, local_hub, to=Path("here"))
    assert not Path("here").exists()


def test_a_mixture_that_does_not_fit_its_config(local_hub: RunningHub, finished_job: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_job / "mixture", tmp_path / "mixture"))
    (folder / "README.md").unlink()
    config(folder, options={"rank": 4})
    with pytest.raises(AdapterError, match=r"tensor '.*' has shape .*; its config and this base want"):
        get(put(folder, "mia/mixed", local_hub), local_hub)
    config(folder, options={"rank": 0})
    with pytest.raises(AdapterError, match="rank"):
        get(put(folder, "mia/mixed", local_hub), local_hub)
    config(folder, options={"rank": 2}, target_modules=["nothing"])
    with pytest.raises(AdapterError, match="its config does not fit this base"):
        get(put(folder, "mia/mixed", local_hub), local_hub)


def test_another_base_or_revision_must_be_forced(local_hub: RunningHub, adapter: Path, finished_job: Path) -> None:
    name = put(adapter, "mia/based", local_hub)
    copy = str(finished_job.parent / "base")
    with pytest.raises(AdapterError, match=r"an adapter of 'somebody/tiny-base', not of '.*--force-base"):
        get(name, local_hub, base=copy)
    assert get(name, local_hub, base=copy, force_base=True)
    config(adapter, revision="abc")
    put(adapter, name, local_hub)
    with pytest.raises(AdapterError, match="an adapter of somebody/tiny-base@abc, not of its revision 'def'"):
        get(name, local_hub, base="somebody/tiny-base@def")
    assert get(name, local_hub, base="somebody/tiny-base@def", force_base=True)
    assert get(name, local_hub, base="somebody/tiny-base@abc")


def test_adapters_of_the_same_name_in_different_folders_are_all_looked_at(
    local_hub: RunningHub, adapter: Path, tmp_path: Path
) -> None:
    for place in ("a", "b"):
        shutil.copytree(adapter, tmp_path / "both" / place / "home")
    config(tmp_path / "both" / "a" / "home", base_model_name_or_path="other/base")
    name = put(tmp_path / "both", "mia/both", local_hub)
    with pytest.raises(AdapterError, match="mia/both/a/home: other/base; mia/both/b/home: somebody/tiny-base"):
        get(name, local_hub)
    with pytest.raises(AdapterError, match="mia/both/a/home: an adapter of 'other/base'"):
        get(name, local_hub, base="somebody/tiny-base")


def test_a_base_that_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"base 'mia/no-base': its config cannot be had.*\n.*--base FOLDER"):
        skeleton("mia/no-base")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0, "num_attention_heads": 0},
        {"hidden_act": "nothing"},
        {"vocab_size": -1},
        {"hidden_size": "48"},
        {"hidden_size": [48]},
        {"num_hidden_layers": 1 << 40},
        {"num_hidden_layers": None, "text_config": {"num_hidden_layers": 1 << 40}},
        {"model_type": "unheard of"},
    ],
)
def test_a_base_whose_config_makes_no_model(change: dict, finished_job: Path, tmp_path: Path) -> None:
    config = json.loads((finished_job.parent / "base" / "config.json").read_text())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=r"base '.*base': its config cannot be had"):
        skeleton(str(tmp_path / "base"))


def test_repositories_that_are_not_there_or_hold_none(local_hub: RunningHub, published: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"mia/nothing: http://.* has no such repository, or it is private"):
        get("mia/nothing", local_hub)
    with pytest.raises(RemoteError, match=r"mia/three@v9: http://.* has that repository, but not that revision"):
        get("mia/three@v9", local_hub)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.md").write_text("a")
    with pytest.raises(RemoteError, match="mia/empty: holds no PEFT adapter"):
        get(put(tmp_path / "empty", "mia/empty", local_hub), local_hub)


@pytest.mark.parametrize("path", ["../adapter_config.json", "/etc/x.json", "a/../../x.json", "a\\b.json", "C:x.json"])
def test_names_that_lead_out_of_the_folder(
    path: str, local_hub: RunningHub, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(local_hub.url)
    evil = RepoFile(path=path, size=2, oid="0" * 40)
    monkeypatch.setattr(remote.api, "list_repo_tree", lambda *_, **__: [evil])
    with pytest.raises(RemoteError, match=r"mia/three: names a file .*, which would lie outside of its folder"):
        pull(published, remote)


def test_folders_with_something_else_in_them_stay(local_hub: RunningHub, published: str, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="home: exists and was not pulled"):
        get(published, local_hub, to=adapter)
    get(put(adapter, "mia/other", local_hub), local_hub, to=Path("here"))
    with pytest.raises(ConfigError, match="here: holds mia/other; name another folder for mia/three"):
        get(published, local_hub, to=Path("here"))


def test_no_hub_is_asked_offline(local_hub: RunningHub, published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match="HF_HUB_OFFLINE is set"):
        get(published, local_hub)


KEYS = {"mine": b"\x01" * 32, "theirs": b"\x02" * 32}


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """Two key pairs as PEM files: `mine`, `mine.pub` and so on."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    found = {}
    for name, seed in KEYS.items():
        key = Ed25519PrivateKey.from_private_bytes(seed)
        private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
        public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        found |= {name: tmp_path / f"{name}.pem", f"{name}.pub": tmp_path / f"{name}.pub"}
        found[name].write_bytes(private)
        found[f"{name}.pub"].write_bytes(public)
    return found


def test_what_a_trusted_key_signed_is_taken_and_nothing_else(
    local_hub: RunningHub, published: str, adapter: Path, keys: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    end = ["--endpoint", local_hub.url]
    assert main(["publish", str(adapter), "mia/signed", "--sign", str(keys["mine"]), *end]) == 0
    assert main(["publish", str(adapter), "mia/signed", "--sign", str(keys["mine"]), *end]) == 0
    assert "nothing new" in capsys.readouterr().out
    trust = ["pull", "mia/signed", *end, "--trust"]
    assert main([*trust, str(keys["mine.pub"]), "--to", "here"]) == 0
    assert "signed by SHA256:" in capsys.readouterr().out
    noted = json.loads(Path("here/pulled.json").read_text())
    assert (noted["signed_by"][:7], noted["origin"]["base"]) == ("SHA256:", "somebody/tiny-base")
    assert main([*trust, str(keys["theirs.pub"])]) == 2
    assert "which is none of the keys you trust" in capsys.readouterr().err
    assert main(["pull", published, *end, "--trust", str(keys["mine.pub"])]) == 2
    assert "mia/three: it is not signed (no attestation.json)" in capsys.readouterr().err


def change(hub: RunningHub, *operations: object) -> None:
    hub.client().create_commit("mia/signed2", operations, commit_message="by another hand")


def test_what_was_changed_after_signing_is_refused(
    local_hub: RunningHub, adapter: Path, keys: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    end = ["--endpoint", local_hub.url]
    sign = ["publish", str(adapter), "mia/signed2", "--sign", str(keys["mine"]), *end]
    trust = ["pull", "mia/signed2", *end, "--trust", str(keys["mine.pub"])]
    assert main(sign) == 0
    change(local_hub, CommitOperationAdd("README.md", b"other words"))
    assert main(trust) == 0  # words may change
    text = (adapter / CONFIG).read_text()
    fetched = Path(local_hub.client().hf_hub_download("mia/signed2", "attestation.json")).read_text()
    envelope = json.loads(fetched)
    forged = json.dumps({**envelope, "payload": envelope["payload"][:-8] + "AAAAAAA="})
    for operations, told in (
        ([CommitOperationAdd(CONFIG, text.replace("  ", " ").encode())], f"{CONFIG} differs from what SHA256:"),
        ([CommitOperationAdd("more.safetensors", b"x")], "more.safetensors is not among the files that SHA256:"),
        ([CommitOperationDelete("export.json")], "export.json is missing from what SHA256:"),
        ([CommitOperationAdd("attestation.json", forged.encode())], "the signature of SHA256:"),
        ([CommitOperationAdd("attestation.json", b"{}")], "attestation.json: not a DSSE envelope"),
    ):
        change(local_hub, *operations)
        assert main(trust) == 2, told
        assert told in capsys.readouterr().err
        assert main(sign) == 0
        change(local_hub, CommitOperationDelete("more.safetensors")) if "more" in told else None
        assert main(trust) == 0, told
    change(local_hub, CommitOperationDelete("attestation.json"))
    local_hub.client().create_repo("eve/copied")
    copied = get("mia/signed2", local_hub).folder
    (adapter / "attestation.json").write_text(fetched)
    shutil.copy(copied / "loramux.json", adapter)
    shutil.copy(copied / "export.json", adapter)
    put(adapter, "eve/copied", local_hub)
    assert main(["pull", "eve/copied", *trust[2:]]) == 2
    assert "eve/copied: its signature is for mia/signed2" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["--sign", "--trust"])
@pytest.mark.parametrize("text", [b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_files_that_are_no_keys(
    what: str, text: bytes, local_hub: RunningHub, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("key").write_bytes(text)
    command = ["publish", str(adapter), "mia/x"] if what == "--sign" else ["pull", "mia/three"]
    assert main([*command, what, "key", "--endpoint", local_hub.url]) == 2
    assert "key" in capsys.readouterr().err
    assert main([*command, what, "no-such-file", "--endpoint", local_hub.url]) == 2
    assert "no-such-file: cannot be read" in capsys.readouterr().err
