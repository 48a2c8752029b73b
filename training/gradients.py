"""How well the gradients of different tasks agree on the experts they share.

Shapes: K tasks, P numbers in all expert parameters, R rows (experts) of one parameter.
"""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..adapters import LoramuxModel
from .answer_logits import Objective
from .batches import MicroBatch
from .distributed import all_sum


def task_gradient_cosines(
    objective: Objective, hub: LoramuxModel, batches: Iterable[tuple[int, MicroBatch]], accelerator: Accelerator
) -> Tensor:
    """The cosine between the gradients of each two tasks' answer loss, `(K, K)`, in float64.

    It is taken over the experts (rows of their parameters) that both tasks touch: an expert of one task alone would
    only lengthen one of the two vectors. NaN where there is none, or a task has no examples.

    Training is not disturbed: no gradient is left behind, nothing is counted, and random numbers go on as if nothing
    had been drawn. It takes K x P numbers of memory, and on several processes every one must call it.

    Args:
        objective: the loss, not wrapped.
        batches: this process's share of the examples, each batch with the number of its task.
    """
    shared, device = [parameter for _, parameter in hub.parameter_groups()["experts"]], accelerator.device
    gradients = torch.zeros(len(hub.tasks), sum(p.numel() for p in shared), device=device)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        for task, batch in batches if shared else ():
            gradients[task] += _gradient(objective, shared, batch.to(device), accelerator)
    for router in hub.routers():
        router.take_load()  # what the passes above would have added to the balance
    return _cosines(all_sum(gradients, accelerator), shared)


def _gradient(
    objective: Objective, shared: Sequence[nn.Parameter], batch: MicroBatch, accelerator: Accelerator
) -> Tensor:
    """(P,), of one micro-batch, without auxiliary losses; scaled as half-precision gradients are."""
    token_weights = torch.full(batch.answers.rows.shape, batch.share / len(batch.rows), device=accelerator.device)
    with accelerator.autocast():
        loss = objective(batch.inputs, batch.labels, batch.answers, token_weights, 0.0).total
    scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
    found = torch.autograd.grad(loss * scale, list(shared), materialize_grads=True)
    return torch.cat([gradient.flatten().float() for gradient in found])


def _cosines(gradients: Tensor, shared: Sequence[nn.Parameter]) -> Tensor:
    dots, squares = torch.zeros(2, len(gradients), len(gradients), dtype=torch.float64)
    for parameter, flat in zip(shared, gradients.split([p.numel() for p in shared], dim=1), strict=True):
        rows = flat.unflatten(1, (len(parameter), -1)).transpose(0, 1)
        products = (rows @ rows.transpose(1, 2)).double().cpu()  # (R, K, K)
        own = products.diagonal(dim1=1, dim2=2)
        dots += products.sum(0)
        squares += own.T @ (own > 0).double()  # [i, j]: the length of i's gradient where j has one too
    return dots / (squares * squares.T).sqrt()
