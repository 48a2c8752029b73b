"""The base's weights as a CPU multiplies them fastest: laid out once by oneDNN, and not anew at every product.

A decoding step multiplies every weight by a handful of rows, so laying it out takes longer than the product itself.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .slots import adaptable_linears


class PackedLinear(nn.Linear):
    """A frozen linear whose weight lies in memory as oneDNN reads it; `weight.to_dense()` is the plain one."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


@torch.no_grad()
def pack_linears(model: Any) -> int:
    """Pack the linears of a frozen model in place, where this machine and this model can run them so.

    Products may differ from those of plain linears in the last bits, as they do between batches of different sizes. A
    weight that something else shares, such as the embeddings, stays there beside its packed copy.

    Returns:
        How many linears are packed: none where the model reads a weight by itself.
    """
    every = (*adaptable_linears(model).values(), model.get_output_embeddings())
    linears = [linear for linear in every if _can_be_packed(linear)]
    for linear in linears:
        _pack(linear)
    try:
        _try(model)
    except Exception:  # whatever a model does with a weight that it reads by itself
        for linear in linears:
            _unpack(linear)
        return 0
    return len(linears)


def _can_be_packed(linear: nn.Module | None) -> TypeGuard[nn.Linear]:
    if type(linear) is not nn.Linear or linear.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if linear.weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return linear.weight.dtype == torch.float32


def _pack(linear: nn.Linear) -> None:
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight, None)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.__class__ = PackedLinear


def _unpack(linear: nn.Linear) -> None:
    linear.__class__ = nn.Linear
    linear.weight = nn.Parameter(linear.weight.to_dense(), requires_grad=False)


def _try(model: Any) -> None:
    """A prompt of two tokens and one more after it: models treat these differently."""
    first = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=True)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=first.past_key_values)
