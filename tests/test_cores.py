"""Cores: where weights act between A and B. Each has two ways of computing one function, held together here."""

import pytest
import torch
from cases import TASKS, adapted
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters import (
    BranchConfig,
    CoreConfig,
    Cored,
    Dense,
    FactorMix,
    HeadMix,
    InnerMix,
    OutputMix,
    TensorProduct,
    TensorTrain,
)
from loramux.adapters.banks import Bank, BankConfig
from loramux.adapters.cores import Core
from loramux.routing import Decision, RouterConfig, Softmax, TaskTable, TokenLinear
from loramux.support.errors import AdapterError

DENSE, HEADS = Dense(experts=3, rank=2), Dense(experts=3, rank=2, shared_down=True)
PRODUCT = TensorProduct(experts=3, rank=2, order=2)
SERVED: list[tuple[CoreConfig, BankConfig]] = [
    (OutputMix(), DENSE),
    (OutputMix(), Dense(experts=3, rank=2, output_scale=True)),
    (OutputMix(), PRODUCT),
    (OutputMix(block_size=1), Dense(rank=6)),
    (OutputMix(block_size=2), Dense(rank=6)),
    (HeadMix(), HEADS),
    (HeadMix(), Cored(experts=3, rank=2)),
    (HeadMix(task_matrix="full"), HEADS),
    (HeadMix(task_matrix="diagonal"), HEADS),
    (FactorMix(), DENSE),
    (FactorMix(), PRODUCT),
    (FactorMix(splits=4), DENSE),
    (InnerMix(), PRODUCT),
]
every_pair = pytest.mark.parametrize(("core", "bank"), SERVED)


def made(core: CoreConfig, bank: BankConfig, seed: int = 0) -> tuple[Core, Bank]:
    """A core and a bank for a linear of 12 x 8, with random values, in float64."""
    torch.manual_seed(seed)
    modules = core.build(bank, tasks=3).double(), bank.build(12, 8).double()
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.normal_()
    return modules


def decide(weights: torch.Tensor, active: int | None = None) -> Decision:
    return Decision(weights, weights, weights, active=active)


def materialised(x: torch.Tensor, core: Core, bank: Bank, decision: Decision | None, tasks) -> torch.Tensor:
    down, up = core.materialise(bank, decision, tasks)
    return x @ down.transpose(1, 2) @ up


def mixed(x: torch.Tensor, core: Core, bank: Bank, decision: Decision | None, tasks) -> torch.Tensor:
    hidden, up = core.mix(x, bank, decision, tasks)
    return hidden @ up


@every_pair
@given(seed=st.integers(0, 2**31), blended=st.booleans())
@settings(deadline=None, max_examples=8)
def test_both_ways_of_computing_are_one_function(core, bank, seed, blended):
    module, experts = made(core, bank, seed)
    x, gates = torch.randn(2, 5, 12).double(), core.num_gates(bank)
    tasks = torch.rand(2, 3).softmax(-1).double() if blended else torch.tensor([2, 0])
    decision = decide(torch.randn(2, gates).double())
    constant = materialised(x, module, experts, decision, tasks)
    assert constant.shape == (2, 5, 8)
    if core.serves_tokens:
        torch.testing.assert_close(mixed(x, module, experts, decision, tasks), constant)
        by_token = torch.randn(2, 5, gates).double()
        said = mixed(x, module, experts, decide(by_token), tasks)
        for token in range(5):
            alone = materialised(x, module, experts, decide(by_token[:, token]), tasks)
            torch.testing.assert_close(said[:, token], alone[:, token])


@every_pair
def test_without_a_router_every_weight_is_one(core, bank):
    module, experts = made(core, bank)
    x, tasks = torch.randn(2, 5, 12).double(), torch.tensor([2, 0])
    ones = decide(torch.ones(2, core.num_gates(bank)).double())
    expected = materialised(x, module, experts, ones, tasks)
    torch.testing.assert_close(materialised(x, module, experts, None, tasks), expected)
    if core.serves_tokens:
        torch.testing.assert_close(mixed(x, module, experts, None, tasks), expected)


