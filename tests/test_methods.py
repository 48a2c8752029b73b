"""What every method must do, whatever it is: one suite over all presets."""

import re

import pytest
import torch
from cases import (
    CASES,
    MIXES_THE_BASE,
    ONE_EXPERT,
    RANDOM_IN_TRAINING,
    TASKS,
    a_batch,
    adapted,
    logits,
    task_of_rows,
    tiny_llama,
    train_a_little,
    trained,
    with_random_experts,
)
from peft import LoraConfig, PeftModel, get_peft_model

from loramux.adapters import (
    Dense,
    Linear,
    LoramuxConfig,
    adapted_linears,
    check_ranks,
    count_parameters,
    exact_factors,
    find_method,
    method_config,
    methods,
)
from loramux.routing import Granularity
from loramux.support.errors import AdapterError, ConfigError

every_method = pytest.mark.parametrize("method", list(CASES))
constant_methods = pytest.mark.parametrize(
    "method", [m for m in CASES if method_config(m, tasks=TASKS).granularity < Granularity.TOKEN]
)
token_methods = pytest.mark.parametrize(
    "method", [m for m in CASES if method_config(m, tasks=TASKS).granularity == Granularity.TOKEN]
)


def test_every_registered_method_has_a_row_in_the_suite():
    assert set(methods()) == set(CASES) == set(ONE_EXPERT)


@every_method
def test_before_training_the_adapted_model_is_the_base(method):
    ours, base = logits(adapted(method).eval(), routing_tasks=task_of_rows()), logits(tiny_llama())
    torch.testing.assert_close(ours, base, rtol=0, atol=1e-6 if method in MIXES_THE_BASE else 0)


TELLS_NO_TASKS_APART = {
    *("comol", "hydralora", "lora", "loramoe", "loretta", "mixlora", "mola", "molora", "mosa", "multilora", "smora"),
    "tlora",
}


@every_method
def test_a_method_that_tells_tasks_apart_wants_their_names(method):
    if method in TELLS_NO_TASKS_APART:
        assert logits(adapted(method, ONE_EXPERT[method], tasks=[])).isfinite().all()
        return
    message = rf"method '{method}' tells tasks apart and none is named: .*tasks=\['one', 'other'\].*tasks: tasks.yaml"
    with pytest.raises(AdapterError, match=message):
        adapted(method, {}, tasks=[])


RANK_20 = {"smora": {"rank": 40, "top_k": 20, "block_size": 20}, "mosa": {"rank": 40, "modules": 2}}


@every_method
def test_a_rank_above_what_a_linear_can_hold_is_refused_unless_it_is_allowed(method):
    options = {**CASES[method], **RANK_20.get(method, {"rank": 20})}
    refusal = r"layers.0.self_attn.k_proj: experts of rank 20 are more than a linear of 32 x 16 can hold, which is 16; "
    with pytest.raises(AdapterError, match=refusal + r"lower the rank, .* or allow it \(excess_rank: true\)"):
        adapted(method, options)
    linears = adapted_linears(adapted("lora").base_model)
    with pytest.raises(ValueError, match="experts of rank 20 are more than a linear of 32 x 16 can hold"):
        check_ranks(method_config(method, tasks=TASKS, options=options), linears)
    assert logits(adapted(method, options, excess_rank=True), routing_tasks=task_of_rows()).isfinite().all()


@every_method
def test_exactly_the_adapter_is_trainable(method):
    model = adapted(method)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    grouped = {name for group in model.base_model.parameter_groups().values() for name, _ in group}
    assert trainable == {name for name, _ in model.named_parameters() if "loramux_" in name}
    assert {f"base_model.{name}" for name in grouped} == trainable


