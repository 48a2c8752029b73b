"""Banks whose factors a shared network makes from codes: Hyper-X and Polyhistor."""

import copy
import math

import pytest
import torch
from cases import CASES, TASKS, adapted, logits, tiny_llama, train_a_little, trained
from peft import PeftModel

from loramux.adapters import Hyper, Linear, StageConfig, Template, count_parameters, exact_factors, method_config
from loramux.support.errors import ConfigError

INVARIANT = {**CASES["hyperx"], "magnitude_invariant": True}
FOUR = ["ner-en", "ner-de", "pos-en", "pos-de"]
PAIRS = {
    "kinds": dict(zip(FOUR, ["ner", "ner", "pos", "pos"], strict=True)),
    "languages": dict(zip(FOUR, ["en", "de", "en", "de"], strict=True)),
}


BANKS = {
    "hyper": Hyper(tasks=(0, 1, 0), languages=(0, 0, 1), rank=2, code=6, source=8),
    "invariant hyper": Hyper(tasks=(0, 1, 0), languages=(0, 0, 1), rank=2, code=6, source=8, magnitude_invariant=True),
    "template": Template(experts=3, rank=4, template_width=8, code=6, hidden=5),
}
every_bank = pytest.mark.parametrize("config", BANKS.values(), ids=BANKS)


def built(config, inputs=12, outputs=10):
    """A bank, and what it would have in common with others."""
    bank, common = config.build(inputs, outputs), config.common([(inputs, outputs)])
    bank.share(common)
    return bank, common


def scrambled(*modules):
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.normal_()


def delta_of(model: PeftModel, task: object) -> torch.Tensor:
    """The weight update of one layer, flat."""
    with model.base_model.routing(task):
        return next(iter(model.base_model.layers().values())).get_delta_weight("default").flatten()


@every_bank
def test_there_is_one_expert_per_task_and_it_starts_at_nothing(config):
    torch.manual_seed(0)
    bank, _ = built(config)
    down, up = bank.factors()
    assert down.shape == (3, config.rank, 12)
    assert up.shape == (3, config.rank, 10)
    assert (up == 0).all()
    wide = torch.cat([built(config, inputs=64)[0].factors()[0].flatten() for _ in range(100)])
    assert wide.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.06)  # as LoRA's A


@every_bank
def test_resetting_leaves_no_task_an_expert(config):
    bank, common = built(config)
    scrambled(bank, common)
    _, up = bank.factors()
    assert not torch.allclose(up[0], up[1])
    bank.reset_parameters()
    common.reset_parameters()
    assert (bank.factors()[1] == 0).all()


def test_a_template_is_stretched_by_a_kronecker_product_and_cut_to_length():
    bank, common = built(BANKS["template"])
    scrambled(bank, common)
    templates, _ = common(torch.eye(3))
    for factor, template in zip(bank.factors()[0], templates, strict=True):
        torch.testing.assert_close(factor, torch.kron(bank.down, template)[:, :12])


@pytest.mark.parametrize("method", ["hyperx", "polyhistor"])
def test_a_blend_of_tasks_is_made_of_the_blend_of_their_codes_and_not_of_their_outputs(method):
    model = trained(method)
    blend = delta_of(model, {"who": 0.5, "when": 0.5})
    mean = (delta_of(model, "who") + delta_of(model, "when")) / 2
    assert not torch.allclose(blend, mean, rtol=1e-2)
    with torch.no_grad():  # two tasks of one code are one task, and so is their blend
        common = model.base_model.loramux_banks.default["0"]
        common.tasks[2] = common.tasks[0]
        if method == "hyperx":
            common.languages[1] = common.languages[0]
    torch.testing.assert_close(delta_of(model, {"who": 0.5, "when": 0.5}), delta_of(model, "who"))


