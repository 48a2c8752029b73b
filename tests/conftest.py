"""What every test stands on: no network, few threads, tiny real models, and the optional real inputs."""

import os

# Set before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cases
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

if TYPE_CHECKING:
    from hub_cases import RunningHub

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def _shared(name: str) -> Path:
    if not (folder := SHARED / name).is_dir():
        pytest.skip(f"{folder} is not here: real models and data are optional")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of real pretrained models; the test is skipped where it is absent."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real tasks, one folder of JSON lines each; the test is skipped where it is absent."""
    return _shared("data")


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A fresh causal LM with the same random weights each time; more than one at once: `cases.tiny_llama(seed)`."""
    return cases.tiny_llama()


@pytest.fixture(scope="session")
def tiny_bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=3,
    )


@pytest.fixture
def tiny_bert(tiny_bert_config: BertConfig) -> BertForSequenceClassification:
    """A fresh encoder with a three-way classification head, the same random weights each time."""
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_bert_config).eval()


@pytest.fixture(scope="session")
def tiny_t5_config() -> T5Config:
    return T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )


@pytest.fixture
def tiny_t5(tiny_t5_config: T5Config) -> T5ForConditionalGeneration:
    """A fresh encoder-decoder, the same random weights each time."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(tiny_t5_config).eval()


@pytest.fixture(scope="session")
def finished_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: three tiny tasks trained, evaluated and exported, on a base that is known as `somebody/tiny-base`.

    Its base lies beside it in `base`, its tasks in `data`.
    """
    from training_cases import make_recipe, write_base, write_tasks

    from loramux.training.main_job import train_job

    folder = tmp_path_factory.mktemp("finished")
    base, tasks = write_base(folder / "base"), write_tasks(folder / "data")
    recipe = make_recipe(base, tasks, "base.known_as=somebody/tiny-base", "train.learning_rate=0.02")
    train_job(recipe, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def local_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator["RunningHub"]:
    """A hub of a test module's own, and a cache of its own for what is fetched from it."""
    from hub_cases import running_hub
    from huggingface_hub import constants

    with running_hub(tmp_path_factory.mktemp("hub")) as running, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield running


@pytest.fixture
def beside_the_base(finished_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's public name is a folder here, so that it is found without a network."""
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "tiny-base").symlink_to(finished_job.parent / "base")
    monkeypatch.chdir(tmp_path)
