"""Reading a call's prompt: what routers that decide once per sequence look at."""

import inspect
from typing import Any

import torch
from torch import Tensor

from ..routing import prompt_mask
from ..routing.context import mean_pool


@torch.no_grad()
def pool_prompt(model: Any, inputs: Tensor, kwargs: dict[str, Any], mask: Tensor | None) -> Tensor:
    """`(batch, width)`: the mean last hidden state of the model over the prompt, in evaluation mode.

    Args:
        inputs: token ids `(batch, tokens)` or embeddings `(batch, tokens, width)`.
        kwargs: the keywords of the call; its attention mask and labels tell the prompt from padding and answers.
        mask: `(batch, tokens)`, true where to look; overrides what `kwargs` tell.
    """
    attention = attention_of(inputs, kwargs)
    if mask is None:
        mask = prompt_mask(attention, _prompt_labels(model, inputs, kwargs))
    encoder = encoder_of(model)
    call = {"input_ids" if inputs.dim() == 2 else "inputs_embeds": inputs, "attention_mask": attention}
    padded_left = not bool(attention[:, 0].all())
    if padded_left and "position_ids" in inspect.signature(encoder.forward).parameters:
        call["position_ids"] = (attention.cumsum(-1) - 1).clamp(min=0)
    return mean_pool(hidden_states(encoder, call), mask.bool())


@torch.no_grad()
def hidden_states(encoder: Any, call: dict[str, Any]) -> Tensor:
    """`(batch, tokens, width)`: what an encoder says in evaluation mode."""
    was_training = encoder.training
    try:
        return encoder.eval()(**call)[0]
    finally:
        encoder.train(was_training)


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Token ids `(batch, tokens)` or embeddings `(batch, tokens, width)` of the call."""
    for key in ("input_ids", "inputs", "inputs_embeds"):
        if kwargs.get(key) is not None:
            return kwargs[key]
    return args[0] if args else None


def attention_of(inputs: Tensor, kwargs: dict[str, Any]) -> Tensor:
    mask = kwargs.get("attention_mask")
    return mask if mask is not None and mask.dim() == 2 else inputs.new_ones(inputs.shape[:2], dtype=torch.long)


def _prompt_labels(model: Any, inputs: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The labels that hide answers from the router: per-token ones on the same sequence as the prompt."""
    labels = kwargs.get("labels")
    on_prompt = labels is not None and labels.shape == inputs.shape[:2] and not model.config.is_encoder_decoder
    return labels if on_prompt else None


def continues(kwargs: dict[str, Any]) -> bool:
    """Whether the call continues a sequence whose prompt was routed before."""
    cache = kwargs.get("past_key_values")
    return cache is not None and hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0


def encoder_of(model: Any) -> Any:
    """What reads the prompt: the encoder of an encoder-decoder, else the model without its head."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return getattr(model, getattr(model, "base_model_prefix", "") or "", model)


def hidden_size(model: Any) -> int:
    """The width of what `pool_prompt` returns."""
    return int(text_config(model).hidden_size)


def text_config(model: Any) -> Any:
    """What a model says of its language part, which for most is all of it."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
