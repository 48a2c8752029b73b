"""The tensors of a run by name, whole: gathered from shards to be saved, and put back."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from ..adapters.peft_config import PREFIX
from ..support.errors import RunError
from .distributed import copy_full, full_tensor
from .optimizer import parameter_names


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """Whole CPU copies of the adapter and router tensors, buffers included, by the model's own keys.

    Every process must call this, since shards are gathered.
    """
    return {key: _copied(tensor) for key, tensor in model.state_dict().items() if PREFIX in key}


def peft_names(model: PeftModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names PEFT gives them in files.

    Raises:
        RunError: PEFT would leave some out, which it does without a word when names collide.
    """
    named = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    if len(named) != len(weights):
        raise RunError(f"PEFT would save {len(named)} of the adapter's {len(weights)} tensors; nothing was written")
    return named


def load_adapter_state(model: PeftModel, saved: Mapping[str, Tensor], where: str) -> None:
    """Put saved tensors back into the model.

    Args:
        where: what they came from, for the message.

    Raises:
        RunError: when a name or a shape does not fit the model.
    """
    live = get_peft_model_state_dict(model, save_embedding_layers=False)  # not copies: writing changes the model
    check_fits({name: tuple(tensor.shape) for name, tensor in live.items()}, saved, where)
    for name, tensor in live.items():
        copy_full(tensor, saved[name])


def optimizer_state(optimizer: Any) -> dict[str, Tensor]:
    """Whole copies of the optimiser's state by `<parameter>/<slot>`. Every process must call this."""
    return {
        f"{name}/{slot}": _copied(value)
        for name, parameter in parameter_names(optimizer)
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(optimizer: Any, saved: Mapping[str, Tensor]) -> None:
    """Put saved state into a fresh optimiser over the same parameters."""
    parameters = dict(parameter_names(optimizer))
    for key, value in saved.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            optimizer.state[parameter][slot] = torch.zeros_like(parameter)
            copy_full(optimizer.state[parameter][slot], value)
        else:
            optimizer.state[parameter][slot] = value.clone()


def check_fits(expected: Mapping[str, tuple[int, ...]], saved: Mapping[str, Tensor], where: str) -> None:
    """Raise RunError, naming the tensor, unless `saved` has exactly the expected names and shapes."""
    for name in sorted({*expected, *saved}):
        if name not in saved:
            raise RunError(f"{where}: tensor {name!r} is missing")
        if name not in expected:
            raise RunError(f"{where}: tensor {name!r} does not belong to this model")
        if tuple(saved[name].shape) != expected[name]:
            raise RunError(f"{where}: tensor {name!r} has shape {tuple(saved[name].shape)}, the model {expected[name]}")


def _copied(tensor: Tensor) -> Tensor:
    return full_tensor(tensor).detach().to("cpu", copy=True)