@every_method
def test_training_lowers_the_loss_moves_every_tensor_and_leaves_the_base_alone(method):
    model = adapted(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train_a_little(model, steps=8)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("loramux_" not in name), name


@every_method
def test_with_one_expert_the_method_is_plain_lora_in_function_and_gradient(method):
    model = with_random_experts(method, ONE_EXPERT[method], tasks=["only"])
    hub = model.base_model
    factors = {
        name: [branch.bank.factors() for branch in layer.branches("default")] for name, layer in hub.layers().items()
    }
    rank = sum(down.shape[1] for down, _ in next(iter(factors.values())))
    plain = get_peft_model(
        tiny_llama(), LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, pairs in factors.items():
        stock = plain.base_model.model.get_submodule(name)
        stock.lora_A.default.weight.data.copy_(torch.cat([down[0] for down, _ in pairs]))
        stock.lora_B.default.weight.data.copy_(torch.cat([up[0] for _, up in pairs]).T)
    torch.testing.assert_close(logits(model, routing_tasks="only"), logits(plain.eval()), atol=1e-5, rtol=1e-5)
    model(**a_batch(), routing_tasks="only").loss.backward()
    plain(**a_batch()).loss.backward()
    for name, layer in hub.layers().items():
        stock = plain.base_model.model.get_submodule(name).lora_A.default.weight.grad
        banks = [branch.bank for branch in layer.branches("default")]
        if all(isinstance(branch.config.bank, Dense) for branch in layer.branches("default")):
            ours = torch.cat([bank.down.grad[0] for bank in banks])
            torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
        assert all(p.grad is not None for bank in banks for p in bank.parameters())


@every_method
def test_training_and_evaluation_mode_differ_only_where_training_draws_at_random(method):
    model = trained(method)
    evaluated = logits(model, routing_tasks=task_of_rows())
    assert torch.equal(logits(model, routing_tasks=task_of_rows()), evaluated)
    model.train()
    same = torch.equal(logits(model, routing_tasks=task_of_rows()), evaluated)
    assert same == (method not in RANDOM_IN_TRAINING)


@every_method
def test_rows_do_not_see_each_other(method):
    model = trained(method)
    batch, ids = a_batch(), task_of_rows()
    together = logits(model, routing_tasks=ids)
    for row in range(len(ids)):
        alone = model(
            input_ids=batch["input_ids"][row : row + 1],
            attention_mask=batch["attention_mask"][row : row + 1],
            routing_tasks=ids[row : row + 1],
        ).logits
        keep = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][keep], alone[0][keep], atol=1e-5, rtol=1e-5)


@constant_methods
def test_both_execution_paths_are_one_function(method):
    model = trained(method).double()
    materialised = logits(model, routing_tasks=task_of_rows())
    for layer in model.base_model.layers().values():
        for branch in layer.branches("default"):
            branch.prefer_mixing = True
    torch.testing.assert_close(logits(model, routing_tasks=task_of_rows()), materialised, atol=1e-12, rtol=1e-12)


@constant_methods
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_export_is_exact_where_the_weights_are_constant(method, dtype, bound):
    model = trained(method).to(dtype)
    for task in TASKS:
        factors = {}
        with model.base_model.routing(task):
            factors = {name: layer.factors("default") for name, layer in model.base_model.layers().items()}
        routed = logits(model, routing_tasks=task)
        with model.base_model.using_factors(factors):
            assert (logits(model) - routed).abs().max() < bound


@constant_methods
def test_merged_equals_routed_and_unmerging_restores_the_base(method):
    model = trained(method)
    hub = model.base_model
    routed = logits(model, routing_tasks="where")
    with hub.routing("where"):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), routed, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model, routing_tasks="where"), routed, atol=1e-5, rtol=1e-5)
    with hub.routing("where"):
        merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(tiny_llama())
    torch.testing.assert_close(logits(merged), routed, atol=1e-5, rtol=1e-5)


@token_methods
def test_merging_or_exactly_exporting_a_token_routed_method_is_refused(method):
    model = trained(method)
    with pytest.raises(AdapterError, match="routes every token by itself"):
        model.merge_and_unload()
    with pytest.raises(AdapterError, match="routes every token by itself"):
        exact_factors(model.base_model, "who")


def test_merging_a_task_routed_method_without_naming_the_task_is_refused():
    model = trained("moa")
    logits(model, routing_tasks="where")  # what an earlier call named must not decide a merge
    with pytest.raises(AdapterError, match="different weight update for each task"):
        model.merge_and_unload()


