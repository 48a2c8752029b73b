"""The mixture: shares that hold, no repeats within a pass, a pure function of seed and step."""

import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.support.config import parse
from loramux.support.errors import ConfigError
from loramux.tasks import Mixture, MixtureConfig

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
CONFIGS = st.builds(
    MixtureConfig,
    cap=st.none() | st.integers(1, 20),
    window=st.integers(1, 8),
    bucket_by_length=st.booleans(),
)


def mixture(sizes: list[int], config: MixtureConfig | None = None, *, batch_size: int = 4, seed: int = 0) -> Mixture:
    lengths = {f"t{i}": [(7 * i + 3 * j) % 50 + 1 for j in range(size)] for i, size in enumerate(sizes)}
    return Mixture(lengths, config, batch_size=batch_size, seed=seed)


def drawn(mix: Mixture, steps: int) -> Counter[tuple[int, int]]:
    return Counter(pair for step in range(steps) for pair in mix.batch(step))


@settings(max_examples=60, deadline=None)
@given(SIZES, CONFIGS, st.integers(1, 9), st.integers(1, 12))
def test_after_any_window_every_task_has_its_share_to_within_one_or_so(
    sizes: list[int], config: MixtureConfig, batch_size: int, windows: int
) -> None:
    mix = mixture(sizes, config, batch_size=batch_size)
    steps = windows * mix.window
    seen = Counter(task for task, _ in drawn(mix, steps).elements())
    for task, share in enumerate(mix.shares):
        assert abs(seen[task] - share * steps * batch_size) <= max(1, len(sizes) / 2)


@settings(max_examples=60, deadline=None)
@given(SIZES, CONFIGS, st.integers(1, 9), st.integers(1, 60))
def test_no_example_is_drawn_again_before_all_of_its_task_were(
    sizes: list[int], config: MixtureConfig, batch_size: int, windows: int
) -> None:
    mix = mixture(sizes, config, batch_size=batch_size)
    seen = drawn(mix, windows * mix.window)
    for task, size in enumerate(sizes):
        times = [seen[task, example] for example in range(size)]
        assert max(times) - min(times) <= 1


@settings(max_examples=60, deadline=None)
@given(SIZES, CONFIGS, st.integers(0, 99), st.integers(0, 2**31), st.integers(1, 9))
def test_a_resumed_run_sees_what_an_undisturbed_one_sees(
    sizes: list[int], config: MixtureConfig, start: int, seed: int, batch_size: int
) -> None:
    undisturbed, resumed = (mixture(sizes, config, batch_size=batch_size, seed=seed) for _ in range(2))
    seen = [undisturbed.batch(step) for step in range(start + 5)]
    assert [resumed.batch(step) for step in range(start, start + 5)] == seen[start:]


def test_steps_can_be_asked_for_in_any_order() -> None:
    mix = mixture([30, 11])
    forwards = [mix.batch(step) for step in range(80)]
    assert [mix.batch(step) for step in reversed(range(80))] == forwards[::-1]


def test_another_seed_is_another_order() -> None:
    assert mixture([30, 11], seed=1).batch(0) != mixture([30, 11], seed=2).batch(0)


def test_every_pass_is_shuffled_anew() -> None:
    mix = mixture([32], MixtureConfig(bucket_by_length=False, window=1))
    passes = [[frozenset(mix.batch(step)) for step in range(8 * n, 8 * n + 8)] for n in range(3)]
    assert len({tuple(one) for one in passes}) == 3
    assert all(frozenset().union(*one) == {(0, i) for i in range(32)} for one in passes)


def test_every_window_has_its_buckets_in_another_order() -> None:
    mix = mixture([500], MixtureConfig(window=8), batch_size=4)
    windows = [[max(mix.lengths[t][e] for t, e in mix.batch(8 * n + i)) for i in range(8)] for n in range(4)]
    orders = {tuple(sorted(range(8), key=window.__getitem__)) for window in windows}
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (MixtureConfig(), [0.1, 0.9]),
        (MixtureConfig(cap=30), [0.25, 0.75]),
        (MixtureConfig(cap=5), [0.5, 0.5]),
        (MixtureConfig(strategy="temperature", temperature=2), [0.25, 0.75]),
        (MixtureConfig(strategy="temperature", temperature=1e6), [0.5, 0.5]),
        (MixtureConfig(strategy="weights", weights={"t0": 4, "t1": 1}), [0.8, 0.2]),
        (MixtureConfig(strategy="weights", weights={"t1": 0.3, "t0": 0}), [0.0, 1.0]),
    ],
)
def test_shares(config: MixtureConfig, shares: list[float]) -> None:
    mix = mixture([10, 90], config)
    assert mix.shares == pytest.approx(shares, abs=1e-5)
    seen = Counter(task for task, _ in drawn(mix, 160).elements())
    assert [seen[0] / 640, seen[1] / 640] == pytest.approx(shares, abs=0.002)


