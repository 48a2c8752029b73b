"""The pass of the frozen base that some routers read before the pass that answers (X-LoRA).

Decoding with a cache needs what the base made of all earlier tokens, and that is not what the adapted model made of
them. So the base keeps keys and values of its own. They stand in the model's cache, behind its own layers: whatever is
done to the cache between two steps (beams reorder it, options copy it, assistants crop it) is done to both.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache

from ..support.errors import AdapterError
from .prompt import encoder_of, hidden_states

_LAYERS_BEHIND = "loramux_layers_of_first_pass"
_NOT_FOR_BASE = {"labels", "return_dict", "output_attentions", "output_hidden_states"}


@contextmanager
def reading_first(model: Any, decide: Callable[[Callable[[], Tensor]], None]) -> Iterator[None]:
    """In the block, `decide` is called before every call of the model, with what gives the base's hidden states.

    Args:
        model: the transformers model, whose adapters `decide` must bypass while it asks for hidden states.
    """
    current: _Pass | None = None
    reads = False

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal current, reads
        if not reads:  # a model without a head reads by calling itself
            current, reads = _Pass(model, args, kwargs), True
            decide(current.hidden_states)
            reads = False

    def after(_: Any, __: tuple[Any, ...], output: Any) -> None:
        if not reads and current is not None:
            current.keep(output)

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Pass:
    """One call of the model, and the base's pass before it."""

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model = model
        self._call = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        self._own: Cache | None = None

    def hidden_states(self) -> Tensor:
        """`(batch, tokens, width)`, of the tokens of this call.

        Raises:
            AdapterError: when the call continues a sequence whose beginning the base has not read.
        """
        encoder = encoder_of(self._model)
        accepted = inspect.signature(encoder.forward).parameters
        call = {name: value for name, value in self._call.items() if name in accepted and name not in _NOT_FOR_BASE}
        if "past_key_values" in accepted:
            self._own = self._cache()
            call |= {"past_key_values": self._own, "use_cache": self._own is not None}
        return hidden_states(encoder, call)

    def keep(self, output: Any) -> None:
        """Put what the base keeps of a new sequence into the model's cache, where there is one."""
        parts = output.to_tuple() if hasattr(output, "to_tuple") else output
        cache = next((part for part in parts if isinstance(part, Cache)), None)
        if self._own is not None and cache is not None and not hasattr(cache, _LAYERS_BEHIND):
            cache.layers.extend(self._own.layers)
            setattr(cache, _LAYERS_BEHIND, len(self._own.layers))

    def _cache(self) -> Cache | None:
        """The base's cache: the end of the model's, a new one at the beginning, or None where the call uses none."""
        cache = self._call.get("past_key_values")
        behind = getattr(cache, _LAYERS_BEHIND, 0)
        if behind:
            return Cache(layers=cache.layers[-behind:])  # type: ignore[union-attr]
        if cache is not None and cache.get_seq_length() > 0:
            raise AdapterError(
                "this adapter is routed by a first pass of the base, which has not read the tokens in past_key_values; "
                "start from the prompt with this adapter active, or give all tokens at once with use_cache=False"
            )
        if cache is not None and type(cache) is not DynamicCache:
            raise AdapterError(
                "this adapter is routed by a first pass of the base, whose keys and values go into a DynamicCache; got "
                f"a {type(cache).__name__}: leave cache_implementation out, or say use_cache=False"
            )
        uses = self._call.get("use_cache")
        if uses is None:
            uses = getattr(self._model.config, "use_cache", False) and not self._model.training
        return DynamicCache(config=self._model.config) if uses else None