def test_the_balance_loss_does_not_grow_with_the_number_of_layers():
    model = adapted("molora")
    model.train()
    model(**a_batch())
    assert 0.005 < model.base_model.auxiliary_loss().item() < 0.02  # 0.01 where the load is even


@every_method
def test_a_saved_adapter_reloads_under_another_name_with_equal_logits(method, tmp_path):
    model = trained(method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="again").eval()
    assert torch.equal(logits(again, routing_tasks=task_of_rows()), logits(model, routing_tasks=task_of_rows()))
    if not model.base_model.needs_task:
        assert torch.equal(logits(again), logits(model))


@every_method
def test_beams_keep_the_routing_of_their_row(method):
    model = trained(method)
    batch = a_batch(rows=3)
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    together = model.generate(batch["input_ids"], routing_tasks=TASKS, **settings)
    for row, task in enumerate(TASKS):
        alone = model.generate(batch["input_ids"][row : row + 1], routing_tasks=task, **settings)
        width = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[2 * row : 2 * row + 2, :width], alone[:, :width])


@every_method
def test_gradient_checkpointing_changes_no_gradient_and_no_balance(method):
    gradients, biases = [], []
    for checkpointing in (False, True):
        model = adapted(method)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "loramux_" in name:
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(**a_batch(), routing_tasks=task_of_rows()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        model.base_model.finish_step()
        biases.append([b.clone() for n, b in model.named_buffers() if "selection_bias" in n])
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(biases[0], biases[1])


@every_method
def test_the_reported_parameter_count_is_the_real_one(method):
    model = adapted(method)
    hub = model.base_model
    config = method_config(method, tasks=TASKS, options=CASES[method])
    counted = count_parameters(config, adapted_linears(hub), tasks=len(TASKS), hidden_size=32)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        ("alter", lambda i, o: 3 * 4 * (i + o) + 3 * 3),
        ("arrow", lambda i, o: 3 * 4 * (i + o)),
        ("clp", lambda i, o: 3 * 4 * (i + o)),
        ("comol", lambda i, o: 4 * (i + o) + 3 * 4 * 4 + 3 * 4),
        ("distil_gate", lambda i, o: 3 * 4 * (i + o) + (i + 1) * 8 + 8 + 1),
        ("dselect_k", lambda i, o: 3 * 4 * (i + o) + 3 * (2 * 2 + 2)),
        ("hydralora", lambda i, o: 4 * i + 3 * 4 * o + 3 * i),
        ("lora", lambda i, o: 4 * (i + o)),
        ("loramoe", lambda i, o: 4 * 4 * (i + o) + 4 * i),
        ("loretta", lambda i, o: sum(1 * n * 3 + 3 * n * 3 + 3 * 4 * 1 for n in (6, 7))),
        ("madx", lambda i, o: 2 * 4 * (i + o) + 3 * 4 * (i + o)),
        ("mhr", lambda i, o: 3 * 4 * (i + o) + 3 * 3 * 4),
        ("moa", lambda i, o: 3 * 4 * (i + o)),
        ("moelora", lambda i, o: 3 * 4 * (i + o) + 3 * 64 + 64 * 3),
        ("mola", lambda i, o: 2 * 4 * (i + o) + 2 * i),
        ("molora", lambda i, o: 4 * 4 * (i + o) + 4 * i),
        ("mosa", lambda i, o: 8 * (i + o)),
        ("mtl_lora", lambda i, o: 4 * i + 3 * 4 * o + 3 * (4 * 4 + 3)),
        ("mtlora", lambda i, o: (4 + 3 * 2) * (i + o)),
        ("multilora", lambda i, o: 3 * 4 * (i + o) + 3 * o),
        ("palora", lambda i, o: (4 + 3 * 4) * (i + o)),
        ("poly", lambda i, o: 3 * 4 * (i + o) + 3 * 3),
        ("router_retriever", lambda i, o: 3 * 4 * (i + o)),
        ("scalearn", lambda i, o: 3 * 4 * (i + o) + 3 * 3),
        ("skillnet", lambda i, o: 3 * 4 * (i + o)),
        ("smora", lambda i, o: 16 * (i + o) + 16 * i),
        ("taps", lambda i, o: 3 * 4 * (i + o) + 3),
        ("task_aware_moe", lambda i, o: 4 * 4 * (i + o) + 4 * i + 3 * 32 + 32 * 4),
        ("task_moe", lambda i, o: 3 * 4 * (i + o) + 3 * 64 + (64 + 1) * 64 + (64 + 1) * 3),
        ("tensorpoly", lambda i, o: 2 * 3 * 4 * (6 + 7) + 3 * 3),
        ("tlora", lambda i, o: 2 * 3 * 4 * (6 + 7)),
    ],
)
def test_parameter_formulas_of_the_papers(method, formula):
    """On a linear of 32 x 48, whose square roots round up to 6 and 7, for three tasks."""
    config = method_config(method, tasks=TASKS, options=CASES[method])
    router = 3 * 32 if method == "moa" else 0
    assert count_parameters(config, [Linear(32, 48)], tasks=3, hidden_size=32) == formula(32, 48) + router


