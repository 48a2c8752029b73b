"""What the weights of a router depend on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.routing import (
    Constant,
    FirstPass,
    FixedTable,
    Granularity,
    NoisyStep,
    OwnScore,
    OwnTokenGate,
    PooledPrompt,
    PromptPrototypes,
    Prototypes,
    RouterDims,
    Scorer,
    TaskEmbedding,
    TaskTable,
    TokenAndTask,
    TokenLinear,
    TokenPerceptron,
    TokenPrototypes,
    identity_rows,
)
from loramux.support.errors import AdapterError

SCORERS = [
    Constant(),
    TaskTable(init_std=1.0),
    FixedTable(rows=((1.0, 0.0, 0.0, 2.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.5, 0.5, 0.0))),
    OwnScore(init=0.5),
    TaskEmbedding(dim=5),
    TaskEmbedding(dim=5, hidden=3),
    TokenLinear(),
    TokenPerceptron(hidden=3),
    TokenAndTask(dim=5, init_std=1.0),
    TokenAndTask(form="separate", init_std=1.0),
    OwnTokenGate(hidden=3),
    TokenPrototypes(),
    PooledPrompt(hidden=3),
    PromptPrototypes(),
]  # and FirstPass, below: its scores are of all layers
every_scorer = pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)


def built(scorer: Scorer, scores: int = 4, tasks: int = 3) -> torch.nn.Module:
    """A scorer of inputs with six features, nothing of which is zero."""
    torch.manual_seed(0)
    module = scorer.build(RouterDims(in_features=6, tasks=tasks, scores=scores))
    if isinstance(module, Prototypes):
        module.directions.normal_()
    return module


@every_scorer
def test_scores_depend_on_what_the_granularity_says_and_on_nothing_else(scorer):
    module = built(scorer, scores=3 if isinstance(scorer, OwnScore) else 4)
    x, other = torch.randn(2, 2, 5, 6)
    tasks = torch.tensor([2, 0])

    def scores(inputs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return module(inputs, ids)

    by_input = scorer.granularity > Granularity.TASK
    assert torch.equal(scores(x, tasks), scores(other, tasks)) == (not by_input)
    assert torch.equal(scores(x, tasks), scores(x, tasks.flip(0))) == (not scorer.needs_task)
    if scorer.granularity == Granularity.TOKEN:
        assert scores(x, tasks).shape == (2, 5, 4)
        torch.testing.assert_close(scores(x, tasks)[:, 3:4], scores(x[:, 3:4], tasks))
        beams = scores(x.repeat_interleave(3, dim=0), tasks)
        torch.testing.assert_close(beams, scores(x, tasks).repeat_interleave(3, dim=0))
        torch.testing.assert_close(scores(x.flatten(0, 1), tasks), scores(x, tasks).flatten(0, 1))
    if scorer.needs_task:
        with pytest.raises(AdapterError, match="routed by task: pass routing_tasks="):
            module(x, None)


@every_scorer
def test_what_is_trained_follows_from_the_kind_of_scorer(scorer):
    module = built(scorer, scores=3 if isinstance(scorer, OwnScore) else 4)
    given = isinstance(scorer, Constant | FixedTable | TokenPrototypes | PromptPrototypes)
    assert any(True for _ in module.parameters()) != given
    assert scorer.is_task_logits == isinstance(scorer, TaskTable | OwnScore)


def test_a_task_table_starts_at_its_level_with_more_for_a_tasks_own_gate():
    logits = built(TaskTable(init=0.2, diagonal=4.0), scores=3).logits
    torch.testing.assert_close(logits.detach(), 0.2 + 4.0 * torch.eye(3))
    noisy = built(TaskTable(init=1.0, init_std=0.1), scores=2000).logits
    assert noisy.mean().item() == pytest.approx(1.0, abs=0.01)
    assert noisy.std().item() == pytest.approx(0.1, abs=0.01)


def test_a_given_table_must_have_a_row_per_task_and_a_column_per_gate():
    assert torch.equal(built(FixedTable(rows=identity_rows(3)), scores=3)(None, torch.tensor([1])), torch.eye(3)[1:2])
    with pytest.raises(ValueError, match="the table has 2 rows; it wants 3 of 2 numbers"):
        built(FixedTable(rows=identity_rows(2)), scores=2)


def test_a_tasks_own_score_is_the_only_one_it_teaches():
    module = built(OwnScore(init=0.15), scores=3)
    scores = module(None, torch.tensor([1, 1]))
    torch.testing.assert_close(scores, torch.tensor([[0.0, 0.15, 0.0]] * 2))
    scores.sum().backward()
    assert module.logits.grad.tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("form", ["joined", "separate"])
def test_a_task_aware_gate_is_a_linear_map_of_token_and_task(form):
    module = built(TokenAndTask(form=form, dim=5, init_std=1.0))
    x, tasks = torch.randn(2, 5, 6), torch.tensor([2, 0])
    for row, task in enumerate(tasks):
        if form == "separate":
            expected = x[row] @ module.weight[task].T
        else:
            joined = torch.cat([x[row], module.vectors[task].expand(5, -1)], dim=-1)
            expected = joined @ torch.cat([module.of_token.weight, module.of_task.weight], dim=-1).T
        torch.testing.assert_close(module(x, tasks)[row], expected)


@pytest.mark.parametrize("hidden", [None, 5])
def test_a_first_pass_gives_every_layer_scores_of_its_own(hidden):
    torch.manual_seed(0)
    module = FirstPass(hidden=hidden, dropout=0.5).build(RouterDims(in_features=6, tasks=3, scores=4, layers=2)).eval()
    module.bias.data.normal_()
    x = torch.randn(3, 5, 6)
    scores = module(x)
    assert scores.shape == (2, 3, 5, 4)
    for layer in range(2):
        linear = module.inner(x) @ module.weight[:, layer].T + module.bias[:, layer]
        torch.testing.assert_close(scores[layer], linear)


@given(seed=st.integers(0, 2**31), noise=st.floats(0, 5))
@settings(deadline=None, max_examples=10)
def test_a_token_opens_no_gate_but_that_of_its_own_task(seed, noise):
    module = built(OwnTokenGate(hidden=3), scores=3)
    torch.manual_seed(seed)
    scores = module(torch.randn(2, 5, 6) * 10, torch.tensor([2, 0]))
    others = torch.tensor([[True, True, False], [False, True, True]]).unsqueeze(1).expand_as(scores)
    for training in (True, False):
        assert (NoisyStep(noise=noise)(scores, training=training).weights[others] == 0).all()


def test_token_prototypes_count_either_direction_and_prompt_prototypes_the_angle():
    x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 2.0]])
    for scorer, expected in (
        (TokenPrototypes(), [[3.0, 0.0], [3.0, 0.0], [0.0, 2.0]]),
        (PromptPrototypes(), [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]),
    ):
        module = scorer.build(RouterDims(in_features=2, tasks=2, scores=2))
        assert torch.equal(module(x, None), torch.zeros(3, 2))
        module.directions.copy_(torch.eye(2))
        torch.testing.assert_close(module(x, None), torch.tensor(expected))
        assert module.state_dict().keys() == {"directions"}  # saved with the adapter
