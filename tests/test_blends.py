"""A blend of tasks, `{"a": 0.3, "b": 0.7}` or shares `(batch, tasks)`, stands wherever a task can."""

import pytest
import torch
from cases import CASES, TASKS, a_batch, adapted, logits, trained

from loramux.adapters import exact_factors

# One for every way in which a task decides: given and learned tables, vectors, gates, matrices, averaged factors and
# leaves, routers of prompts and of tokens.
METHODS = {
    **{name: CASES[name] for name in ("clp", "task_moe", "taps", "mtl_lora", "mhr")},
    "tensorpoly": {**CASES["tensorpoly"], "variant": "II"},
    **{name: CASES[name] for name in ("moa", "task_aware_moe", "distil_gate")},
}
BY_TOKEN = {"task_aware_moe", "distil_gate"}
every_method = pytest.mark.parametrize("method", METHODS)
exact_methods = pytest.mark.parametrize("method", [name for name in METHODS if name not in BY_TOKEN])
BLEND = {"who": 0.25, "when": 0.75}
SHARES = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])


@every_method
def test_a_blend_of_one_task_is_that_task_and_a_blend_of_two_is_neither(method):
    model = trained(method, METHODS.get(method))
    torch.testing.assert_close(logits(model, routing_tasks={"where": 1.0}), logits(model, routing_tasks="where"))
    blended = logits(model, routing_tasks=BLEND)
    for task in TASKS:
        assert not torch.allclose(blended, logits(model, routing_tasks=task), atol=1e-5)


@every_method
def test_every_row_has_its_own_blend(method):
    model, batch = trained(method, METHODS.get(method)), a_batch()
    together = logits(model, routing_tasks=SHARES)
    torch.testing.assert_close(together[0], logits(model, routing_tasks=BLEND)[0], atol=1e-5, rtol=1e-5)
    for row, shares in enumerate(SHARES):
        mask = batch["attention_mask"][row : row + 1]
        with torch.no_grad():
            alone = model(input_ids=batch["input_ids"][row : row + 1], attention_mask=mask, routing_tasks=shares).logits
        torch.testing.assert_close(together[row][mask[0].bool()], alone[0][mask[0].bool()], atol=1e-5, rtol=1e-5)


@every_method
def test_beams_keep_the_blend_of_their_row(method):
    model, ids = trained(method, METHODS.get(method)), a_batch(rows=2)["input_ids"]
    settings = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, routing_tasks=SHARES[[0, 2]], **settings)
    for row, shares in enumerate(SHARES[[0, 2]]):
        assert torch.equal(model.generate(ids[row : row + 1], routing_tasks=shares, **settings)[0], together[row])
    with model.base_model.routing(BLEND):
        assert torch.equal(model.generate(ids[:1], **settings)[0], together[0])


@exact_methods
def test_a_blend_merges_and_is_one_lora_per_layer(method):
    model = trained(method, METHODS.get(method))
    hub = model.base_model
    routed = logits(model, routing_tasks=BLEND)
    with hub.using_factors(exact_factors(hub, BLEND)):
        torch.testing.assert_close(logits(model), routed, atol=1e-5, rtol=1e-5)
    with hub.routing(BLEND):
        torch.testing.assert_close(logits(model), routed)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), routed, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()


@pytest.mark.parametrize(
    "method", ["clp", "mtlora", "skillnet", "alter", "moelora", "dselect_k", "taps", "task_moe", "moa"]
)
def test_where_outputs_are_mixed_a_blend_is_the_weighted_sum_of_the_tasks_updates(method):
    hub = trained(method, METHODS.get(method)).base_model
    alone = {task: exact_factors(hub, task) for task in BLEND}
    for name, pair in exact_factors(hub, BLEND).items():
        expected = sum(share * alone[task][name].delta() for task, share in BLEND.items())
        torch.testing.assert_close(pair.delta(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["poly", "clp", "task_aware_moe"])
def test_routing_is_counted_for_the_task_with_the_largest_share(method):
    model = trained(method, METHODS.get(method))
    with model.base_model.collect_statistics() as seen:
        logits(model, routing_tasks=SHARES)
    layer = next(iter(seen.layers.values()))
    real = a_batch()["attention_mask"].sum(-1)
    assert layer.tokens.flatten().tolist() == [real[3], real[1], real[0] + real[2]]


def test_a_blend_trains_every_expert_by_its_share():
    model = adapted("clp").train()
    with torch.no_grad():
        for layer in model.base_model.layers().values():
            bank = layer.branches("default")[0].bank
            bank.down.copy_(bank.down[:1].expand_as(bank.down))  # alike, so that their gradients differ by shares alone
    model(**a_batch(), routing_tasks={"who": 0.2, "where": 0.8}).loss.backward()
    for layer in model.base_model.layers().values():
        gradient = layer.branches("default")[0].bank.up.grad
        torch.testing.assert_close(gradient[1], 4 * gradient[0])
        assert (gradient[2] == 0).all()