def test_variants_count_by_their_own_formulas():
    def count(method: str, depth: float = 0.0, **options) -> int:
        config = method_config(method, tasks=TASKS, options={**CASES[method], **options})
        return count_parameters(config, [Linear(32, 48, depth)], tasks=3, hidden_size=32)

    i, o = 32, 48
    assert count("mtl_lora", core="diagonal") == 4 * i + 3 * 4 * o + 3 * (4 + 3)
    assert count("tensorpoly", variant="II") == 2 * 3 * 4 * (6 + 7) + 3 * 3 * 2
    assert count("tensorpoly", order=3) == 3 * 3 * 4 * (4 + 4) + 3 * 3
    assert count("smora", block_size=4) == 16 * (i + o) + 16 * i // 4
    assert count("task_aware_moe", gate="separate") == 4 * 4 * (i + o) + 3 * 4 * i
    assert count("scalearn", uniform=True) == 3 * 4 * (i + o) + 3 * 3
    assert count("mola", depth=0.5) == 4 * 4 * (i + o) + 4 * i


def test_higher_layers_have_more_experts_where_the_method_says_so():
    hub = adapted("mola", {"rank": 4, "experts": [2, 4]}).base_model
    experts = {name: layer.branches("default")[0].config.bank.experts for name, layer in hub.layers().items()}
    assert all(count == (2 if ".layers.0." in name else 4) for name, count in experts.items())
    config = method_config("mola", tasks=TASKS, options={"experts": [2, 4, 6, 8]})
    depths = [layer / 32 for layer in range(32)]
    assert [config.at(depth)[0].bank.experts for depth in depths] == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert hub.depth_of("lm_head") == 0.0  # its name tells nothing


@every_method
def test_a_bfloat16_base_gets_float32_experts_and_trains(method):
    torch.manual_seed(1)
    config = LoramuxConfig(
        method=method, options=CASES[method], tasks=TASKS, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), config)
    assert {p.dtype for n, p in model.named_parameters() if "loramux_" in n} == {torch.float32}
    assert {b.dtype for n, b in model.named_buffers() if "selection_bias" in n} <= {torch.float32}
    losses = train_a_little(model, steps=6)
    assert losses[-1] < losses[0]
    assert logits(model, routing_tasks="who").dtype == torch.bfloat16


@every_method
def test_every_preset_documents_itself(method):
    preset = find_method(method)
    assert preset.summary.endswith(".")
    assert "arXiv" in preset.paper


