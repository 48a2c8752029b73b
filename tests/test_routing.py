"""Routers: what they decide, what balances them, what is counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.routing import (
    Argmax,
    Decision,
    PooledPrompt,
    Router,
    RouterConfig,
    RoutingStatistics,
    SigmoidTopK,
    Softmax,
    TaskTable,
    TokenLinear,
    TopK,
    balance_loss,
    label_loss,
    prompt_mask,
    update_selection_biases,
)
from loramux.routing.context import mean_pool, task_ids
from loramux.support.errors import AdapterError

scores_strategy = st.integers(0, 2**31).map(
    lambda seed: torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
)


@given(scores=scores_strategy, k=st.integers(1, 7), temperature=st.floats(0.1, 5))
@settings(deadline=None, max_examples=30)
def test_top_k_weights_are_a_distribution_over_the_k_best(scores, k, temperature):
    decision = TopK(k=k, temperature=temperature)(scores)
    assert ((decision.weights > 0).sum(-1) == k).all()
    torch.testing.assert_close(decision.weights.sum(-1), torch.ones(5))
    best = scores.topk(k).indices.sort().values
    assert torch.equal(decision.weights.topk(k).indices.sort().values, best)


@given(scores=scores_strategy, k=st.integers(1, 7))
@settings(deadline=None, max_examples=30)
def test_the_selection_bias_chooses_gates_but_never_enters_their_weight(scores, k):
    normalise = SigmoidTopK(k=k, balance_rate=1e-3)
    bias = torch.zeros(7)
    bias[3] = 10.0
    decision = normalise(scores, bias)
    gates = torch.sigmoid(scores)
    assert (decision.weights[:, 3] > 0).all()
    chosen = decision.weights > 0
    torch.testing.assert_close(decision.weights.sum(-1), torch.full((5,), float(k)))
    ratio = decision.weights[chosen].view(5, k) / gates[chosen].view(5, k)
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, k))


def test_softmax_temperature_sharpens_and_argmax_takes_one():
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    assert Softmax(temperature=0.1)(scores).weights[0, 2] > Softmax()(scores).weights[0, 2]
    assert Argmax()(scores).weights.tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("normaliser", "arguments"), [(Softmax, {"temperature": 0.0}), (TopK, {"k": 0}), (SigmoidTopK, {"k": -1})]
)
def test_normalisers_refuse_settings_without_meaning(normaliser, arguments):
    with pytest.raises(ValueError, match="must be positive"):
        normaliser(**arguments)


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


def test_the_balance_loss_is_one_when_uniform_and_the_number_of_gates_on_collapse():
    uniform = torch.full((1, 4, 4), 0.25)
    assert balance_loss(Decision(torch.eye(4).unsqueeze(0), uniform, uniform)).item() == pytest.approx(1.0)
    collapsed = torch.zeros(1, 4, 4)
    collapsed[..., 0] = 1
    assert balance_loss(Decision(collapsed, collapsed, collapsed)).item() == pytest.approx(4.0)


def test_the_label_loss_is_cross_entropy_on_the_scores():
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    decision = Decision(scores, scores, scores.softmax(-1))
    assert label_loss(decision, torch.tensor([0, 1])) < label_loss(decision, torch.tensor([1, 0]))


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
    with pytest.raises(ValueError, match="a router of tokens cannot be shared"):
        RouterConfig(scorer=TokenLinear(), normaliser=Softmax(), shared=True)
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