@every_pair
def test_one_decision_serves_all_rows(core, bank):
    module, experts = made(core, bank)
    x, weights = torch.randn(4, 5, 12).double(), torch.randn(1, core.num_gates(bank)).double()
    tasks = torch.tensor([1])
    one = materialised(x, module, experts, decide(weights), tasks)
    four = materialised(x, module, experts, decide(weights.expand(4, -1)), tasks.expand(4))
    torch.testing.assert_close(one, four)


def test_outputs_are_mixed_by_the_sum_of_the_experts_deltas():
    core, bank = made(OutputMix(), DENSE)
    weights = torch.randn(2, 3).double()
    down, up = core.materialise(bank, decide(weights), None)
    deltas = torch.einsum("ero,eri->eoi", bank.up, bank.down)
    torch.testing.assert_close(up.transpose(1, 2) @ down, torch.einsum("ne,eoi->noi", weights, deltas))


def test_blocks_of_ranks_have_weights_of_their_own():
    core, bank = made(OutputMix(block_size=2), Dense(rank=6))
    weights = torch.tensor([[1.0, 0.0, 0.5]]).double()
    down, up = core.materialise(bank, decide(weights), None)
    gate = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5, 0.5]).double()
    torch.testing.assert_close(up[0].T @ down[0], (bank.up[0].T * gate) @ bank.down[0])


@pytest.mark.parametrize("active", [1, 2])
def test_experts_that_are_closed_for_sure_take_no_rank(active):
    core, bank = made(OutputMix(), DENSE)
    weights = torch.tensor([[0.0, 2.0, 0.0], [0.5, 0.0, 0.0]]).double()
    down, up = core.materialise(bank, decide(weights, active=active), None)
    assert down.shape[1] == up.shape[1] == 2 * active
    everything = core.materialise(bank, decide(weights), None)
    assert everything[0].shape[1] == 6
    torch.testing.assert_close(up.transpose(1, 2) @ down, everything[1].transpose(1, 2) @ everything[0])


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_a_task_matrix_acts_between_a_and_b(kind):
    """MTL-LoRA: s (sum_e w_e B_e) Lambda_t A; a blend of tasks blends their matrices."""
    core, bank = made(HeadMix(task_matrix=kind), HEADS)
    weights, blend = torch.randn(2, 3).double(), torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]]).double()
    matrices = core.task_matrix if kind == "full" else torch.diag_embed(core.task_matrix)
    for tasks, expected in (
        (torch.tensor([2, 0]), matrices[[2, 0]]),
        (blend, torch.tensordot(blend, matrices, dims=1)),
    ):
        down, up = core.materialise(bank, decide(weights), tasks)
        heads = torch.einsum("ne,ero->nor", weights, bank.up)
        # The matrix is stored for activations that are rows: x A^T Lambda.
        torch.testing.assert_close(up.transpose(1, 2) @ down, heads @ expected.transpose(1, 2) @ bank.down[0])
    fresh = HeadMix(task_matrix=kind).build(HEADS, tasks=3)
    assert torch.equal(fresh._matrices(torch.tensor([1]))[0], torch.eye(2))
    with pytest.raises(AdapterError, match="routed by task: pass routing_tasks="):
        core.materialise(bank, decide(weights), None)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_factors_are_averaged_block_by_block(splits):
    """MHR: A_t[:, block b] = sum_e w_be A_e[:, block b], and B_t[block b, :] alike; Poly is one block."""
    core, bank = made(FactorMix(splits=splits), DENSE)
    weights = torch.randn(1, splits * 3).double()
    down, up = core.materialise(bank, decide(weights), None)
    for factor, parts in ((down, bank.down), (up, bank.up)):
        blocks = [
            torch.einsum("e,erf->rf", weights[0].view(splits, 3)[block], part)
            for block, part in enumerate(parts.chunk(splits, dim=-1))
        ]
        torch.testing.assert_close(factor[0], torch.cat(blocks, dim=-1))


