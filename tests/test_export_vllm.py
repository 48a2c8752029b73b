"""Exports run under vLLM as they are: what vLLM checks of an adapter before it serves it, stated as rules.

vLLM (0.33) reads a fixed set of keys of the config, takes ranks up to `--max-lora-rank`, which is one of a few numbers,
and refuses a weight whose name it cannot take apart, or whose module its own layers do not have.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LLAMA_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def exports(finished_job: Path) -> list[Path]:
    folders = [config.parent for config in sorted((finished_job / "exports").glob("*/adapter_config.json"))]
    assert len(folders) == 3
    return folders


def tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no mapping
            yield name, tuple(weights.get_slice(name).get_shape())


def test_configs_hold_what_vllm_takes_and_nothing_it_refuses(exports):
    for folder in exports:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] in MAX_RANKS[1:]
        assert config["lora_alpha"] / config["r"] == 1
        assert isinstance(config["target_modules"], list | str)
        assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
        assert not config.get("rank_pattern")
        assert not config.get("alpha_pattern")
        assert config["base_model_name_or_path"] == "somebody/tiny-base"


def test_every_weight_is_of_a_module_that_vllm_adapts_in_its_pairs_and_shapes(exports):
    for folder in exports:
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        modules: dict[str, set[str]] = {}
        for name, shape in tensors(folder):
            *path, factor, last = name.split(".")
            assert path[:2] == ["base_model", "model"]
            assert (factor in ("lora_A", "lora_B"), last) == (True, "weight")
            assert path[-1] in LLAMA_MODULES
            assert shape[0 if factor == "lora_A" else 1] == rank
            modules.setdefault(".".join(path), set()).add(factor)
        assert modules
        assert all(factors == {"lora_A", "lora_B"} for factors in modules.values())
