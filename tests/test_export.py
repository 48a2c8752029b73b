"""Exports: plain LoRA folders, measured, readable where loramux is not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, TASKS, a_batch, logits, tiny_llama, trained
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loramux.adapters import (
    RANK_CLASSES,
    BaseIdentity,
    ExportConfig,
    LowRank,
    exact_factors,
    export_task,
    measure_fidelity,
    methods,
)
from loramux.adapters.export import verify_tensors
from loramux.adapters.fit import distil, fit_factors
from loramux.adapters.low_rank import rank_class, to_one_rank_class
from loramux.support.errors import ExportRefused

EXACT = [name for name in CASES if methods()[name].build(tuple(TASKS)).exports_exactly]
FITTED = [name for name in CASES if name not in EXACT]
BASE = BaseIdentity("somebody/tiny-base", "abc123")

STOCK_READER = """
import sys
sys.modules["loramux"] = None  # any import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
inputs = torch.load("batch.pt", weights_only=True)
for method in sys.argv[1:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), method).eval()
    with torch.no_grad():
        torch.save(model(**inputs).logits, f"{method}.pt")
"""


def batches(count: int, rows: int = 32) -> list[dict[str, torch.Tensor]]:
    return [a_batch(rows=rows, seed=seed) for seed in range(100, 100 + count)]


def test_stock_peft_reads_exact_exports_in_a_process_without_loramux(tmp_path):
    expected = {}
    for method in EXACT:
        model = trained(method)
        report = export_task(model, "where", tmp_path / method, base=BASE, calibration=[], held_out=batches(1))
        assert report.how == "exact"
        expected[method] = logits(model, routing_tasks="where")
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.save({key: a_batch()[key] for key in ("input_ids", "attention_mask")}, tmp_path / "batch.pt")
    subprocess.run([sys.executable, "-c", STOCK_READER, *EXACT], check=True, cwd=tmp_path)
    for method in EXACT:
        stock = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        assert (stock - expected[method]).abs().max() < 1e-4, method


@pytest.mark.parametrize("method", FITTED)
def test_a_fitted_export_is_close_on_the_tasks_own_inputs(method, tmp_path):
    model = trained(method)
    seen = batches(6)
    report = export_task(model, "who", tmp_path / "who", base=BASE, calibration=seen, held_out=seen, allow_lossy=True)
    assert report.how.startswith("least squares")
    assert report.fidelity.token_kl < 0.75 * report.fidelity.base_kl  # untrained experts: the hardest case there is
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "who").eval()
    factors = load_file(tmp_path / "who" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in factors.items() if "lora_A" in name} == {report.rank}
    with torch.no_grad():
        assert logits(stock).isfinite().all()


def test_least_squares_recovers_a_layer_that_is_a_plain_lora():
    model = trained("lora")
    factors = fit_factors(model.base_model, "who", batches(20), rank=4)
    fidelity = measure_fidelity(model.base_model, "who", factors, batches(2))
    assert fidelity.token_kl < 1e-4 * max(fidelity.base_kl, 1e-3)


def test_distillation_brings_a_poor_fit_closer():
    hub = trained("smora").base_model
    seen = batches(4)
    poor = fit_factors(hub, "who", seen, rank=1)
    better = distil(hub, "who", seen, poor, steps=30)
    before, after = (measure_fidelity(hub, "who", f, seen).token_kl for f in (poor, better))
    assert after < before


def test_an_export_over_the_bound_is_refused_with_its_figures_and_writes_nothing(tmp_path):
    model = trained("smora")
    strict = ExportConfig(max_kl=1e-9, distil_steps=0, rank=8)
    with pytest.raises(ExportRefused, match=r"divergence .* nats per token is over the bound of 1e-09.*--allow-lossy"):
        export_task(
            model, "who", tmp_path / "who", base=BASE, calibration=batches(1), held_out=batches(1), settings=strict
        )
    assert list(tmp_path.iterdir()) == []


def test_a_lossy_export_says_so_in_its_card(tmp_path):
    model = trained("smora")
    strict = ExportConfig(max_kl=1e-9, distil_steps=0, rank=8)
    export_task(
        model,
        "who",
        tmp_path,
        base=BASE,
        calibration=batches(1),
        held_out=batches(1),
        settings=strict,
        allow_lossy=True,
    )
    assert "**Lossy export:**" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "export.json").read_text())["faults"]


def test_an_export_that_costs_too_much_of_the_metric_is_refused(tmp_path):
    scores = iter([0.9, 0.8])
    with pytest.raises(ExportRefused, match=r"the metric falls from 0\.900 to 0\.800"):
        export_task(
            trained("lora"),
            "who",
            tmp_path / "who",
            base=BASE,
            calibration=[],
            held_out=batches(1),
            score=lambda: next(scores),
        )


def test_what_is_measured_is_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("loramux.adapters.low_rank.RANK_CLASSES", (2,))  # smaller than the adapter's rank of 4
    model = trained("lora")
    with pytest.raises(ExportRefused, match="logits differ by"):
        export_task(model, "who", tmp_path / "who", base=BASE, calibration=[], held_out=batches(1))


def test_trained_heads_are_not_dropped_silently(tmp_path):
    model = trained("moa", modules_to_save=["lm_head"])
    with pytest.raises(ExportRefused, match="modules_to_save"):
        export_task(model, "who", tmp_path / "who", base=BASE, calibration=[], held_out=batches(1))


@pytest.mark.parametrize("name", ["/home/me/base", "./base", "~/base", "a/b/c"])
def test_a_base_that_only_this_machine_can_find_is_refused(name, tmp_path):
    with pytest.raises(ExportRefused, match="path of this machine"):
        export_task(
            trained("lora"), "who", tmp_path / "who", base=BaseIdentity(name), calibration=[], held_out=batches(1)
        )


def test_the_config_is_what_peft_and_vllm_expect(tmp_path):
    export_task(trained("moa"), "who", tmp_path, base=BASE, calibration=[], held_out=batches(1))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"]
    assert config["r"] in RANK_CLASSES
    assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/tiny-base", "abc123")
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert not config["bias"].replace("none", "")
    assert not config["use_rslora"]
    assert not config["use_dora"]


def test_layers_that_share_a_name_with_unadapted_ones_are_named_in_full(tmp_path):
    model = trained("moa", layers_to_transform=[1], layers_pattern="layers", target_modules=["q_proj"])
    export_task(model, "who", tmp_path, base=BASE, calibration=[], held_out=batches(1))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert (logits(stock) - logits(model, routing_tasks="who")).abs().max() < 1e-4


def test_the_card_has_valid_metadata_and_the_measured_figures(tmp_path):
    facts = {
        "description": "Says who did it.",
        "examples": [{"input": "Mia | hid the cup.", "target": "Mia"}],
        "scores": {"base": 0.1, "exported": 0.9},
        "split": "validation",
        "recipe": "method: {name: moa}",
    }
    export_task(trained("moa"), "who", tmp_path, base=BASE, calibration=[], held_out=batches(1), card=facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "somebody/tiny-base"
    assert card.data.library_name == "peft"
    for text in (
        "Says who did it.",
        r"Mia \| hid the cup.",
        "| system | validation metric |",
        "| exported | 0.900 |",
        "same most likely token",
        "vllm serve",
    ):
        assert text in card.content


def test_exporting_twice_replaces_the_folder_as_a_whole(tmp_path):
    target = tmp_path / "who"
    target.mkdir()
    (target / "stale.txt").write_text("old")
    export_task(trained("moa"), "who", target, base=BASE, calibration=[], held_out=batches(1))
    assert not (target / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["who"]


@pytest.mark.parametrize(("rank", "expected"), [(1, 8), (8, 8), (9, 16), (65, 128), (257, 320), (600, 512)])
def test_ranks_are_rounded_up_to_a_class(rank, expected):
    assert rank_class(rank) == expected


def test_padding_and_exact_compression_keep_the_delta():
    generator = torch.Generator().manual_seed(0)
    wide = LowRank(torch.randn(40, 12, generator=generator), torch.randn(16, 40, generator=generator))
    narrow = LowRank(torch.randn(4, 12, generator=generator), torch.randn(16, 4, generator=generator))
    uniform = to_one_rank_class({"wide": wide, "narrow": narrow})
    assert {pair.rank for pair in uniform.values()} == {16}
    torch.testing.assert_close(uniform["wide"].delta(), wide.delta(), atol=1e-4, rtol=1e-5)
    assert torch.equal(uniform["narrow"].delta(), narrow.delta())


def test_a_saved_file_that_lost_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ExportRefused, match="tensor b is missing or differs"):
        verify_tensors(Path(path), {"a": torch.zeros(2), "b": torch.zeros(2)})


def test_single_tasks_train_and_join_without_moving_the_others(tmp_path):
    model = trained("moa")
    hub = model.base_model
    before = {task: logits(model, routing_tasks=task) for task in TASKS}
    hub.add_task("new")
    hub.train_only(["new", "who"])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(**a_batch(), routing_tasks=["new", "who", "new", "who"]).loss.backward()
        optimizer.step()
        hub.finish_step()
    model.eval()
    assert torch.equal(logits(model, routing_tasks="where"), before["where"])
    assert torch.equal(logits(model, routing_tasks="when"), before["when"])
    assert not torch.equal(logits(model, routing_tasks="who"), before["who"])
    assert not torch.equal(logits(model, routing_tasks="new"), logits(tiny_llama()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(again, routing_tasks="new"), logits(model, routing_tasks="new"))


@pytest.mark.parametrize(
    ("method", "task", "ranks"),
    [
        ("clp", "who", {4}),  # one expert, of three of rank 4
        ("clp", {"who": 0.3, "where": 0.7}, {8}),
        ("palora", "who", {8}),  # the shared LoRA beside it
        ("palora", {"who": 0.2, "where": 0.3, "when": 0.5}, {16}),
        ("madx", "when", {8}),
        ("skillnet", "who", {8}),  # two of three skills
        ("skillnet", "where", {4}),
    ],
)
def test_experts_with_weight_zero_take_no_rank_in_an_export(method, task, ranks):
    model = trained(method)
    factors = exact_factors(model.base_model, task)
    assert {pair.rank for pair in factors.values()} == ranks
    routed = logits(model, routing_tasks=task)
    with model.base_model.using_factors(factors):
        torch.testing.assert_close(logits(model), routed, atol=1e-5, rtol=1e-5)


def test_layers_whose_gate_is_closed_add_nothing_and_take_no_rank():
    model = trained("taps")
    hub = model.base_model
    with torch.no_grad():
        for number, layer in enumerate(hub.layers().values()):
            layer.branches("default")[0].router.scorer.logits[0] = 0.15 if number >= 5 else 0.09
    factors = exact_factors(hub, "who")
    assert [pair.rank for pair in factors.values()] == [0] * 5 + [4] * 9
    routed = logits(model, routing_tasks="who")
    with hub.using_factors(factors):
        torch.testing.assert_close(logits(model), routed, atol=1e-5, rtol=1e-5)
    assert {pair.rank for pair in to_one_rank_class(factors).values()} == {8}


@pytest.mark.parametrize("method", ["palora", "poly", "taps", "task_moe", "mtl_lora", "moa"])
def test_a_blend_of_tasks_leaves_as_a_plain_lora_that_stock_peft_reads(method, tmp_path):
    model, blend = trained(method), {"who": 0.25, "when": 0.75}
    report = export_task(model, blend, tmp_path / "blend", base=BASE, calibration=[], held_out=batches(1))
    assert (report.task, report.how) == ("0.25 who + 0.75 when", "exact")
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "blend").eval()
    torch.testing.assert_close(logits(stock), logits(model, routing_tasks=blend), atol=1e-4, rtol=0)
