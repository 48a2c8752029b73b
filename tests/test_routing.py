"""Routers: what they decide, what balances them, what is counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.routing import (
    Argmax,
    Decision,
    DSelectK,
    FirstPass,
    FixedTable,
    Granularity,
    GumbelSoftmax,
    Identity,
    NoisyStep,
    OwnScore,
    OwnTokenGate,
    PooledPrompt,
    Router,
    RouterConfig,
    RoutingStatistics,
    SigmoidShare,
    SigmoidTopK,
    Softmax,
    TaskEmbedding,
    TaskTable,
    Threshold,
    TokenAndTask,
    TokenLinear,
    TopK,
    balance_loss,
    identity_rows,
    own_gates,
    prompt_mask,
    update_selection_biases,
)
from loramux.routing.context import mean_pool, resolve_tasks, task_ids
from loramux.support.errors import AdapterError


def test_the_bias_moves_towards_the_gates_used_too_little():
    config = RouterConfig(scorer=TokenLinear(), normaliser=SigmoidTopK(k=1, balance_rate=0.01))
    router = Router(config, 4, 1, 3)
    router.count_load(torch.tensor([[[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]]]), mask=None)
    update_selection_biases([router])
    torch.testing.assert_close(router.selection_bias, torch.tensor([-0.01, 0.0, 0.01]))
    update_selection_biases([router])
    torch.testing.assert_close(router.selection_bias, torch.tensor([-0.01, 0.0, 0.01]))


def test_padding_counts_for_nothing():
    weights = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    mask = torch.tensor([[True, True, False]])
    decision = Decision(weights, weights, torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]]))
    short = Decision(weights[:, :2], weights[:, :2], decision.probabilities[:, :2])
    torch.testing.assert_close(balance_loss(decision, mask), balance_loss(short))
    router = Router(RouterConfig(scorer=TokenLinear(), normaliser=SigmoidTopK(k=1, balance_rate=0.1)), 4, 1, 2)
    router.count_load(weights, mask)
    assert router.take_load().tolist() == [2.0, 0.0]
    statistics = RoutingStatistics(["a"])
    statistics.add("layer", weights, mask, None)
    assert statistics.layers["layer"].usage().tolist() == [[1.0, 0.0]]


def test_effective_experts_count_the_gates_that_carry_the_traffic():
    statistics = RoutingStatistics(["a", "b"])
    statistics.add("even", torch.full((2, 3, 4), 0.25), None, torch.tensor([0, 1]))
    one_hot = torch.zeros(2, 3, 4)
    one_hot[..., 2] = 1
    statistics.add("collapsed", one_hot, None, torch.tensor([0, 1]))
    data = statistics.to_data()["layers"]
    assert data["even"]["effective_experts"] == pytest.approx(4.0)
    assert data["collapsed"]["effective_experts"] == pytest.approx(1.0)
    assert data["even"]["entropy"] == pytest.approx(torch.log(torch.tensor(4.0)).item(), rel=1e-4)
    assert data["collapsed"]["entropy"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=10)
def test_groups_decide_side_by_side_each_over_its_own_gates(groups, seed):
    torch.manual_seed(seed)
    config = RouterConfig(scorer=TaskTable(init_std=1.0), normaliser=SigmoidShare(), groups=groups)
    router = Router(config, 4, 3, 12)
    weights = router.settled(torch.arange(3)).weights.view(3, groups, -1)
    alone = [SigmoidShare()(part).weights for part in router.scorer.logits.chunk(groups, dim=-1)]
    torch.testing.assert_close(weights, torch.stack(alone, dim=1))


def test_groups_of_selectors_have_scores_and_penalties_of_their_own():
    config = RouterConfig(scorer=TaskTable(init_std=0.1), normaliser=DSelectK(k=1, gates=4), groups=3)
    router = Router(config, 4, 2, 12)
    assert router.scorer.logits.shape == (2, 3 * (2 + 1))
    decision = router.settled(torch.arange(2))
    assert decision.weights.shape == (2, 12)
    alone = [DSelectK(k=1, gates=4)(part).penalty for part in router.scorer.logits.chunk(3, dim=-1)]
    torch.testing.assert_close(decision.penalty, torch.stack(alone).sum(0))


def test_a_task_table_needs_the_task_and_gives_it_its_own_row():
    router = Router(RouterConfig(scorer=TaskTable(init_std=1.0), normaliser=Softmax()), 4, 3, 2)
    weights = router(torch.empty(0), torch.tensor([2, 0, 2])).weights
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
    with pytest.raises(AdapterError, match="routed by task: pass routing_tasks="):
        router(torch.empty(0), None)


def test_a_pooled_prompt_router_can_have_a_hidden_layer():
    config = RouterConfig(scorer=PooledPrompt(hidden=6), normaliser=Argmax(), shared=True)
    assert Router(config, 4, 3, 3)(torch.randn(5, 4), None).weights.sum(-1).tolist() == [1.0] * 5


def test_the_prompt_is_what_comes_before_the_first_answer():
    labels = torch.tensor([[-100, -100, 5, -100, 6], [-100, -100, -100, -100, 7]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    assert prompt_mask(attention, labels).int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]
    assert torch.equal(prompt_mask(attention, None), attention.bool())
    assert prompt_mask(attention[1:], torch.tensor([[4, 5, 6, 7, 8]])).int().tolist() == [[0, 1, 1, 1, 1]]


def test_sequences_are_decided_once_for_the_model_and_tokens_at_every_layer():
    for scorer, shared in ((TokenLinear(), True), (FirstPass(), False)):
        with pytest.raises(ValueError, match="shared by the whole model if it reads a first pass, and only then"):
            RouterConfig(scorer=scorer, normaliser=Softmax(), shared=shared)
    with pytest.raises(ValueError, match="once per sequence must be shared"):
        RouterConfig(scorer=PooledPrompt(), normaliser=Argmax())


def test_pooling_averages_the_masked_tokens_only():
    hidden = torch.arange(12.0).view(1, 4, 3)
    mask = torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(mean_pool(hidden, mask), (hidden[:, 0] + hidden[:, 2]) / 2)


def test_tasks_are_named_or_numbered():
    names = ["who", "where"]
    assert task_ids("where", names).tolist() == [1]
    assert task_ids(["where", "who"], names).tolist() == [1, 0]
    assert task_ids([0, 1], names).tolist() == [0, 1]
    with pytest.raises(AdapterError, match="unknown task 'when'; this adapter knows: who, where"):
        task_ids("when", names)
    with pytest.raises(AdapterError, match=r"task id 2 is outside 0\.\.1"):
        task_ids(torch.tensor([2]), names)


BLENDED = [
    (TaskTable(init_std=1.0), Softmax()),
    (TaskTable(init_std=1.0), SigmoidShare(sampled=True)),
    (TaskTable(init_std=0.3), DSelectK(k=2, gates=3)),
    (FixedTable(rows=identity_rows(3)), Identity()),
    (OwnScore(init=0.15), Threshold(at=0.1)),
    (TaskEmbedding(dim=5), GumbelSoftmax(hard=True)),
    (TokenAndTask(init_std=1.0), TopK(k=1)),
    (TokenAndTask(form="separate", init_std=1.0), TopK(k=2)),
    (OwnTokenGate(hidden=3), NoisyStep()),
]


@pytest.mark.parametrize(("scorer", "normaliser"), BLENDED, ids=lambda part: type(part).__name__)
@given(shares=st.lists(st.floats(0.01, 1), min_size=3, max_size=3), task=st.integers(0, 2))
@settings(deadline=None, max_examples=5)
def test_a_blend_of_tasks_mixes_what_they_decide_alone(scorer, normaliser, shares, task):
    """Also where decisions are hard: half of a task is half of what it opens, and never nothing."""
    torch.manual_seed(0)
    router = Router(RouterConfig(scorer=scorer, normaliser=normaliser), 6, 3, 3).eval()
    x = torch.randn(2, 5, 6)
    blend = torch.tensor(shares) / sum(shares)
    alone = [router(x, torch.tensor([number, number])).weights for number in range(3)]
    mixed = router(x, torch.stack([blend, torch.eye(3)[task]]))
    torch.testing.assert_close(mixed.weights[0], sum(s * w[0] for s, w in zip(blend, alone, strict=True)))
    assert torch.equal(mixed.weights[1], alone[task][1])
    if scorer.granularity < Granularity.TOKEN:
        assert torch.equal(router.settled(blend.unsqueeze(0)).weights[0], mixed.weights[0])


def test_a_router_of_prompts_does_not_read_the_blend_that_overrides_it():
    router = Router(RouterConfig(scorer=PooledPrompt(), normaliser=Argmax(), shared=True), 6, 3, 3)
    x = torch.randn(2, 6)
    assert torch.equal(router(x, torch.full((2, 3), 1 / 3)).weights, router(x, None).weights)
    blend = torch.tensor([[0.2, 0.3, 0.5]])
    assert torch.equal(own_gates(blend, 3).weights, blend)
    assert torch.equal(own_gates(torch.tensor([2, 0]), 3).weights, torch.eye(3)[[2, 0]])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"who": 0.5, "where": 0.6}, r"must sum to one, got \[1\.1"),
        ({"who": 1.5, "where": -0.5}, r"must not be negative, got \[\[1\.5, -0\.5\]\]"),
        ({"who": float("nan"), "where": 1.0}, "must not be negative, got"),
        ({"who": float("inf"), "where": 0.0}, "must sum to one"),
        ({"who": 0.5, "when": 0.5}, "unknown task 'when'; this adapter knows: who, where"),
        ({}, "must sum to one"),
        (torch.tensor([[0.5, 0.2, 0.3]]), r"has 2 shares, one per task; got 3"),
        (torch.tensor([[0.5, 0.5], [0.2, 0.2]]), "must sum to one"),
    ],
)
def test_shares_off_the_simplex_are_refused(shares, message):
    with pytest.raises(AdapterError, match=message):
        resolve_tasks(shares, ["who", "where"])


def test_a_blend_is_named_or_one_row_of_shares_per_example():
    names = ["who", "where", "when"]
    torch.testing.assert_close(resolve_tasks({"when": 0.7, "who": 0.3}, names), torch.tensor([[0.3, 0.0, 0.7]]))
    rows = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    assert torch.equal(resolve_tasks(rows, names), rows)
    assert torch.equal(resolve_tasks(rows[0], names), rows[:1])
