"""The model card of the bundled base."""

from collections.abc import Mapping

_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, tiny, loramux]
---
# {name}

A {millions:.1f} M parameter Llama, pretrained from nothing on text that `loramux/bases/corpus.py` generates: little
stories, facts about words, and exercises with their question written out. It is the frozen model that `loramux train`
adapts when no other is named: small enough for a laptop's CPU, and good enough at a few things for adapters to have
something to select.

It knows about 400 words, and nothing of the world outside them. Its longest input is {length} tokens.

```
>>> from loramux.bases import load_base
>>> model, tokenizer = load_base("{name}")
```

Made by `python -m loramux.bases.pretrain --to DIR` (seed {seed}, {steps} steps of about {documents} documents);
`loramux base --to DIR` writes the same folder out of the installed package.

Validation loss on freshly generated text: {loss:.3f} nats per token. Greedy answers that are exactly right, when the
question is asked in full, on the test inputs of the generated tasks (none of which is an input of the exercises):

| skill | asked in full |
|---|---:|
{rows}
"""


def card(
    name: str,
    *,
    parameters: int,
    seed: int,
    steps: int,
    documents: int,
    length: int,
    loss: float,
    skills: Mapping[str, float],
) -> str:
    """The card's text; `skills` maps a generated task to the share of exact answers."""
    rows = "\n".join(f"| {skill} | {share:.3f} |" for skill, share in skills.items())
    return _CARD.format(
        name=name,
        millions=parameters / 1e6,
        seed=seed,
        steps=steps,
        documents=documents,
        length=length,
        loss=loss,
        rows=rows,
    )
