"""Adapters beside the frozen linears: every row of a batch its own, with no loop over adapters.

Forward hooks on the linears add what the rows' adapters say. One adapter for all rows is one product; different ones
are batched products over vectors that were gathered when rows came and went, not at every step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .factors import FactorLayout, Group, combine
from .request import Route

_BASE_LAYER = ".base_layer"


def adaptable_linears(model: Any) -> dict[str, nn.Module]:
    """The linears that adapters may change, by their names in the bare base: all but the output layer."""
    head = model.get_output_embeddings()
    return {
        name.removesuffix(_BASE_LAYER): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and "loramux_" not in name
    }


@torch.inference_mode()
def layout_of(model: Any) -> FactorLayout:
    """Which adaptable linears read the same input, found by running one token through the model."""
    linears = adaptable_linears(model)
    inputs: dict[str, Tensor] = {}

    def noting(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0]

        return note

    hooks = [linear.register_forward_pre_hook(noting(name)) for name, linear in linears.items()]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    together: dict[object, list[str]] = {}
    for name in linears:
        together.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    return FactorLayout(tuple(_group(names, linears) for names in together.values()))


def _group(names: Sequence[str], linears: dict[str, nn.Module]) -> Group:
    sizes = [_features(linears[name]) for name in names]
    return Group(tuple(names), sizes[0][0], tuple(out for _, out in sizes))


def _features(linear: nn.Module) -> tuple[int, int]:
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features  # type: ignore[return-value]


class RowAdapters:
    """What the adapters of a batch's rows add, ready to be multiplied.

    Rows are kept in the order of the batch; `add` and `remove` keep step with its cache. Factors are gathered when they
    are next used, so that rows that come together are gathered together.

    Args:
        dtype: that the products are made in; the linears may have another one.

    Attributes:
        rank: that the products have for all rows, whose own may be lower.
    """

    def __init__(self, layout: FactorLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout, self._dtype, self._device = layout, dtype, device
        self._routes: list[Route] = []
        self.rank = 0
        self._vectors = torch.empty(0, 0)
        self._gathered: list[str] = []  # whose factors each vector holds
        self._operands: list[_Operands | None] | None = None

    def add(self, route: Route) -> None:
        self._routes.append(route)
        self._operands = None

    def remove(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        last = self._routes.pop()
        if row < len(self._routes):
            self._routes[row] = last
        self._operands = None

    def operands(self) -> list["_Operands | None"]:
        """By group of linears: the factors of all rows, or None where no row has any."""
        if self._operands is None:
            self._operands = self._prepare()
        return self._operands

    def _prepare(self) -> list["_Operands | None"]:
        touched = {group for route in self._routes for lora, _ in route.parts for group in lora.groups}
        if not touched:
            return [None] * len(self._layout.groups)
        one_for_all = len({route.weights for route in self._routes}) == 1
        vectors = self._gather(self._routes[:1] if one_for_all else self._routes)
        views = enumerate(self._layout.views(vectors, self.rank))
        return [
            _Operands(downs.flatten(1, 2).transpose(1, 2), ups, self.rank) if number in touched else None
            for number, (_, downs, ups) in views
        ]

    def _gather(self, routes: Sequence[Route]) -> Tensor:
        """The vectors of these routes, `(routes, rank * width)`."""
        rank, room = max(route.rank for route in routes), len(self._vectors)
        is_too_wide = 2 * rank <= self.rank  # a wide adapter has left; all others would go on paying for it
        if rank > self.rank or is_too_wide or len(routes) > room:
            room = room if len(routes) <= room else max(len(routes), 2 * room)
            self.rank = rank
            self._vectors = torch.empty(room, rank * self._layout.width, dtype=self._dtype, device=self._device)
            self._gathered = [""] * room
        for row, route in enumerate(routes):
            if self._gathered[row] != route.weights:
                combine(self._layout, route.parts, self.rank, self._vectors[row])
                self._gathered[row] = route.weights
        return self._vectors[: len(routes)]


class _Operands:
    """The factors of a group of linears, for every row of a batch, or one for all rows.

    Args:
        down: A of all linears of the group side by side, `(rows, in_features, linears * rank)`.
        ups: B by linear, `(rows, rank, out_features)`.
    """

    def __init__(self, down: Tensor, ups: list[Tensor], rank: int) -> None:
        self._down, self._ups, self._rank = down, ups, rank
        self._one_for_all = len(down) == 1
        self._input: Tensor | None = None
        self._hidden: Tensor | None = None

    def add_to(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """`output` plus what linear `index` of the group gains for its input `x (rows, ..., in_features)`; in place."""
        if self._input is not x:
            self._input, self._hidden = x, self._shrunk(x)
        assert self._hidden is not None
        hidden = self._hidden[..., index * self._rank : (index + 1) * self._rank]
        if index == len(self._ups) - 1:
            self._input = self._hidden = None
        up = self._ups[index]
        if self._one_for_all:
            hidden, up = hidden[None], up[:1]
        if output.dtype == up.dtype:
            output.view(len(hidden), -1, output.shape[-1]).baddbmm_(hidden, up)
        else:
            output += torch.bmm(hidden, up).view_as(output).to(output.dtype)
        return output

    def _shrunk(self, x: Tensor) -> Tensor:
        x = x.to(self._down.dtype)
        if self._one_for_all:
            return x.reshape(-1, x.shape[-1]) @ self._down[0]
        return torch.bmm(x.reshape(len(self._down), -1, x.shape[-1]), self._down)


class Slots:
    """The hooks on the linears of a model; `serving(rows)` says whose adapters act."""

    def __init__(self, model: Any, layout: FactorLayout) -> None:
        self._operands: Sequence[_Operands | None] = [None] * len(layout.groups)
        linears = adaptable_linears(model)
        self._hooks = [
            linears[name].register_forward_hook(self._hook(number, index))
            for number, group in enumerate(layout.groups)
            for index, name in enumerate(group.names)
        ]

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def serving(self, rows: RowAdapters) -> Iterator[None]:
        """Let the adapters of these rows act in the block."""
        self._operands = rows.operands()
        try:
            yield
        finally:
            self._operands = [None] * len(self._operands)

    def _hook(self, number: int, index: int) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            operands = self._operands[number]
            return None if operands is None else operands.add_to(output, args[0], index)

        return add
