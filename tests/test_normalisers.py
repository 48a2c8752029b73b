"""From scores to weights: what each normaliser decides, in training and afterwards, and what it learns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.routing import (
    Argmax,
    DSelectK,
    GumbelSoftmax,
    Identity,
    NoisyStep,
    Normaliser,
    Penalty,
    RandomOne,
    Router,
    RouterConfig,
    SigmoidShare,
    SigmoidTopK,
    Softmax,
    TaskTable,
    Threshold,
    TopK,
)
from loramux.routing.normalisers import smooth_step

scores_strategy = st.integers(0, 2**31).map(
    lambda seed: torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
)


def test_softmax_temperature_sharpens_and_argmax_takes_one():
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    assert Softmax(temperature=0.1)(scores).weights[0, 2] > Softmax()(scores).weights[0, 2]
    assert Argmax()(scores).weights.tolist() == [[0.0, 0.0, 1.0]]


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


def weights_of(normaliser: Normaliser, scores: torch.Tensor, training: bool = False) -> torch.Tensor:
    return normaliser(scores, training=training).weights


@given(scores=scores_strategy)
@settings(deadline=None, max_examples=20)
def test_identity_takes_scores_as_they_are(scores):
    assert torch.equal(weights_of(Identity(), scores), scores)


@given(scores=scores_strategy, temperature=st.floats(0.2, 3), hard=st.booleans())
@settings(deadline=None, max_examples=20)
def test_gumbel_softmax_is_a_draw_in_training_and_its_softmax_afterwards(scores, temperature, hard):
    normaliser = GumbelSoftmax(temperature=temperature, hard=hard)
    soft = torch.softmax(scores / temperature, dim=-1)
    if hard:
        assert torch.equal(weights_of(normaliser, scores), torch.eye(7)[scores.argmax(-1)])
        assert (weights_of(normaliser, scores, training=True).sort(-1).values == torch.eye(7)[6]).all()
    else:
        torch.testing.assert_close(weights_of(normaliser, scores), soft)
        drawn = weights_of(normaliser, scores, training=True)
        torch.testing.assert_close(drawn.sum(-1), torch.ones(5))
        assert not torch.equal(drawn, weights_of(normaliser, scores, training=True))


def test_a_hard_gumbel_choice_falls_on_gates_by_their_probability_and_teaches_all_of_them():
    torch.manual_seed(0)
    scores = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3).clone().requires_grad_()
    weights = weights_of(GumbelSoftmax(hard=True), scores, training=True)
    torch.testing.assert_close(weights.mean(0), torch.softmax(scores[0], dim=-1), atol=0.02, rtol=0)
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert (scores.grad.abs().sum(0) > 0).all()


@given(scores=scores_strategy)
@settings(deadline=None, max_examples=20)
def test_sigmoid_shares_sum_to_one_in_the_ratio_of_the_sigmoids(scores):
    gates = torch.sigmoid(scores)
    torch.testing.assert_close(weights_of(SigmoidShare(), scores), gates / gates.sum(-1, keepdim=True))
    assert torch.equal(weights_of(SigmoidShare(), scores, training=True), weights_of(SigmoidShare(), scores))
    drawn = weights_of(SigmoidShare(sampled=True), scores, training=True)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(5))
    assert torch.equal(weights_of(SigmoidShare(sampled=True), scores), weights_of(SigmoidShare(), scores))


def test_sampled_skills_are_relaxed_bernoulli_draws_of_their_own_probability():
    torch.manual_seed(0)
    scores = torch.tensor([-1.0, 1.0]).expand(20_000, 2)
    drawn = weights_of(SigmoidShare(sampled=True, temperature=0.01), scores, training=True)
    both_off = (1 - torch.sigmoid(scores[0])).prod()
    only_first = torch.sigmoid(torch.tensor(-1.0)) * (1 - torch.sigmoid(torch.tensor(1.0)))
    # A skill that is on alone has the whole weight; where none is on, the nearer one has nearly all of it.
    assert only_first < (drawn[:, 0] > 0.99).float().mean() < only_first + both_off


@given(seed=st.integers(0, 2**31), gates=st.integers(1, 9), k=st.integers(1, 3), gamma=st.floats(0.1, 4))
@settings(deadline=None, max_examples=40)
def test_dselect_k_weights_gates_by_the_codes_that_name_them(seed, gates, k, gamma):
    """Hazimeh et al. 2021, equations 3 to 6, one selector and one bit at a time."""
    normaliser = DSelectK(k=k, gates=gates, gamma=gamma)
    scores = torch.randn(3, normaliser.num_scores(gates), generator=torch.Generator().manual_seed(seed)) * gamma / 2
    weights = weights_of(normaliser, scores)
    assert (weights >= 0).all()
    assert (weights.sum(-1) < 1 + 1e-5).all()
    for row in range(3):
        codes, logits = scores[row, : k * normaliser.bits].view(k, -1), scores[row, k * normaliser.bits :]
        expected = torch.zeros(gates)
        for selector, share in enumerate(logits.softmax(-1)):
            for gate in range(gates):
                factors = [
                    smooth_step(code, gamma) if gate >> bit & 1 else 1 - smooth_step(code, gamma)
                    for bit, code in enumerate(codes[selector])
                ]
                expected[gate] += share * torch.stack([torch.ones(()), *factors]).prod()
        torch.testing.assert_close(weights[row], expected)


@given(seed=st.integers(0, 2**31), gates=st.sampled_from([2, 4, 8]), k=st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_settled_codes_open_at_most_k_gates_and_cost_nothing(seed, gates, k):
    normaliser = DSelectK(k=k, gates=gates)
    scores = torch.randn(20, normaliser.num_scores(gates), generator=torch.Generator().manual_seed(seed))
    settled = normaliser(torch.where(scores > 0, scores + 0.5, scores - 0.5))
    assert ((settled.weights > 0).sum(-1) <= k).all()
    torch.testing.assert_close(settled.weights.sum(-1), torch.ones(20))
    torch.testing.assert_close(settled.penalty, torch.zeros(20))
    assert (normaliser(scores / 10).penalty > 0).all()


def test_codes_that_name_no_gate_cost_more_than_codes_that_do():
    normaliser = DSelectK(k=1, gates=3)  # two bits: code 3 is left over
    named, unnamed = (normaliser(torch.tensor([[bit, bit, 0.0]])) for bit in (-0.4, 0.4))
    assert unnamed.weights.sum() < 0.1
    assert unnamed.penalty > named.penalty + 5
    assert normaliser(torch.tensor([[9.0, 9.0, 0.0]])).penalty.isfinite().all()


def test_dselect_k_finds_the_few_experts_that_each_task_is_made_of():
    torch.manual_seed(0)
    tasks, gates = 32, 8
    target = torch.zeros(tasks, gates)
    for row in target:
        chosen, share = torch.randperm(gates)[:2], 0.3 + 0.4 * torch.rand(())
        row[chosen] = torch.stack([share, 1 - share])
    experts = torch.randn(gates, 32)
    config = RouterConfig(
        scorer=TaskTable(init_std=0.01), normaliser=DSelectK(k=2, gates=gates), losses=(Penalty(weight=0.01),)
    )
    router, entropies = Router(config, 4, tasks, gates), []
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(400):
        decision = router(torch.empty(0), torch.arange(tasks))
        penalty = config.loss(decision, None, None)
        (((decision.weights - target) @ experts).square().mean(-1).sum() + tasks * penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        entropies.append(penalty.item())
    assert entropies[-1] < entropies[200] < entropies[100] < entropies[0]
    weights = router.settled(torch.arange(tasks)).weights
    found = ((weights > 1e-3) == (target > 0)).all(-1)
    assert found.float().mean() > 0.8  # at random it would be one in 28
    assert ((weights > 0).sum(-1) <= 2).float().mean() > 0.6


@given(values=st.lists(st.floats(-3, 3), min_size=2, max_size=8), gamma=st.floats(0.1, 3))
@settings(deadline=None, max_examples=30)
def test_a_smooth_step_rises_from_nought_to_one_within_gamma(values, gamma):
    points = torch.tensor(values).sort().values
    steps = smooth_step(points, gamma)
    assert (steps.diff() >= -1e-6).all()
    outside = points.abs() > 0.51 * gamma
    assert torch.equal(steps[outside], (points[outside] > 0).float())  # to the last bit: closed gates take no rank
    torch.testing.assert_close(smooth_step(-points, gamma), 1 - steps)


def test_a_threshold_opens_gates_wholly_and_learns_through_the_step():
    scores = torch.tensor([[0.05, 0.1, 0.3, -0.2]], requires_grad=True)
    decision = Threshold(at=0.1)(scores, training=True)
    assert decision.weights.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert decision.penalty.item() == pytest.approx(0.65)
    (decision.weights * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert scores.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_one_gate_at_random_acts_in_training_for_all_that_act_afterwards():
    scores = torch.zeros(5, 4)
    assert torch.equal(weights_of(RandomOne(), scores), torch.ones(5, 4))
    torch.manual_seed(0)
    drawn = torch.stack([weights_of(RandomOne(), scores, training=True) for _ in range(400)])
    assert (drawn == drawn[:, :1]).all()  # the same for the whole batch
    assert ((drawn == 4).sum(-1) == 1).all()
    assert (drawn.sum(-1) == 4).all()
    torch.testing.assert_close(drawn[:, 0].mean(0), torch.ones(4), atol=0.3, rtol=0)


@given(scores=scores_strategy, noise=st.floats(0, 5))
@settings(deadline=None, max_examples=20)
def test_a_noisy_gate_is_soft_in_training_and_a_step_afterwards(scores, noise):
    normaliser = NoisyStep(noise=noise)
    assert torch.equal(weights_of(normaliser, scores), (scores >= 0).float())
    assert torch.equal(normaliser(scores).probabilities, torch.sigmoid(scores))
    torch.manual_seed(3)
    expected = torch.sigmoid(scores + noise * torch.randn_like(scores))
    torch.manual_seed(3)
    assert torch.equal(weights_of(normaliser, scores, training=True), expected)


@pytest.mark.parametrize(
    ("normaliser", "arguments"), [(Softmax, {"temperature": 0.0}), (TopK, {"k": 0}), (SigmoidTopK, {"k": -1})]
)
def test_normalisers_refuse_settings_without_meaning(normaliser, arguments):
    with pytest.raises(ValueError, match="must be positive"):
        normaliser(**arguments)
