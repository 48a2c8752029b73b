"""A task joins a trained hub: every method takes it in, and the tasks that were there do not notice."""

import pytest
import torch
from cases import CASES, TASKS, a_batch, adapted, logits, tiny_llama, trained

from loramux.adapters.joining import even_blend
from loramux.support.errors import AdapterError, ConfigError

SAID_BY_TASK = {
    "hyperx": {"languages": {**CASES["hyperx"]["languages"], "new": "fr"}},
    "madx": {"languages": {**CASES["madx"]["languages"], "new": "fr"}},
    "skillnet": {"skills": {**CASES["skillnet"]["skills"], "new": ["c", "a new one"]}},
}
MOVES_OTHERS = {"arrow", "xlora"}  # their tokens choose among all experts, whatever the task
every_method = pytest.mark.parametrize("method", sorted(set(CASES) - MOVES_OTHERS))
with_a_row = pytest.mark.parametrize(
    "method", ["hyperx", "mhr", "mtl_lora", "poly", "polyhistor", "scalearn", "task_aware_moe", "task_moe"]
)
with_an_expert = pytest.mark.parametrize(
    "method", ["alter", "clp", "distil_gate", "madx", "moa", "mtlora", "palora", "router_retriever", "skillnet", "taps"]
)


def joined(method):
    """A trained hub, what it says for its tasks, and the task that has just joined it."""
    model = trained(method)
    before = {task: logits(model, routing_tasks=task) for task in TASKS}
    return model, before, model.base_model.add_task("new", SAID_BY_TASK.get(method))


def train_the_new_task(model, held, steps=3):
    hub = model.base_model
    hub.hold(held)
    held.freeze()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(**a_batch(), routing_tasks="new").loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hub.finish_step()
    model.eval()


@every_method
def test_a_task_joins_without_moving_the_others(method):
    model, before, _ = joined(method)
    for task in TASKS:
        assert torch.equal(logits(model, routing_tasks=task), before[task])
    assert logits(model, routing_tasks="new").isfinite().all()


@with_a_row
def test_a_row_trains_alone_and_moves_the_new_task_only(method):
    model, before, new = joined(method)
    assert "row" in new.brings
    new.start_at_mean()
    start = logits(model, routing_tasks="new")
    train_the_new_task(model, new.all_but({"row"}))
    assert not torch.equal(logits(model, routing_tasks="new"), start)
    for task in TASKS:
        assert torch.equal(logits(model, routing_tasks=task), before[task])


@with_an_expert
def test_an_expert_trains_alone_and_moves_the_new_task_only(method):
    model, before, new = joined(method)
    assert "expert" in new.brings
    start = logits(model, routing_tasks="new")
    train_the_new_task(model, new.all_but({"expert", "row", "gate", "class"}))
    assert not torch.equal(logits(model, routing_tasks="new"), start)
    for task in TASKS:
        assert torch.equal(logits(model, routing_tasks=task), before[task])


def test_with_all_experts_the_other_tasks_move_and_their_rows_do_not():
    model, before, new = joined("mhr")
    tables = [part for part in new.parts if part.kind == "row"]
    rows = [part.tensor[: part.known].clone() for part in tables]
    train_the_new_task(model, new.all_but({"row", "all experts"}))
    assert all(torch.equal(part.tensor[: part.known], old) for part, old in zip(tables, rows, strict=True))
    assert not any(torch.equal(logits(model, routing_tasks=task), before[task]) for task in TASKS)


def test_parameters_are_counted_as_they_train():
    _, _, new = joined("mhr")
    layers, (skills, rank, splits) = 14, (3, 4, 4)
    assert new.count({"row"}) == layers * skills * splits
    assert new.count({"row", "all experts"}) == new.count({"row"}) + sum(
        skills * rank * (part.tensor.shape[-1]) for part in new.parts if part.kind == "expert"
    )
    assert new.count({"expert"}) == new.count(set()) == 0


def test_a_row_starts_as_the_mean_of_the_others():
    _, _, new = joined("mtl_lora")
    new.start_at_mean()
    rows = [part for part in new.parts if part.kind == "row"]
    assert {part.tensor.dim() for part in rows} == {2, 3}  # scores over heads, and task matrices
    for part in rows:
        torch.testing.assert_close(part.tensor[-1], part.tensor[:3].mean(0))


def test_gates_of_a_new_expert_are_closed_to_the_tasks_before_it():
    model, _, _ = joined("alter")
    for layer in model.base_model.layers().values():
        weights = layer.branches("default")[0].router.settled(torch.arange(4)).weights
        assert torch.equal(weights[:3, 3], torch.zeros(3))
        assert weights[3].argmax() == 3


