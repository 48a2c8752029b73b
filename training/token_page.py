"""One HTML page of text in which every token has the colour of its expert. It needs nothing but itself.

The texts are anybody's. They reach the page as JSON in which no markup can begin, the script writes them as text only,
and the page's own policy lets no other script run and nothing be fetched.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..adapters import LoramuxModel
from ..support.files import write_text
from ..tasks import EncodedTask
from .evaluate import Question, Routing, eval_mode, questions
from .token_page_parts import PAGE, SCRIPT, STYLE
from .usage import read

_MOST_TOKENS = 400
_SHOWN = 3
_WHOLE = 65535
_HALF_A_LETTER = "\ufffd"


@dataclass(frozen=True)
class TracedText:
    """One example and where its tokens went.

    Attributes:
        tokens: what each token adds to the text.
        prompt_length: tokens before the answer.
        routes: per layer the experts with the largest shares, `(tokens, up to 3)`, and those shares.
    """

    task: str
    tokens: list[str]
    prompt_length: int
    routes: dict[str, tuple[Tensor, Tensor]]


@dataclass
class RouteTrace:
    """Keeps what was decided in one call, `(batch, ..., gates)` by layer."""

    weights: dict[str, Tensor] = field(default_factory=dict)

    def add(self, layer: str, weights: Tensor, mask: Tensor | None, tasks: Tensor | None, groups: int = 1) -> None:
        self.weights[layer] = weights.detach()


@torch.no_grad()
def trace_texts(
    model: nn.Module,
    hub: LoramuxModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EncodedTask],
    layers: Sequence[str],
    *,
    split: str,
    count: int,
    routing: Routing,
) -> list[TracedText]:
    """Run `count` examples of every task, with their reference answers, and note where `layers` send each token."""
    traced = []
    with eval_mode(model):
        for task in tasks:
            for question in questions(task, split, count):
                trace = RouteTrace()
                with hub.observing_routes(trace):
                    read(model, tokenizer, [question], task.name, routing)
                routes = {name: _largest(trace.weights[name]) for name in layers if name in trace.weights}
                traced.append(_traced(task.name, question, tokenizer, routes))
    return traced


def write_page(
    path: Path, texts: Sequence[TracedText], gates: Mapping[str, int], experts: Sequence[str] | None, *, title: str
) -> None:
    """Write the page.

    Args:
        gates: the number of experts of every layer, in the order of the page's list.
        experts: what they are called, where they have names.
    """
    data = {
        "shown": {name: min(_SHOWN, count) for name, count in gates.items()},
        "gates": dict(gates),
        "experts": experts,
        "texts": [
            {
                "task": text.task,
                "tokens": text.tokens,
                "prompt": text.prompt_length,
                "routes": {name: _packed(*found) for name, found in text.routes.items()},
            }
            for text in texts
        ],
    }
    page = Template(PAGE).substitute(
        title=html.escape(title),
        style=STYLE,
        script=SCRIPT,
        style_hash=_policy_hash(STYLE),
        script_hash=_policy_hash(SCRIPT),
        data=_harmless(json.dumps(data)),
    )
    write_text(path, page)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; its name in the vocabulary where that is nothing, or half a letter."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)).rstrip(_HALF_A_LETTER)
        added = whole[len(before) :] if whole.startswith(before) else ""
        texts.append(added or str(tokenizer.convert_ids_to_tokens(int(ids[end - 1]))))
        before = whole
    return texts


def _traced(
    task: str, question: Question, tokenizer: PreTrainedTokenizerBase, routes: dict[str, tuple[Tensor, Tensor]]
) -> TracedText:
    encoded = question.encoded
    tokens = token_texts(tokenizer, encoded.input_ids[:_MOST_TOKENS])
    if len(encoded.input_ids) > _MOST_TOKENS:
        tokens[-1] += f" [{len(encoded.input_ids) - _MOST_TOKENS} more tokens]"
    kept = {name: (experts[:_MOST_TOKENS], shares[:_MOST_TOKENS]) for name, (experts, shares) in routes.items()}
    return TracedText(task, tokens, encoded.prompt_length, kept)


def _largest(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The experts `(tokens, up to 3)` with the largest shares of a token's weights, and the shares."""
    sizes = weights.float().abs().reshape(-1, weights.shape[-1]).cpu()
    shares, experts = (sizes / sizes.sum(-1, keepdim=True).clamp(min=1e-12)).topk(min(_SHOWN, sizes.shape[-1]))
    return experts, shares


def _packed(experts: Tensor, shares: Tensor) -> str:
    """Expert and share of every token, as 16-bit numbers side by side, in base64."""
    pairs = torch.stack([experts.int(), (shares * _WHOLE).round().int()], dim=-1)
    return base64.b64encode(pairs.numpy().astype("<u2").tobytes()).decode()


def _harmless(text: str) -> str:
    """JSON without any character that could begin or end markup."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