def test_a_pair_that_was_never_trained_is_made_of_its_task_and_its_language():
    model = adapted("hyperx", {**CASES["hyperx"], **PAIRS}, tasks=FOUR)
    assert model.base_model.loramux_banks.default["0"].tasks.shape == (2, 6)
    train_a_little(model, steps=4, tasks=3)  # pos-de is the fourth
    assert not torch.equal(logits(model, routing_tasks="pos-de"), logits(tiny_llama()))
    assert not torch.equal(logits(model, routing_tasks="pos-de"), logits(model, routing_tasks="pos-en"))


def test_what_the_magnitude_invariant_network_reads_has_one_size_whatever_the_codes():
    model = trained("hyperx", INVARIANT)
    network = model.base_model.loramux_banks.default["0"]
    seen = []
    network.source.register_forward_pre_hook(lambda module, args: seen.append(args[0].norm(dim=-1)))
    with torch.no_grad():
        network.tasks[1] *= 100
    logits(model, routing_tasks=["who", "where", "when", "where"])
    torch.testing.assert_close(torch.cat(seen), torch.full((14 * 4,), (3 * 6) ** 0.5))


def test_the_magnitude_invariant_form_starts_at_the_base_saves_and_exports_exactly(tmp_path):
    assert torch.equal(logits(adapted("hyperx", INVARIANT).eval(), routing_tasks="who"), logits(tiny_llama()))
    model = trained("hyperx", INVARIANT)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    for task in TASKS:
        routed = logits(model, routing_tasks=task)
        assert torch.equal(logits(again, routing_tasks=task), routed)
        with model.base_model.using_factors(exact_factors(model.base_model, task)):
            assert (logits(model) - routed).abs().max() < 1e-4


def test_one_network_serves_all_layers_and_a_copy_of_the_model_has_its_own():
    model = adapted("polyhistor")
    copied = copy.deepcopy(model)
    for each in (model, copied):
        banks = [layer.branches("default")[0].bank for layer in each.base_model.layers().values()]
        assert all(bank.common is each.base_model.loramux_banks.default["0"] for bank in banks)
    assert banks[0].common is not model.base_model.loramux_banks.default["0"]


def test_a_stage_can_make_the_experts_new_and_their_network_with_them():
    model = trained("hyperx")
    hub = model.base_model
    hub.finish_stage(StageConfig(after=("reset_experts",)), prompts=list)
    assert torch.equal(logits(model, routing_tasks="who"), logits(tiny_llama()))


@pytest.mark.parametrize(
    ("method", "layer", "shared"),
    [
        # a layer's code; three tasks, two languages, two maps, and one head per shape
        ("hyperx", 6, 3 * 6 + 2 * 6 + (18 * 8 + 8) + (8 * 8 + 8) + (8 + 1) * 4 * (32 + 48)),
        # two kernels of 4 / 2 rows; three tasks, a map to the hidden width, two templates of 2 x 8
        ("polyhistor", 2 * (4 + 6), 3 * 6 + 6 * 4 + 2 * 4 * 16),
    ],
)
def test_parameters_are_few_per_layer_and_the_rest_is_shared(method, layer, shared):
    config = method_config(method, tasks=TASKS, options=CASES[method])
    for layers in (1, 5):
        counted = count_parameters(config, [Linear(32, 48)] * layers, tasks=3, hidden_size=32)
        assert counted == layers * layer + shared


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("hyperx", {"languages": {"who": "en"}}, "languages: nothing said of where, when"),
        ("hyperx", {"kinds": {"whom": "x"}}, "kinds: unknown task 'whom'; did you mean 'who'"),
        ("polyhistor", {"rank": 8, "template_rank": 3}, r"template_rank \(=3\) must divide rank \(=8\)"),
    ],
)
def test_options_that_do_not_fit_the_tasks_or_each_other_are_refused(method, options, message):
    with pytest.raises(ConfigError, match=message):
        method_config(method, tasks=TASKS, options=options)


def test_blocks_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="2 experts need as many languages, got 1"):
        Hyper(tasks=(0, 1), languages=(0,))
    with pytest.raises(ValueError, match=r"hidden \(=0\) must be at least 1"):
        Template(experts=1, hidden=0)
