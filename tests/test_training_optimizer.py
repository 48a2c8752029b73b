"""Stages, schedules, parameter groups and clipping."""

import pytest
import torch
from cases import adapted

from loramux.adapters import BranchConfig, Dense, MethodConfig, StageConfig, method_config
from loramux.support.errors import ConfigError
from loramux.training.batches import rows_of_process
from loramux.training.optimizer import build_optimizer, clip_gradients, parameter_names, schedule_factor
from loramux.training.recipe import TrainConfig
from loramux.training.schedule import stage_spans

STAGES = (StageConfig(name="experts", share=3), StageConfig(name="router", share=1))


def test_stages_share_the_steps_without_gap_or_overlap() -> None:
    for steps in range(4, 60):
        spans = stage_spans(STAGES, steps)
        assert (spans[0].start, spans[0].stop, spans[1].stop) == (0, spans[1].start, steps)
        assert abs(spans[1].length - steps / 4) <= 0.5


def test_a_stage_without_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.steps \(=1\) leaves no step for stage 'router'; raise it"):
        stage_spans(STAGES, 1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_schedule_rises_to_one_and_then_never_rises(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, warmup_ratio=0.1)
    factors = [schedule_factor(step, 100, config) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[0] > 0
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] <= 1 if schedule == "constant" else 0 < factors[-1] < 0.05


def test_every_group_has_its_own_rate_and_only_factors_decay() -> None:
    config = TrainConfig(learning_rate=1e-3, router_learning_rate=5e-4, weight_decay=0.1)
    for method in ("smora", "multilora"):
        hub = adapted(method).base_model
        optimizer = build_optimizer(hub.parameter_groups(), config, hub.method())
        for group in optimizer.param_groups:
            for name in group["param_names"]:
                factor = name.endswith((".down", ".up"))
                assert group["weight_decay"] == (0.1 if factor else 0.0), name
                assert group["peak_lr"] == (5e-4 if ".router." in name else 1e-3), name
        trained = {id(p) for _, p in parameter_names(optimizer)}
        assert trained == {id(p) for p in hub.parameters() if p.requires_grad}


def test_methods_say_how_fast_what_routes_learns_unless_the_recipe_does() -> None:
    groups = {name: [(name, torch.nn.Parameter(torch.zeros(3, 2)))] for name in ("experts", "router", "task_logits")}
    fast = MethodConfig(branches=(BranchConfig(bank=Dense()),), router_rate=3.0, task_logit_rate=50.0)
    assert rates_of(groups, TrainConfig(learning_rate=1e-3), fast) == pytest.approx([1e-3, 3e-3, 5e-2])
    told = TrainConfig(learning_rate=1e-3, router_learning_rate=0.2, task_logit_learning_rate=0.1)
    assert rates_of(groups, told, fast) == [1e-3, 0.2, 0.1]
    logits = {"task_logits": groups["task_logits"]}
    for method, rate in (("mtl_lora", 10), ("alter", 10), ("poly", 50), ("mhr", 50)):
        built = method_config(method, tasks=("one", "other"))
        assert rates_of(logits, TrainConfig(learning_rate=1e-3), built) == pytest.approx([rate * 1e-3])


def rates_of(groups, config: TrainConfig, method: MethodConfig) -> list[float]:
    optimizer = build_optimizer(groups, config, method)
    return [group["lr"] for group in optimizer.param_groups]


def gradients(*values: torch.Tensor) -> torch.optim.Optimizer:
    groups = {"experts": [(f"e{i}", torch.nn.Parameter(torch.zeros_like(v))) for i, v in enumerate(values)]}
    optimizer = build_optimizer(groups, TrainConfig(), method_config("lora", tasks=()))
    for (_, parameter), value in zip(parameter_names(optimizer), values, strict=True):
        parameter.grad = value.clone()
    return optimizer


def test_clipping_limits_the_common_norm() -> None:
    optimizer = gradients(torch.full((2, 3, 4), 1.0), torch.full((2, 5, 1), 2.0))
    expected = (24 * 1.0 + 10 * 4.0) ** 0.5
    assert clip_gradients(optimizer, 1.0, tasks=2, reduction="token") == pytest.approx(expected)
    left = [p.grad for _, p in parameter_names(optimizer)]
    assert float(torch.nn.utils.get_total_norm(left)) == pytest.approx(1.0, rel=1e-5)


def test_without_a_limit_gradients_stay() -> None:
    optimizer = gradients(torch.full((2, 3, 4), 9.0))
    clip_gradients(optimizer, None, tasks=2, reduction="token")
    assert float(next(p.grad for _, p in parameter_names(optimizer)).max()) == 9.0


def test_side_by_side_experts_are_clipped_as_they_would_be_alone() -> None:
    torch.manual_seed(0)
    down, up = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    down[1] *= 100
    together = gradients(down, up)
    clip_gradients(together, 1.0, tasks=2, reduction="task")
    for expert in range(2):
        alone = gradients(down[expert : expert + 1], up[expert : expert + 1])
        clip_gradients(alone, 1.0, tasks=1, reduction="token")
        pairs = zip(parameter_names(together), parameter_names(alone), strict=True)
        for (_, joint), (_, single) in pairs:
            torch.testing.assert_close(joint.grad[expert], single.grad[0])


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)])
def test_every_row_of_a_global_batch_goes_to_exactly_one_micro_batch(processes: int, parts: int) -> None:
    batch = [(i % 3, i) for i in range(7)]
    given = [rows_of_process(batch, process, processes, parts) for process in range(processes)]
    assert sorted(row for share in given for part in share for row in part) == sorted(batch)
    assert all(part for share in given for part in share)


def test_a_batch_that_leaves_a_process_idle_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch of 3 examples cannot be divided over 2 processes x 2 micro-batches"):
        rows_of_process([(0, 0)] * 3, 0, 2, 2)
