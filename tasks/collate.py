"""Padding encoded examples to one batch of tensors."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .encoding import Encoded

IGNORED = -100


def collate(
    rows: Sequence[tuple[int, Encoded]],
    pad_id: int,
    side: Literal["left", "right"] = "right",
    *,
    examples: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """One padded batch.

    Args:
        rows: (task index, encoded example) pairs.
        pad_id: what padding is filled with; any id will do, since it is masked.
        side: "right" for training, "left" for prompts that generation continues.
        examples: the index of every row in its task, to be carried along as `examples`.

    Returns:
        `input_ids`, `attention_mask` and `labels` (-100 where nothing is learnt), each (batch, longest), and `tasks`
        (and `examples`), (batch,), all int64.
    """
    longest = max(len(encoded.input_ids) for _, encoded in rows)
    shape = (len(rows), longest)
    ids, mask, labels = (
        torch.full(shape, pad_id),
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, IGNORED),
    )
    for row, (_, encoded) in enumerate(rows):
        tokens, trained = torch.tensor(encoded.input_ids), torch.tensor(encoded.trained)
        start = longest - len(tokens) if side == "left" else 0
        here = slice(start, start + len(tokens))
        ids[row, here], mask[row, here] = tokens, 1
        labels[row, here] = tokens.masked_fill(~trained, IGNORED)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch["tasks"] = torch.tensor([task for task, _ in rows])
    if examples is not None:
        batch["examples"] = torch.tensor(list(examples))
    return batch