def test_an_expert_can_start_as_a_blend_of_the_others():
    model, before, new = joined("router_retriever")
    new.start_as_blend(torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(logits(model, routing_tasks="new"), before["where"], atol=1e-5, rtol=1e-5)


def test_the_even_blend_of_averaged_factors_is_the_mean_of_the_skills():
    model = trained("mhr")
    for name, pair in even_blend(model.base_model).items():
        bank = model.base_model.layers()[name].branches("default")[0].bank
        torch.testing.assert_close(pair.down, bank.down.mean(0))
        torch.testing.assert_close(pair.up, bank.up.mean(0).T)


def test_the_even_blend_of_one_lora_is_that_lora():
    model = trained("lora")
    with torch.no_grad(), model.base_model.using_factors(even_blend(model.base_model)):
        blended = logits(model)
    assert torch.equal(blended, logits(model))


@pytest.mark.parametrize("method", sorted(CASES))
def test_every_method_has_an_even_blend(method):
    model = trained(method)
    blend = even_blend(model.base_model)
    assert set(blend) == set(model.base_model.layers())
    with torch.no_grad(), model.base_model.using_factors(blend):
        assert not torch.equal(logits(model), logits(tiny_llama()))


def test_what_a_hub_can_do_for_a_new_task_is_known():
    arrow, retriever, moa, scalearn = (joined(name)[2] for name in ("arrow", "router_retriever", "moa", "scalearn"))
    assert arrow.joins_every_task
    assert joined("xlora")[2].joins_every_task
    assert not moa.joins_every_task
    assert retriever.has_prompt_prototypes
    assert not moa.has_prompt_prototypes
    assert moa.learns_labels
    assert scalearn.is_summed_with_others
    assert not retriever.is_summed_with_others
    assert joined("taps")[2].brings == {"expert", "gate"}
    assert joined("lora")[2].brings == set()


def test_a_task_that_cannot_join_leaves_the_hub_as_it_was():
    model = trained("madx")
    hub = model.base_model
    before = logits(model, routing_tasks="who")
    with pytest.raises(ConfigError, match="languages: nothing said of new"):
        hub.add_task("new")
    with pytest.raises(AdapterError, match="knows task 'who' already"):
        hub.add_task("who")
    assert hub.tasks == TASKS
    assert torch.equal(logits(model, routing_tasks="who"), before)


@pytest.mark.parametrize(
    "method",
    ["clp", "distil_gate", "madx", "moa", "mtlora", "palora", "router_retriever", "skillnet", "taps"],
)
def test_one_task_trains_again_and_what_the_others_depend_on_is_held(method):
    """Its own experts move; what tasks share, a LoRA beside them or a language, does not."""
    model = trained(method)
    hub = model.base_model
    before = {task: logits(model, routing_tasks=task) for task in TASKS}
    hub.train_only(["when"])
    hub.set_stage(hub.stages[-1])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        loss = model(**a_batch(), routing_tasks=["when", "who", "when", "where"]).loss
        loss.backward()
        optimizer.step()
        hub.finish_step()
    model.eval()
    for task in TASKS:
        assert torch.equal(logits(model, routing_tasks=task), before[task]) == (task != "when")
    hub.train_only(None)


@pytest.mark.parametrize("method", ["alter", "arrow", "scalearn", "xlora"])
def test_experts_that_train_alone_are_held_though_all_tasks_may_use_them_later(method):
    hub = trained(method).base_model
    hub.train_only(["who"])
    bank = next(iter(hub.layers().values())).branches("default")[0].bank
    kept = bank.up.detach().clone()
    with torch.no_grad():
        bank.up.add_(1.0)
    hub.finish_step()
    assert torch.equal(bank.up[1:], kept[1:])
    assert torch.equal(bank.up[0], kept[0] + 1.0)
    hub.train_only([])
    with torch.no_grad():
        bank.up.zero_()
        for router in hub.routers():
            for parameter in router.parameters():
                parameter.zero_()
    hub.finish_step()
    assert torch.equal(bank.up[1:], kept[1:])
    assert all((parameter == 0).all() for router in hub.routers() for parameter in router.parameters())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", None),
        ("moelora", {"experts": 3}),  # as many experts as tasks, by chance
        ("molora", {"experts": 3}),
        ("mtl_lora", {"experts": 3}),
        ("hyperx", None),
    ],
)
def test_experts_that_tasks_share_cannot_be_held_for_some(method, options):
    hub = adapted(method, options).base_model
    with pytest.raises(AdapterError, match="only a method with one expert per task"):
        hub.train_only(["who"])
