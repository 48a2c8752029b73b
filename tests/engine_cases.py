"""What the tests of the server share: a tiny base, adapters for it, and what stock PEFT answers with them."""

import threading
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loramux.adapters.lora_folder import read_lora
from loramux.bases import load_base
from loramux.serving.factors import FactorLayout, PackedLora
from loramux.serving.request import BASE, Chunk, Event, Failed, Finished, Request, Route, Sampling

GREEDY = Sampling(max_tokens=8, temperature=0.0)


def tiny_base():
    return load_base("loramux/tiny")


def save_lora(
    folder: Path, base, seed: int, rank: int = 4, targets: str | list[str] = "all-linear", size: float = 0.3
) -> Path:
    """A LoRA folder by stock PEFT, with random factors that are large enough to change answers."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(
                parameter, std=size / rank**0.5 / (1 if "lora_B" in name else parameter.shape[1] ** 0.5)
            )
    model.save_pretrained(folder)
    model.unload()
    return folder


def packed(folder: Path, base, layout: FactorLayout) -> PackedLora:
    return layout.pack(read_lora(folder, base).factors, base.dtype)


def route(name: str, *parts: tuple[PackedLora, float]) -> Route:
    return Route(name=name, weights="+".join(f"{id(lora)}*{share}" for lora, share in parts) or name, parts=parts)


@torch.inference_mode()
def generated(model, prompt: list[int], new: int) -> list[int]:
    """What stock generate answers greedily."""
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return output[0, len(prompt) :].tolist()


def stock_answer(base, folder: Path, prompt: list[int], new: int = 8) -> list[int]:
    model = PeftModel.from_pretrained(base, folder)
    try:
        return generated(model, prompt, new)
    finally:
        model.unload()


class Answer:
    """Collects the events of one request."""

    def __init__(self, engine, prompt: list[int], sampling: Sampling = GREEDY, where: Route = BASE, **kwargs) -> None:
        self.events: list[Event] = []
        self._done = threading.Event()
        self.request = Request(prompt, sampling, where, self._take, **kwargs)
        engine.submit(self.request)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, Chunk):
            self._done.set()

    def wait(self, timeout: float = 60) -> "Answer":
        assert self._done.wait(timeout), "no answer"
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.wait().events if isinstance(event, Chunk))

    @property
    def last(self) -> Finished | Failed:
        return self.wait().events[-1]

    @property
    def tokens(self) -> list[int]:
        """The chosen tokens; for requests that asked for logprobs."""
        return [t.token for event in self.wait().events if isinstance(event, Chunk) for t in event.tokens]
