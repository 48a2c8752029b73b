"""The bundled base: what it is, what it knows, how bases are found, named and written."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from loramux.bases import BUNDLED, base_identity, load_base, resolve_base, write_base
from loramux.bases.corpus import documents, text
from loramux.bases.load import BaseIdentity
from loramux.bases.pretrain import PretrainConfig, asked_accuracy, main
from loramux.support.errors import ConfigError
from loramux.tasks.generated import FAMILY_OF, rows


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_base(BUNDLED)


def test_bundled_base_is_a_small_float32_llama(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1e6 <= model.num_parameters() <= 4e6
    assert len(tokenizer) == model.config.vocab_size


def test_bundled_folder_is_safetensors_only_and_small() -> None:
    files = {file.name: file.stat().st_size for file in Path(resolve_base(BUNDLED)).iterdir()}
    assert files["model.safetensors"] <= 8e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(
        files
    )


@pytest.mark.parametrize("written", ["Mia hid the red cup.\nWho was it?\nMia", "  odd  spaces \n\n é 漢 🙂 \t\x00"])
def test_tokenizer_gives_any_text_back(base: tuple[Any, Any], written: str) -> None:
    tokenizer = base[1]
    ids = tokenizer(written)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == written


def test_words_of_the_tasks_are_nearly_all_one_token(base: tuple[Any, Any]) -> None:
    texts = [row[key] for task in FAMILY_OF for row in rows(task, "test") for key in ("input", "target")]
    words = sum(len(text.split()) + text.count(".") + text.count(",") for text in texts)
    assert sum(len(base[1](text)["input_ids"]) - 1 for text in texts) < 1.3 * words
    assert all(base[1].decode(base[1](text)["input_ids"], skip_special_tokens=True) == text for text in texts)


@pytest.mark.parametrize(("task", "share"), [("who", 0.95), ("sort", 0.9), ("plural", 0.75), ("opposite", 0.9)])
def test_base_has_the_skill_when_the_question_is_asked(base: tuple[Any, Any], task: str, share: float) -> None:
    assert asked_accuracy(*base, task) >= share


def test_corpus_is_the_same_everywhere() -> None:
    first = "\n\n".join(map(text, itertools.islice(documents(seed=0), 500)))
    assert hashlib.sha256(first.encode()).hexdigest()[:16] == "9d23c2d98d8b7a40"
    assert first != "\n\n".join(map(text, itertools.islice(documents(seed=1), 500)))


def test_no_evaluated_input_is_an_input_of_the_corpus() -> None:
    evaluated = {row["input"] for task in FAMILY_OF for split in ("validation", "test") for row in rows(task, split)}
    given = {line.text for document in itertools.islice(documents(seed=0), 20_000) for line in document if line.given}
    assert len(given) > 10_000
    assert not given & evaluated


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "no such folder, and not a Hub id"),
        ("/nowhere/model", "no such folder"),
        ("a b c", "not a Hub id"),
    ],
)
def test_unknown_base_says_what_can_be_given(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_base(name)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config"):
        resolve_base(tmp_path)


def test_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"cannot be loaded from the Hugging Face Hub(?s:.*)needs no network"):
        load_base("loramux-tests/does-not-exist")


def test_pickled_weights_are_never_read(tmp_path: Path, base: tuple[Any, Any]) -> None:
    folder = write_base(tmp_path / "copy")
    torch.save(base[0].state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot be read from that folder.*safetensors"):
        load_base(folder)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    weights = write_base(tmp_path / "copy") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ConfigError, match="cannot be read from that folder"):
        load_base(weights.parent)


def test_dtype_must_be_floating() -> None:
    assert load_base(BUNDLED, dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        load_base(BUNDLED, dtype="int8")


def test_revision_needs_a_hub_id() -> None:
    with pytest.raises(ConfigError, match="has no revision 'v2'"):
        load_base(BUNDLED, revision="v2")


def test_written_base_loads_with_plain_transformers_and_keeps_its_name(tmp_path: Path, base: tuple[Any, Any]) -> None:
    folder = write_base(tmp_path / "out" / "tiny")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base[0].parameters(), strict=True))
    assert tokenizer.get_vocab() == base[1].get_vocab()
    assert base_identity(folder) == BaseIdentity(BUNDLED)


def test_write_base_never_replaces_a_used_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        write_base(tmp_path)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        main(["--to", str(tmp_path)])


def test_identity_is_never_a_path(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "mine")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "_name_or_path": str(tmp_path)}))
    with pytest.raises(ConfigError, match="does not say which public model"):
        base_identity(folder)
    assert base_identity(folder, known_as="me/mine") == BaseIdentity("me/mine")
    with pytest.raises(ConfigError, match="not a path"):
        base_identity(folder, known_as=str(folder))


def test_identity_of_a_recorded_origin_and_of_the_hub_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_base(tmp_path / "mine")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "_name_or_path": "owner/model"}))
    assert base_identity(folder) == BaseIdentity("owner/model")
    assert "taken as a copy of 'owner/model'" in capsys.readouterr().out
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = write_base(tmp_path / "models--owner--some-model" / "snapshots" / commit)
    assert base_identity(cached) == BaseIdentity("owner/some-model", commit)


def test_pretraining_runs_and_writes_a_model_with_a_card(tmp_path: Path) -> None:
    main(["--to", str(tmp_path / "new"), "--steps", "2"])
    model, _ = load_base(tmp_path / "new")
    assert model.config.max_position_embeddings == PretrainConfig().length
    assert "2 steps" in (tmp_path / "new" / "README.md").read_text()
    with pytest.raises(ConfigError, match="does not say which public model"):
        base_identity(tmp_path / "new")


def test_a_quantised_base_wants_its_library(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"quantize '4bit' needs bitsandbytes: pip install 'loramux\[quantized\]'"):
        load_base(BUNDLED, quantize="4bit")