def test_a_cap_bounds_the_rate_and_still_shows_every_example() -> None:
    seen = drawn(mixture([10, 90], MixtureConfig(cap=10)), 2 * 90 // 4 + 16)
    assert {example for task, example in seen if task == 1} == set(range(90))


def test_an_epoch_is_as_many_steps_as_there_are_examples_for() -> None:
    assert mixture([10, 90], batch_size=8).steps_per_epoch == 13
    assert mixture([10, 90], MixtureConfig(cap=20), batch_size=8).steps_per_epoch == 4


def test_buckets_waste_less_padding_and_draw_the_same_examples() -> None:
    plain, bucketed = (mixture([400, 300], MixtureConfig(bucket_by_length=on), batch_size=8) for on in (False, True))
    assert bucketed.padding_waste() < 0.5 * plain.padding_waste()
    assert drawn(plain, 16) == drawn(bucketed, 16)


def test_padding_waste_is_the_share_of_padded_positions() -> None:
    mix = Mixture({"a": [1, 3]}, batch_size=2)
    assert mix.padding_waste() == pytest.approx(2 / 6)
    assert mix.padding_waste(parts=2) == 0
    mix = Mixture({"a": [1, 3, 5, 5]}, batch_size=4)
    pieces = [[mix.lengths[task][example] for task, example in mix.batch(0)][part::2] for part in range(2)]
    assert mix.padding_waste(parts=2) == pytest.approx(1 - 14 / sum(2 * max(piece) for piece in pieces))


def test_a_small_task_does_not_fill_a_batch_with_copies() -> None:
    mix = mixture([8], MixtureConfig(window=16), batch_size=8)
    assert all(len(set(mix.batch(step))) == 8 for step in range(40))


def test_buckets_do_not_sort_the_run_by_length() -> None:
    mix = mixture([500], MixtureConfig(window=16), batch_size=8)
    means = [sum(mix.lengths[t][e] for t, e in mix.batch(step)) / 8 for step in range(16)]
    assert means != sorted(means)


def test_a_far_step_of_a_large_mixture_comes_at_once() -> None:
    mix = Mixture({f"t{i}": range(1, 20_001) for i in range(30)}, batch_size=32)
    mix.batch(0)
    started = time.perf_counter()
    mix.batch(10_000_000)
    assert time.perf_counter() - started < 1
    started = time.perf_counter()
    mix.padding_waste()
    assert time.perf_counter() - started < 1
    started = time.perf_counter()
    for step in range(1000, 1500):
        mix.batch(step)
    assert time.perf_counter() - started < 5, "500 steps must not cost a pass over the data each"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0}, "cap=0 must be at least 1"),
        ({"temperature": 0, "strategy": "temperature"}, "temperature=0.* must be above 0"),
        ({"temperature": 3.0}, "temperature=3.0 needs `strategy: temperature`"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"weights": {"a": 1}}, "`weights` and `strategy: weights` need each other"),
        ({"strategy": "weights"}, "`weights` and `strategy: weights` need each other"),
        ({"strategy": "uniform"}, "strategy: .*'proportional'"),
        ({"temprature": 2}, "temprature: unknown key; did you mean 'temperature'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(MixtureConfig, options, where="mixture")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"t0": 1, "t1": 1, "t00": 1}, "unknown task 't00'; did you mean 't0'"),
        ({"t0": 1}, "none for t1; give 0 to leave a task out"),
        ({"t0": 1, "t1": -1}, "t1=-1.* must be 0 or more"),
        ({"t0": 1, "t1": float("nan")}, "t1=nan must be 0 or more"),
        ({"t0": 0, "t1": 0}, "all are 0"),
    ],
)
def test_wrong_weights_are_named(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixture([3, 4], MixtureConfig(strategy="weights", weights=weights))


def test_a_mixture_needs_a_batch_and_examples() -> None:
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        mixture([3], batch_size=0)
    with pytest.raises(ConfigError, match="task 't1' has no training examples"):
        mixture([3, 0])
