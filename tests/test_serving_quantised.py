"""Adapters beside linears whose weights are held in a few bits."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the extra loramux[quantized] is not installed")

from engine_cases import GREEDY, Answer, packed, route, save_lora, tiny_base

from loramux.bases import BUNDLED, load_base
from loramux.serving.engine import Engine
from loramux.serving.slots import layout_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_answers_nearly_as_the_whole_one_with_the_same_adapter(tmp_path, bits):
    whole, tokenizer = tiny_base()
    folder = save_lora(tmp_path / "lora", whole, 0)
    quantised, _ = load_base(BUNDLED, quantize=bits)
    assert any("bitsandbytes" in type(module).__module__ for module in quantised.modules())
    prompt, first = tokenizer("one old wolf")["input_ids"], {}
    for name, model in (("whole", whole), ("quantised", quantised)):
        layout = layout_of(model)
        lora = packed(folder, whole, layout)
        engine = Engine(model, tokenizer, layout)
        engine.start()
        sampling = replace(GREEDY, max_tokens=1, logprobs=20)
        answer = Answer(engine, prompt, sampling, route("lora", (lora, 1.0))).wait()
        first[name] = {token: logprob for token, _, logprob in answer.events[0].tokens[0].top}
        engine.stop()
    shared = [token for token in first["whole"] if token in first["quantised"]]
    assert len(shared) >= 10
    differences = torch.tensor([first["whole"][token] - first["quantised"][token] for token in shared])
    assert differences.abs().mean() < (0.05 if bits == "8bit" else 1.0)
