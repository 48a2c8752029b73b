"""PEFT and transformers, unchanged and without loramux, push to the local hub and pull from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cases import RunningHub

CODE = """
import json, sys
sys.modules["loramux"] = None  # any import of it fails
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
tokens = torch.arange(12)[None]
config = LlamaConfig(vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
LlamaForCausalLM(config).push_to_hub("someone/tiny-base")
base = AutoModelForCausalLM.from_pretrained("someone/tiny-base")
lora = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
model = get_peft_model(base, lora).eval()
with torch.no_grad():
    wanted = model(tokens).logits
    model.push_to_hub("someone/adapter", tags=["task:demo"])
    fresh = AutoModelForCausalLM.from_pretrained("someone/tiny-base")
    pulled = PeftModel.from_pretrained(fresh, "someone/adapter").eval()
    automatic = AutoPeftModelForCausalLM.from_pretrained("someone/adapter").eval()
    print(json.dumps({
        "pulled": torch.equal(pulled(tokens).logits, wanted),
        "automatic": torch.equal(automatic(tokens).logits, wanted),
        "tags": HfApi().model_info("someone/adapter").tags,
        "found": [one.id for one in HfApi().list_models(filter="base_model:adapter:someone/tiny-base")],
    }))
"""


@pytest.mark.slow
def test_peft_pushes_and_pulls_equal_logits(local_hub: RunningHub, tmp_path: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = {**clean, "HF_ENDPOINT": local_hub.url, "HF_TOKEN": "any", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["pulled"]
    assert told["automatic"]
    assert {"peft", "task:demo", "base_model:adapter:someone/tiny-base"} <= set(told["tags"])
    assert told["found"] == ["someone/adapter"]


@pytest.mark.slow
def test_datasets_load_from_the_hub(local_hub: RunningHub, tmp_path: Path) -> None:
    client = local_hub.client()
    client.create_repo("someone/rows", repo_type="dataset")
    rows = b'{"input": "a", "target": "b"}\n{"input": "c", "target": "d"}\n'
    client.upload_file(repo_id="someone/rows", repo_type="dataset", path_or_fileobj=rows, path_in_repo="train.jsonl")
    code = "from datasets import load_dataset; print(load_dataset('someone/rows')['train']['target'][:])"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = {**clean, "HF_ENDPOINT": local_hub.url, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['b', 'd']"