def test_unknown_methods_and_options_name_the_nearest_valid_one():
    with pytest.raises(ConfigError, match="unknown method 'smroa'; did you mean 'smora'"):
        method_config("smroa", tasks=TASKS[:1])
    with pytest.raises(ConfigError, match="unknown option 'rnak'; did you mean 'rank'"):
        method_config("lora", tasks=TASKS[:1], options={"rnak": 8})
    with pytest.raises(ConfigError, match="rank: Input should be a valid integer"):
        method_config("lora", tasks=TASKS[:1], options={"rank": "big"})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"rank": 0}, "rank: Input should be greater than 0"),
        ("molora", {"experts": 2, "top_k": 3}, r"top_k \(=3\) must be at most experts \(=2\)"),
        ("smora", {"rank": 8, "top_k": 16}, r"top_k \(=16\) must be at most rank \(=8\)"),
        ("smora", {"rank": 64, "block_size": 3}, r"block_size \(=3\) must divide rank \(=64\)"),
        ("moa", {"router_share": 1.0}, r"router_share \(=1.0\) must be between 0 and 1"),
        ("lora", {"dropout": 1.0}, r"dropout \(=1.0\) must be in"),
        ("alter", {"gate_share": 0.0}, r"gate_share \(=0.0\) must be between 0 and 1"),
        ("scalearn", {"scale_share": 1.5}, r"scale_share \(=1.5\) must be between 0 and 1"),
        ("task_moe", {"route_share": 1.0}, r"route_share \(=1.0\) must be between 0 and 1"),
        ("taps", {"threshold": 0.0}, r"threshold \(=0.0\) must be between 0 and 0.15"),
        ("taps", {"threshold": 0.2}, r"threshold \(=0.2\) must be between 0 and 0.15"),
        ("distil_gate", {"budget": 1.0}, r"budget \(=1.0\) must be between 0 and 1"),
        ("mosa", {"rank": 8, "modules": 3}, r"modules \(=3\) must divide rank \(=8\)"),
        ("mola", {"experts": [1, 4]}, r"top_k \(=2\) must be at most experts \(=1\)"),
        ("mola", {"experts": []}, r"top_k \(=2\) must be at most experts \(=0\)"),
        ("dselect_k", {"experts": 2, "top_k": 3}, r"top_k \(=3\) must be at most experts \(=2\)"),
        ("task_aware_moe", {"gate": "own"}, "gate: Input should be 'joined' or 'separate'"),
        ("tensorpoly", {"order": 5}, r"order \(=5\) must be 2, 3 or 4"),
        ("mtl_lora", {"temperature": 0.0}, r"temperature \(=0.0\) must be positive"),
        ("dselect_k", {"gamma": 0.0}, r"gamma \(=0.0\) must be positive"),
        ("skillnet", {"skills": {"who": ["a"], "where": []}}, "skills: where needs at least one skill"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_built(method, options, message):
    with pytest.raises(ConfigError, match=message):
        method_config(method, tasks=TASKS[:2], options=options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("skillnet", {"skills": {"who": ["a"]}}, "skills: nothing said of where (write method: {options: {skills: {"),
        (
            "skillnet",
            {"skills": {"who": ["a"], "where": ["a"], "wen": ["b"]}},
            "unknown task 'wen'; did you mean 'where'? (write method: {options: {skills: {who: ..., where: ...}}})",
        ),
        ("madx", {"languages": {"where": "en"}}, "languages: nothing said of who (write method: {options: {languages:"),
        ("madx", {"languages": {"who": "en", "where": "en", "x": "de"}}, "unknown task 'x'; known: where, who (write"),
        ("loramoe", {"knowledge_tasks": ["whoo"]}, "knowledge_tasks: unknown task 'whoo'; did you mean 'who'?"),
    ],
)
def test_what_is_said_task_by_task_names_every_task_and_no_other(method, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        method_config(method, tasks=TASKS[:2], options=options)


@pytest.mark.parametrize("method", ["skillnet", "taps", "moelora", "task_aware_moe", "palora"])
def test_an_unknown_task_is_refused_before_the_model_runs(method):
    model = adapted(method)
    for tasks, message in (
        ("nobody", "unknown task 'nobody'; this adapter knows: who, where, when"),
        (torch.tensor([0, 1, 2, 3]), r"task id 3 is outside 0\.\.2"),
        ({"who": 0.5, "nobody": 0.5}, "unknown task 'nobody'"),
        ({"who": 0.5, "where": 0.6}, "must sum to one"),
        (torch.tensor([0.5, 0.5]), "has 3 shares, one per task; got 2"),
        (torch.eye(3), "names 3 rows, the batch has 4"),
        (None, "routed by task: pass routing_tasks="),
    ):
        with pytest.raises(AdapterError, match=message):
            logits(model, routing_tasks=tasks)
