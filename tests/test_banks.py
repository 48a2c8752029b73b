"""Banks: whatever they store, they give dense factors, start at nothing and train from there."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters import Cored, Dense, TensorProduct, TensorTrain
from loramux.adapters.banks import Bank, BankConfig, joined

BANKS = {
    "dense": Dense(experts=3, rank=2),
    "shared A": Dense(experts=3, rank=2, shared_down=True),
    "scaled": Dense(experts=3, rank=2, output_scale=True),
    "products of 2": TensorProduct(experts=3, rank=2, order=2),
    "products of 3": TensorProduct(experts=3, rank=2, order=3),
    "products of 4": TensorProduct(experts=3, rank=2, order=4),
    "train": TensorTrain(rank=2, train_rank=3, order=2),
    "short train": TensorTrain(rank=2, train_rank=3, order=1),
    "cores": Cored(experts=3, rank=2),
}
every_bank = pytest.mark.parametrize("config", BANKS.values(), ids=BANKS)
sizes = st.integers(1, 40)


def built(config: BankConfig, inputs: int = 12, outputs: int = 10) -> Bank:
    torch.manual_seed(0)
    return config.build(inputs, outputs)


def scrambled(bank: Bank) -> Bank:
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    return bank


def delta(bank: Bank) -> torch.Tensor:
    """`(experts, out_features, in_features)`."""
    down, up = bank.factors()
    return up.transpose(1, 2) @ down


@every_bank
@given(inputs=sizes, outputs=sizes)
@settings(deadline=None, max_examples=15)
def test_factors_fit_a_linear_of_any_size(config, inputs, outputs):
    down, up = built(config, inputs, outputs).factors()
    assert down.shape == (1 if config.shared_down else config.experts, config.rank, inputs)
    assert up.shape == (config.experts, config.rank, outputs)
    assert joined(up).shape == (config.experts * config.rank, outputs)


@every_bank
def test_the_delta_is_zero_at_the_start_and_its_gradient_is_not(config):
    bank = built(config)
    assert (delta(bank) == 0).all()
    (delta(bank) - torch.randn(10, 12)).square().sum().backward()
    moves = [p for p in bank.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moves) == 1  # what is zero, and nothing else: the delta is a product


@every_bank
def test_everything_trains_once_the_delta_is_not_zero(config):
    bank = scrambled(built(config))
    delta(bank).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in bank.parameters())


@every_bank
def test_the_down_projection_starts_with_the_spread_of_loras(config):
    """U(-1/sqrt(d), 1/sqrt(d)) has the deviation 1 / sqrt(3 d)."""
    torch.manual_seed(0)
    downs = torch.cat([config.build(64, 8).factors()[0].flatten() for _ in range(100)])
    assert downs.mean().abs() < 0.003
    assert downs.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.06)


@every_bank
def test_resetting_makes_experts_new(config):
    bank = scrambled(built(config))
    before = {name: p.clone() for name, p in bank.named_parameters()}
    bank.reset_parameters()
    assert (delta(bank) == 0).all()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in bank.named_parameters())
    torch.manual_seed(7)
    bank.reset_parameters()
    again = {name: p.clone() for name, p in bank.named_parameters()}
    torch.manual_seed(7)
    bank.reset_parameters()
    assert all(torch.equal(parameter, again[name]) for name, parameter in bank.named_parameters())


def test_scales_multiply_the_outputs_of_their_expert():
    bank = scrambled(built(Dense(experts=3, rank=2, output_scale=True)))
    expected = torch.stack([bank.scale[e][:, None] * (bank.up[e].T @ bank.down[e]) for e in range(3)])
    torch.testing.assert_close(delta(bank), expected)


@given(inputs=sizes, order=st.integers(2, 4), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_rows_of_tensor_products_are_kronecker_products_cut_to_length(inputs, order, seed):
    """Su et al. 2024: leaves of length ceil(d^(1/order)), in the order of torch.kron."""
    torch.manual_seed(seed)
    bank = scrambled(TensorProduct(experts=2, rank=3, order=order).build(inputs, 5))
    leaf = bank.down.shape[-1]
    assert leaf**order >= inputs
    assert leaf == 1 or (leaf - 1) ** order < inputs
    down, _ = bank.factors()
    for expert in range(2):
        for row in range(3):
            product = bank.down[0, expert, row]
            for position in range(1, order):
                product = torch.kron(product, bank.down[position, expert, row])
            torch.testing.assert_close(down[expert, row], product[:inputs])


@pytest.mark.parametrize("order", [2, 3])
def test_leaves_are_blended_before_their_product(order):
    bank = scrambled(built(TensorProduct(experts=3, rank=2, order=order)))
    one_hot = torch.eye(3).unsqueeze(1).expand(3, order, 3)
    for blended, factor in zip(bank.blended(one_hot.flatten(1)), bank.factors(), strict=True):
        torch.testing.assert_close(blended, factor)
    weights = torch.rand(1, order, 3)
    mixed = built(TensorProduct(experts=1, rank=2, order=order))
    with torch.no_grad():
        for own, leaves in ((mixed.down, bank.down), (mixed.up, bank.up)):
            own.copy_((weights[0, :, :, None, None] * leaves).sum(1, keepdim=True))
    for blended, factor in zip(bank.blended(weights.flatten(1)), mixed.factors(), strict=True):
        torch.testing.assert_close(blended, factor)


@given(inputs=sizes, order=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_entries_of_a_tensor_train_are_products_of_its_cores_slices(inputs, order, seed):
    """Yang et al. 2024: entry (i_1 ... i_K, j) is G_1[i_1] G_2[i_2] ... G_K[i_K] G[j]."""
    torch.manual_seed(seed)
    bank = scrambled(TensorTrain(rank=2, train_rank=3, order=order).build(inputs, 5)).double()
    down, _ = bank.factors()
    mode = bank.down[0].shape[1]
    for feature in range(0, inputs, max(1, inputs // 5)):
        digits = [feature // mode ** (order - 1 - position) % mode for position in range(order)]
        row = torch.eye(1).double()
        for core, digit in zip(bank.down, digits, strict=False):
            row = row @ core[:, digit]
        expected = torch.stack([row @ bank.down[-1][:, rank] for rank in range(2)])
        torch.testing.assert_close(down[0, :, feature], expected.flatten())


def test_the_experts_of_a_cored_bank_are_the_matrices_between():
    bank = scrambled(built(Cored(experts=3, rank=2)))
    torch.testing.assert_close(delta(bank), torch.einsum("ro,ers,si->eoi", bank.up, bank.cores.mT, bank.down[0]))
    cores = built(Cored(experts=3, rank=8)).cores
    assert (cores - torch.eye(8)).abs().max() < 0.1
    assert not torch.equal(cores[0], cores[1])  # else they would stay alike


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (Dense, {"rank": 0}, r"rank \(=0\) must be at least 1"),
        (Dense, {"experts": 0}, r"experts \(=0\) must be at least 1"),
        (Cored, {"experts": -1}, r"experts \(=-1\) must be at least 1"),
        (TensorProduct, {"rank": 0}, r"rank \(=0\) must be at least 1"),
        (TensorProduct, {"order": 5}, r"order \(=5\) must be 2, 3 or 4: products of more numbers lose precision"),
        (TensorTrain, {"train_rank": 0}, r"train_rank \(=0\) must be at least 1"),
        (TensorTrain, {"experts": 2}, r"experts \(=2\) must be 1: a tensor train is one expert"),
    ],
)
def test_sizes_without_meaning_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
