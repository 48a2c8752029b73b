"""A tiny base on disk, three tiny tasks and recipes over them: what the training tests run."""

import json
from pathlib import Path

import torch
from cases import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loramux.training.recipe import Recipe, load_recipe

torch.set_num_threads(1)  # models this small only wait for a second thread, and the child processes use one too

NOUNS = ["cat", "dog", "bird", "fish", "horse", "mouse", "snake", "sheep"]
WORDS = ["colour", "sound", "home", "of", "the", "is", "red", "blue", "loud", "soft", "land", "sea"]
ANSWERS = {"colour": ["red", "blue"], "sound": ["loud", "soft"], "home": ["land", "sea"]}


def write_base(folder: Path, seed: int = 0) -> Path:
    """A two-layer Llama with random weights and a word tokenizer."""
    model = tiny_llama(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # else no adapter could make any token likely
    model.save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *NOUNS, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def write_tasks(folder: Path, count: int = 24) -> Path:
    """Three tasks that give different answers about the same nouns; some prompts are longer than others."""
    for number, (name, answers) in enumerate(ANSWERS.items()):
        (folder / name).mkdir(parents=True)
        for split, size in (("train", count), ("validation", 6), ("test", 6)):
            rows = [_row(name, answers, number, i) for i in range(size)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    listed = "".join(f"  - {{name: {name}, source: {{path: {name}}}}}\n" for name in ANSWERS)
    (folder / "tasks.yaml").write_text(f"defaults: {{max_new_tokens: 2}}\ntasks:\n{listed}")
    return folder / "tasks.yaml"


def make_recipe(base: Path, tasks: Path, *overrides: str) -> Recipe:
    settings = ["train.steps=8", "train.batch_size=6", "train.log_every=2", "train.save_every=4", "train.eval_every=4"]
    places = [f"base.model={base}", f"tasks={tasks}", "method.options={rank: 2}"]
    return load_recipe(None, [*places, *settings, *overrides])


def _row(name: str, answers: list[str], number: int, index: int) -> dict[str, str]:
    noun = NOUNS[index % len(NOUNS)]
    prompt = f"{name} of the {noun}" if index % 3 else f"{name} of the {noun} of the {NOUNS[(index + 1) % 8]} is"
    return {"prompt": prompt, "completion": answers[(index * 5 + number) // 3 % 2]}
