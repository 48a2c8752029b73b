"""Pretrains the bundled base from nothing: `python -m loramux.bases.pretrain --to DIR`, minutes on one CPU core."""

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from ..support.config import config
from ..support.console import meter, say, show_table
from ..support.files import atomic_folder, write_text
from ..tasks.generated import FAMILY_OF, drawn
from .card import card
from .corpus import QUESTIONS, Line, documents, text
from .load import BUNDLED, refuse_used_folder

Batch = tuple[Tensor, Tensor]
"""Token ids and their weights in the loss, both (rows, width)."""
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@config
class PretrainConfig:
    """What the bundled weights were made with; the run is deterministic for one version of torch on one machine."""

    seed: int = 0
    steps: int = 1600
    documents: int = 96
    """Documents per step of single documents, one a row."""
    packed_every: int = 4
    """One step of so many is on rows packed to full length."""
    packed_rows: int = 16
    length: int = 128
    """Tokens per packed row, and the longest input the model can take."""
    given_weight: float = 0.1
    """Weight in the loss of what nobody can predict, the inputs and questions of exercises."""
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    vocabulary: int = 1280
    hidden_size: int = 128
    layers: int = 5
    intermediate_size: int = 384
    heads: int = 4
    key_value_heads: int = 2
    initializer_range: float = 0.08
    """Wider than usual: a narrow model with the usual 0.02 takes far longer until attention copies anything."""


def train_tokenizer(options: PretrainConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that any text has tokens and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(text, itertools.islice(documents(options.seed), 20_000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=options.length,
        clean_up_tokenization_spaces=False,
    )


def build_model(options: PretrainConfig) -> LlamaForCausalLM:
    """An untrained Llama of the configured size."""
    torch.manual_seed(options.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden_size,
            intermediate_size=options.intermediate_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.key_value_heads,
            max_position_embeddings=options.length,
            initializer_range=options.initializer_range,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def encode(document: tuple[Line, ...], tokenizer: PreTrainedTokenizerFast, given: float) -> list[tuple[int, float]]:
    """Token ids of a document between begin and end token, each with its weight in the loss."""
    tokens = [(tokenizer.bos_token_id, 0.0)]
    for number, line in enumerate(document, start=1):
        last = number == len(document)
        ids = tokenizer(line.text if last else f"{line.text}\n", add_special_tokens=False)["input_ids"]
        tokens += [(token, given if line.given else 1.0) for token in ids]
    return [*tokens, (tokenizer.eos_token_id, 1.0)]


def batches(tokenizer: PreTrainedTokenizerFast, options: PretrainConfig) -> Iterator[Batch]:
    """Batches of single documents, from which copying is learnt fastest; packed ones among them for long inputs."""
    single = single_batches(options.seed, tokenizer, options)
    packed = packed_batches(options.seed + 1, tokenizer, options)
    for step in itertools.count(1):
        yield next(packed if step % options.packed_every == 0 else single)


def single_batches(seed: int, tokenizer: PreTrainedTokenizerFast, options: PretrainConfig) -> Iterator[Batch]:
    """Batches of documents of about the same length, one document a row."""
    rng = random.Random(seed)
    encoded = (encode(document, tokenizer, options.given_weight) for document in documents(seed))
    while True:
        chunk = sorted(itertools.islice(encoded, 16 * options.documents), key=len)
        starts = list(range(0, len(chunk), options.documents))
        for start in rng.sample(starts, len(starts)):
            yield _tensors(chunk[start : start + options.documents], tokenizer)


def packed_batches(seed: int, tokenizer: PreTrainedTokenizerFast, options: PretrainConfig) -> Iterator[Batch]:
    """Batches of full-length rows of many whole documents, so that every position is trained."""
    rows: list[list[tuple[int, float]]] = [[]]
    for document in documents(seed):
        tokens = encode(document, tokenizer, options.given_weight)
        if len(rows[-1]) + len(tokens) > options.length:
            rows.append([])
        if len(rows) > options.packed_rows:
            yield _tensors(rows[:-1], tokenizer)
            rows = [[]]
        rows[-1] += tokens


def _tensors(rows: list[list[tuple[int, float]]], tokenizer: PreTrainedTokenizerFast) -> Batch:
    width = max(map(len, rows))
    padded = torch.tensor([row + [(tokenizer.pad_token_id, 0.0)] * (width - len(row)) for row in rows])
    return padded[..., 0].long(), padded[..., 1]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: PretrainConfig) -> None:
    """AdamW with warm-up and cosine decay over freshly generated text."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 20 + 1, options.steps)
    model.train()
    with meter("pretraining", options.steps) as progress:
        for batch in itertools.islice(batches(tokenizer, options), options.steps):
            loss = weighted_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.advance(note=f"loss {loss.item():.3f}")


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Weighted mean of the loss per token, in nats."""
    ids, weights = batch
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: PretrainConfig) -> float:
    """Mean loss on documents of another seed, every token counting the same, in nats per token."""
    model.eval()
    plain = replace(options, given_weight=1.0)
    some = itertools.islice(packed_batches(options.seed + 2, tokenizer, plain), 16)
    return sum(weighted_loss(model, batch).item() for batch in some) / 16


@torch.no_grad()
def asked_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: str) -> float:
    """Share of a generated task's test rows that greedy decoding answers exactly when the question is asked in full."""
    model.eval()
    rng = random.Random(task)
    asked = [
        (Line(d.input, given=True), Line(rng.choice(QUESTIONS[task]), given=True), Line(d.answers[task]))
        for d in drawn(FAMILY_OF[task])["test"]
    ]
    ids, weights = _tensors([encode(document, tokenizer, given=0.0) for document in asked], tokenizer)
    predicted, wanted = model(input_ids=ids).logits[:, :-1].argmax(-1), ids[:, 1:]
    ends = (wanted == tokenizer.eos_token_id) & (predicted == tokenizer("\n", add_special_tokens=False)["input_ids"][0])
    right = (predicted == wanted) | ends | (weights[:, 1:] == 0)
    return right.all(dim=1).float().mean().item()


def pretrain(folder: Path, options: PretrainConfig) -> None:
    """Train tokenizer and model and write them to `folder` as a Hugging Face model with a card."""
    refuse_used_folder(folder)
    tokenizer = train_tokenizer(options)
    model = build_model(options)
    say(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, options)
    loss = validation_loss(model, tokenizer, options)
    say(f"validation loss {loss:.4f} nats per token")
    skills = {task: asked_accuracy(model, tokenizer, task) for task in FAMILY_OF}
    show_table("answered exactly, asked in full", ("skill", "share"), [(t, f"{a:.3f}") for t, a in skills.items()])
    with atomic_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_text(staging / "README.md", _card(model, options, loss, skills))


def _card(model: LlamaForCausalLM, options: PretrainConfig, loss: float, skills: dict[str, float]) -> str:
    return card(
        BUNDLED,
        parameters=model.num_parameters(),
        seed=options.seed,
        steps=options.steps,
        documents=options.documents,
        length=options.length,
        loss=loss,
        skills=skills,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loramux.bases.pretrain", description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--seed", type=int, default=PretrainConfig.seed)
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 gives the same sums every time")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    pretrain(chosen.to, PretrainConfig(seed=chosen.seed, steps=chosen.steps))


if __name__ == "__main__":
    main()
