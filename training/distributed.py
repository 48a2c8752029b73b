"""One or many processes: the accelerator, DDP and FSDP wrapping, and tensors that may be sharded."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ..support.console import console
from ..support.errors import ConfigError, did_you_mean
from .answer_logits import base_of
from .recipe import TrainConfig

_SHARDING_LAUNCHERS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def make_accelerator(config: TrainConfig, folder: Path | None = None) -> Accelerator:
    """The accelerator of a run; processes come from `accelerate launch` or `torchrun`.

    Raises:
        ConfigError: for a precision or a tracker this machine does not have, or a launcher set to shard on its own.
    """
    has_device = torch.accelerator.is_available()
    if config.precision == "fp16" and not has_device:
        raise ConfigError("train.precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    for variable in _SHARDING_LAUNCHERS:
        if os.environ.get(variable, "").lower() == "true":
            raise ConfigError(
                f"the launcher was told to shard ({variable}); launch plain processes and say train.distributed: fsdp "
                "in the recipe, which shards the same way on CPUs and GPUs"
            )
    _check_trackers(config.trackers)
    AcceleratorState._reset_state()  # a later run in the same process may use another precision
    accelerator = Accelerator(
        cpu=not has_device,
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=list(config.trackers) or None,
        project_dir=folder / "trackers" if folder else None,
        # A model may hold linears that text never reaches.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    console.quiet = not accelerator.is_main_process
    return accelerator


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard the weights of a PEFT model in place over all processes with torch's FSDP2, one unit per decoder layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes = accelerator.num_processes

    def placement(parameter: nn.Parameter) -> Shard:
        """A single stacked expert `[1, r, d]` would lie on one process whole; it is cut along a later dimension."""
        fitting = [dim for dim, size in enumerate(parameter.shape) if size % processes == 0]
        return Shard(fitting[0] if fitting else 0)

    model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (processes,))
    blocks = set(getattr(base_of(model), "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)


@contextmanager
def gradients_kept_local(wrapped: nn.Module, model: Any, local: bool) -> Iterator[None]:
    """While accumulating, leave gradients on their process; the last micro-batch reduces them all at once."""
    sharded = hasattr(model, "set_requires_gradient_sync")
    if sharded:
        model.set_requires_gradient_sync(not local)
    no_sync = getattr(wrapped, "no_sync", nullcontext)
    with no_sync() if local else nullcontext():
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of a shard (every process must call this), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full(target: Tensor, full: Tensor) -> None:
    """Write a whole tensor into `target`, which may be a shard."""
    full = full.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements)
    target.copy_(full)


def rows_like(stacked: Tensor, values: Tensor) -> Tensor:
    """`values` (E,), equal on all processes, as `[E, 1, ...]` to be combined with `stacked` `[E, ...]`."""
    shaped = values.view(-1, *[1] * (stacked.dim() - 1)).to(stacked.device)
    if isinstance(stacked, DTensor):
        return DTensor.from_local(shaped, stacked.device_mesh, [Replicate()], run_check=False)
    return shaped


def all_sum(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Sum a tensor over all processes; the sum lies where the tensor lay."""
    if accelerator.num_processes == 1:
        return values
    total = values.to(accelerator.device)
    dist.all_reduce(total)
    return total.to(values.device)


def all_listed(items: Iterable[Any]) -> list[Any]:
    """The items of all processes in one list."""
    return gather_object(list(items))


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0]


def _check_trackers(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"train.trackers: unknown tracker {name!r}; {did_you_mean(name, LOGGER_TYPE_TO_CLASS)}")