def test_averaging_factors_is_not_averaging_outputs_but_for_one_expert_alone():
    (factors, bank), (outputs, _) = made(FactorMix(), DENSE), made(OutputMix(), DENSE)

    def delta(core: Core, weights: torch.Tensor) -> torch.Tensor:
        down, up = core.materialise(bank, decide(weights.double()), None)
        return up.transpose(1, 2) @ down

    even, alone = torch.full((1, 3), 1 / 3), torch.eye(3)[:1]
    assert (delta(factors, even) - delta(outputs, even)).abs().max() > 0.1
    torch.testing.assert_close(delta(factors, alone), delta(outputs, alone))


def test_leaves_are_averaged_each_order_by_its_own_weights():
    core, bank = made(InnerMix(), PRODUCT)
    weights = torch.randn(1, 6).double()
    down, _ = core.materialise(bank, decide(weights), None)
    first, second = (torch.einsum("e,erm->rm", weights[0].view(2, 3)[order], bank.down[order]) for order in range(2))
    expected = torch.stack([torch.kron(a, b)[:12] for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(down[0], expected)


@pytest.mark.parametrize(
    ("core", "bank", "message"),
    [
        (OutputMix(), HEADS, "experts that share A are mixed by HeadMix"),
        (OutputMix(block_size=4), Dense(rank=6), r"block_size \(=4\) must divide the total rank \(=6\)"),
        (OutputMix(block_size=0), Dense(rank=6), r"block_size \(=0\) must divide the total rank \(=6\)"),
        (HeadMix(), DENSE, "HeadMix is for experts that share A"),
        (FactorMix(), HEADS, "experts that share A are mixed by HeadMix"),
        (InnerMix(), DENSE, "InnerMix is for experts that are made of something"),
        (InnerMix(), TensorTrain(), "InnerMix is for experts that are made of something"),
    ],
)
def test_a_core_refuses_a_bank_it_cannot_work_on(core, bank, message):
    with pytest.raises(ValueError, match=message):
        core.num_gates(bank)


def test_what_cannot_be_routed_that_way_is_refused_when_it_is_written_down():
    by_token = RouterConfig(scorer=TokenLinear(), normaliser=Softmax())
    with pytest.raises(ValueError, match="InnerMix needs weights that are constant over tokens"):
        BranchConfig(bank=PRODUCT, core=InnerMix(), router=by_token)
    by_task = RouterConfig(scorer=TaskTable(), normaliser=Softmax(), groups=4)
    with pytest.raises(ValueError, match=r"groups \(=4\) must divide the number of gates \(=3\)"):
        BranchConfig(bank=DENSE, router=by_task)
    projected = RouterConfig(scorer=TokenLinear(), normaliser=Softmax(), projected=True)
    with pytest.raises(ValueError, match="a router can read what A makes of a token only where all experts share A"):
        BranchConfig(bank=DENSE, router=projected)
    assert isinstance(BranchConfig(bank=HEADS).mixing, HeadMix)
    assert isinstance(BranchConfig(bank=DENSE).mixing, OutputMix)


def test_splits_that_do_not_divide_a_linear_name_it_and_what_to_do():
    message = (
        r"model\.layers\.0\.self_attn\.k_proj: splits \(=32\) must divide the sizes of every adapted linear, and "
        r"one is 32 x 16; lower it, or leave that linear out of target_modules"
    )
    with pytest.raises(AdapterError, match=message):
        adapted("mhr", {"splits": 32}, tasks=TASKS)
    adapted("mhr", {"splits": 32}, tasks=TASKS, target_modules=["q_proj", "o_proj"])
