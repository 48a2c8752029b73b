"""What routers pay for their decisions in training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.routing import (
    BalanceLoss,
    BudgetLoss,
    Decision,
    LabelLoss,
    LocalBalanceLoss,
    Penalty,
    RouterConfig,
    Softmax,
    TokenLinear,
    balance_loss,
    label_loss,
)


def decision_of(weights: torch.Tensor, penalty: torch.Tensor | None = None) -> Decision:
    return Decision(weights, weights, weights / weights.sum(-1, keepdim=True), penalty)


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


@given(seed=st.integers(0, 2**31), delta=st.floats(0, 0.9))
@settings(deadline=None, max_examples=20)
def test_the_local_balance_loss_is_the_variation_of_scaled_loads(seed, delta):
    """LoRAMoE: importances of the experts over a sequence, scaled by whether their kind is the sequence's."""
    torch.manual_seed(seed)
    weights = torch.rand(2, 6, 4).softmax(-1)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    loss = LocalBalanceLoss(delta=delta, experts=(0, 0, 1, 1), tasks=(1, 0))
    expected = []
    for row, kind in enumerate((1, 0)):
        importance = weights[row][mask[row]].sum(0)
        scaled = importance * torch.tensor([1 - delta if e == kind else 1 + delta for e in (0, 0, 1, 1)])
        expected.append(scaled.var(correction=0) / scaled.mean() ** 2)
    torch.testing.assert_close(loss(decision_of(weights), mask, torch.tensor([0, 1])), torch.stack(expected).mean())


def test_local_balance_wants_more_of_a_tasks_own_kind_and_balance_within_each():
    loss = LocalBalanceLoss(delta=0.25, experts=(0, 0, 1, 1), tasks=(0, 1))
    drawn = torch.tensor([1.25, 1.25, 0.75, 0.75]).expand(2, 3, 4) / 4  # in the ratio (1 + delta) / (1 - delta)
    assert loss(decision_of(drawn), None, torch.tensor([0, 0])).item() == pytest.approx(0, abs=1e-6)
    assert loss(decision_of(drawn), None, torch.tensor([1, 1])) > 0.1
    even = torch.full((2, 3, 4), 0.25)
    assert loss(decision_of(even), None, torch.tensor([0, 1])).item() == pytest.approx(0.25**2)
    assert loss(decision_of(even), None, None).item() == 0  # tasks unknown: plain balance
    lopsided = torch.tensor([1.0, 0.0, 0.5, 0.5]).expand(2, 3, 4) / 2
    assert loss(decision_of(lopsided), None, torch.tensor([0, 0])) > loss(
        decision_of(drawn), None, torch.tensor([0, 0])
    )
    blend = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # counted where they are largest
    assert torch.equal(loss(decision_of(drawn), None, blend), loss(decision_of(drawn), None, torch.tensor([0, 1])))


def test_the_budget_is_the_mean_number_of_open_gates():
    opened = torch.tensor([[[0.9, 0.0], [0.0, 0.1], [1.0, 1.0]]])
    decision = Decision(opened, opened, opened)
    mask = torch.tensor([[True, True, False]])
    assert BudgetLoss(budget=0.5)(decision, mask, None).item() == pytest.approx(0.0)
    assert BudgetLoss(budget=0.2)(decision, mask, None).item() == pytest.approx(0.3)
    assert BudgetLoss(budget=0.5)(decision, None, None).item() == pytest.approx(0.5)


def test_a_penalty_is_the_mean_of_what_the_normaliser_says():
    decision = decision_of(torch.ones(2, 3), torch.tensor([1.0, 3.0]))
    assert Penalty()(decision, None, None).item() == pytest.approx(2.0)
    assert Penalty()(decision, torch.tensor([True, False]), None).item() == pytest.approx(1.0)


def test_labels_may_be_a_blend_of_tasks():
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    decision = Decision(scores, scores, scores.softmax(-1))
    loss = LabelLoss()
    assert torch.equal(loss(decision, None, torch.tensor([0, 1])), loss(decision, None, torch.eye(2)))
    assert loss(decision, None, torch.eye(2)) < loss(decision, None, torch.full((2, 2), 0.5))


def test_losses_are_weighted_and_summed_and_those_without_weight_are_not_computed():
    decision = decision_of(torch.full((1, 4, 4), 0.25), torch.full((1, 4), 2.0))
    losses = (BalanceLoss(weight=0.5), Penalty(weight=0.25), LabelLoss(weight=0.0))
    config = RouterConfig(scorer=TokenLinear(), normaliser=Softmax(), losses=losses)
    assert config.learns_labels
    assert config.loss(decision, None, None).item() == pytest.approx(0.5 * 1 + 0.25 * 2)
    assert RouterConfig(scorer=TokenLinear(), normaliser=Softmax()).loss(decision, None, None) is None
