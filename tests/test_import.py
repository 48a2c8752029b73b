"""Import: a LoRA that others trained with stock PEFT becomes an expert and stays what it was; what is more than a plain
LoRA, or is damaged or hostile, is refused before anything changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import TASKS, a_batch, adapted, logits, tiny_llama
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from loramux.adapters import LoramuxConfig, LowRank, StageConfig, import_experts, read_lora
from loramux.support.errors import AdapterError

# Every way in which LoRAs of one base may differ. PEFT takes patterns as expressions, and the first that matches.
KINDS: dict[str, dict] = {
    "narrow": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 8, "lora_alpha": 3, "target_modules": "all-linear"},
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj", "up_proj"]},
    "by pattern": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"q_proj": 6, r"layers\.1\.self_attn\.k_proj": 1},
        "alpha_pattern": {r"layers\.[0-9]\.mlp\.down_proj": 1},
    },
    "rank-stabilised by pattern": {
        "r": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "gate_proj"],
        "rank_pattern": {"gate_proj": 5},
        "alpha_pattern": {"q_proj": 2},
    },
    "one layer": {"r": 2, "target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "by expression": {"r": 2, "target_modules": r".*\.mlp\..*_proj", "exclude_modules": ["up_proj"]},
    "output layer": {"r": 2, "target_modules": ["lm_head", "q_proj"]},  # PEFT saves the base's own weights along
}
MIXED = dict(zip(TASKS, ("narrow", "by pattern", "rank-stabilised"), strict=True))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Adapters = dict[str, tuple[Path, torch.Tensor]]


def stock_lora(folder: Path, *, seed: int = 0, **options) -> torch.Tensor:
    """Write an adapter as stock PEFT does, random in A and B; returns what the base says with it."""
    torch.manual_seed(seed)
    settings = {"task_type": "CAUSAL_LM", "init_lora_weights": False, **options}
    model = get_peft_model(tiny_llama(), LoraConfig(**settings)).eval()
    model.save_pretrained(folder)
    return logits(model)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """For each task a folder with a LoRA of a shape of its own, and the logits stock PEFT gives with it."""
    root = tmp_path_factory.mktemp("stock")
    kinds = enumerate(MIXED.items())
    return {task: (root / task, stock_lora(root / task, seed=i, **KINDS[kind])) for i, (task, kind) in kinds}


def folders(stock: Adapters) -> dict[str, Path]:
    return {task: folder for task, (folder, _) in stock.items()}


def with_own_expert(model: PeftModel, task: str) -> torch.Tensor:
    """The logits when rows go to the expert of their task, whatever a router says, as where experts are trained."""
    model.base_model.set_stage(StageConfig(route="task"))
    return logits(model, routing_tasks=task)


# ---------------------------------------------------------------------- what comes in is what it was


@pytest.mark.parametrize("method", ["moa", "router_retriever", "scalearn", "palora", "taps"])
def test_a_named_task_is_its_adapter_as_stock_peft_runs_it(method, stock):
    model = adapted(method, {"rank": 6}).eval()
    import_experts(model, folders(stock))
    for task, (_, expected) in stock.items():
        torch.testing.assert_close(logits(model, routing_tasks=task), expected, atol=1e-5, rtol=0)


def test_where_tokens_choose_the_experts_are_the_adapters(stock):
    model = adapted("arrow", {"rank": 6}).eval()
    import_experts(model, folders(stock))
    for task, (_, expected) in stock.items():
        torch.testing.assert_close(with_own_expert(model, task), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_plain_lora_comes_in_exactly_and_alone(kind, tmp_path):
    expected = stock_lora(tmp_path, **KINDS[kind])
    targets = ["lm_head", "q_proj"] if kind == "output layer" else "all-linear"
    model = adapted("moa", {"rank": 9, "alpha": 4.0}, target_modules=targets).eval()
    lora = import_experts(model, {"where": tmp_path})["where"]
    torch.testing.assert_close(logits(model, routing_tasks="where"), expected, atol=1e-5, rtol=0)
    assert torch.equal(logits(model, routing_tasks="who"), logits(tiny_llama()))
    assert lora.rank == max([KINDS[kind]["r"], *KINDS[kind].get("rank_pattern", {}).values()])


def test_half_precision_weights_come_in_as_peft_takes_them(tmp_path):
    stock_lora(tmp_path, **KINDS["wide"])
    rewrite(tmp_path, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    model = adapted("moa", {"rank": 8}).eval()
    import_experts(model, {"who": tmp_path})
    expected = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval())
    torch.testing.assert_close(logits(model, routing_tasks="who"), expected, atol=1e-5, rtol=0)


def test_the_transposed_linears_of_gpt2_are_linears_too(tmp_path):
    def base() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()

    targets = ["c_attn", "c_proj"]
    lora = LoraConfig(r=3, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM")
    stock = get_peft_model(base(), lora).eval()
    stock.save_pretrained(tmp_path)
    settings = {"options": {"rank": 3}, "target_modules": targets, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(), LoramuxConfig(method="moa", tasks=["one", "two"], **settings)).eval()
    import_experts(model, {"two": tmp_path})
    torch.testing.assert_close(logits(model, routing_tasks="two"), logits(stock), atol=1e-5, rtol=0)


def test_ranks_and_layers_that_a_narrow_lora_leaves_free_can_be_trained(stock):
    model = adapted("moa", {"rank": 6})
    import_experts(model, folders(stock))
    model(**a_batch(), routing_tasks=["who"] * 4).loss.backward()
    layers = model.base_model.layers()
    narrow = layers["model.layers.0.self_attn.q_proj"].branches("default")[0].bank.up.grad
    absent = layers["model.layers.0.mlp.up_proj"].branches("default")[0].bank.up.grad
    assert narrow[0].abs().sum(-1).gt(0).all()
    assert absent[0].abs().sum(-1).gt(0).all()
    assert not absent[1:].any()


def test_prototypes_read_off_experts_follow_them_and_point_no_token_to_an_expert_without_update(stock):
    model = adapted("arrow", {"rank": 6, "top_k": 1}).eval()
    import_experts(model, folders(stock))
    for name, layer in model.base_model.layers().items():
        branch = layer.branches("default")[0]
        for expert, (folder, _) in enumerate(stock.values()):
            direction = branch.router.scorer.directions[expert]
            factors = read_lora(folder, tiny_llama()).factors.get(name)
            if factors is None:
                assert not direction.any()
            else:
                top = torch.linalg.svd(factors.delta())[2][0]
                torch.testing.assert_close((direction @ top).abs(), torch.tensor(1.0), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- what is more than a plain LoRA


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora = True: DoRA also rescales"),
        ({"bias": "all"}, "bias = 'all': it changed biases"),
        ({"lora_bias": True}, "lora_bias = True: it has a bias beside B"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]: it holds whole modules"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = .*: it is for a base with layers repeated"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices = .*: it changed token embeddings"),
        ({"init_lora_weights": "pissa"}, "started by 'pissa', which changes the base's own weights"),
        ({"target_modules": ["embed_tokens"]}, "adapts 'model.embed_tokens', which is a Embedding; experts act"),
    ],
)  # fmt: skip
def test_what_is_more_than_a_plain_lora_is_refused_with_the_reason(options, reason, tmp_path):
    stock_lora(tmp_path, **{"r": 2, "target_modules": ["q_proj"], **options})
    refused(tmp_path, reason)


def test_other_kinds_of_adapters_are_refused(tmp_path):
    get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    refused(tmp_path / "ia3", "of PEFT type IA3; only LORA can be imported")
    adapted("moa").save_pretrained(tmp_path / "mixture")
    refused(
        tmp_path / "mixture", "of PEFT type LORAMUX; only LORA can be imported; name it in train.start_from as it is"
    )


def test_a_key_that_this_version_does_not_know_is_refused_where_it_says_something(tmp_path):
    expected = stock_lora(tmp_path, **KINDS["narrow"])
    configure(tmp_path, invented_later=None, another=False)
    model = adapted("moa").eval()
    import_experts(model, {"who": tmp_path})
    torch.testing.assert_close(logits(model, routing_tasks="who"), expected, atol=1e-5, rtol=0)
    configure(tmp_path, invented_later=7)
    refused(tmp_path, "invented_later = 7: which makes it more than a plain LoRA, or is not known to this version")


# ---------------------------------------------------------------------- another base


def test_a_lora_that_names_another_base_is_refused(tmp_path):
    stock_lora(tmp_path, **KINDS["narrow"])
    configure(tmp_path, base_model_name_or_path="someone/other")
    with pytest.raises(
        AdapterError, match="an adapter of another base: it names 'someone/other', this one is 'my/base'"
    ):
        read_lora(tmp_path, tiny_llama(), base_names=["my/base"])
    assert read_lora(tmp_path, tiny_llama(), base_names=["my/base", "someone/other"]).base == "someone/other"
    model = adapted("moa")
    model.peft_config["default"].base_model_name_or_path = "my/base"
    with pytest.raises(AdapterError, match="this one is 'my/base'"):
        import_experts(model, {"who": tmp_path})
    import_experts(model, {"who": tmp_path}, base_names=["someone/other"])


def test_one_folder_has_one_name_however_it_is_written(tmp_path, monkeypatch):
    stock_lora(tmp_path / "lora", **KINDS["narrow"])
    (tmp_path / "base").mkdir()
    configure(tmp_path / "lora", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    read_lora(tmp_path / "lora", tiny_llama(), base_names=[str(tmp_path / "lora" / ".." / "base")])


def test_a_lora_of_other_layers_or_sizes_is_refused(tmp_path):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    get_peft_model(gpt2, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path / "gpt2")
    refused(
        tmp_path / "gpt2", r"PEFT cannot put it on this base \(LlamaForCausalLM\): Target modules .*c_attn.* not found"
    )
    stock_lora(tmp_path / "own", r=2, target_modules=["q_proj"])
    narrower = tiny_llama().config
    narrower.hidden_size = 16
    with pytest.raises(
        AdapterError, match=r"lora_A.weight' has shape \(2, 32\); its config and this base want \(2, 16\)"
    ):
        read_lora(tmp_path / "own", type(tiny_llama())(narrower))


# ---------------------------------------------------------------------- damaged or hostile


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 10**9}, "r: Input should be less than or equal to 65536"),
        ({"r": 65536}, r"has shape \(2, 32\); its config and this base want \(65536, 32\)"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"r": "two"}, "r: Input should be a valid integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha: Input should be a finite number"),
        ({"lora_alpha": 1e300}, "the update of 'model.layers.0.self_attn.q_proj' has values that are not finite"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern.q_proj: Input should be less than or equal to 65536"),
        ({"rank_pattern": {"[": 2}}, "PEFT cannot put it on this base"),
        ({"rank_pattern": {"(a+)+b": 2}}, r"the pattern '\(a\+\)\+b' repeats a group"),
        ({"alpha_pattern": {".*.*.*.*q": 2}}, r"the pattern '\.\*\.\*\.\*\.\*q' repeats .* more than 3 times"),
        ({"target_modules": "(x*)*"}, r"the pattern '\(x\*\)\*' repeats a group"),
        ({"target_modules": ".?" * 20 + "@"}, r"repeats a group, or repeats more than 3 times"),
        ({"rank_pattern": {f"layers.{n}.q": 2 for n in range(3000)}}, "3000 patterns of module names; at most 2048"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["q_proj", "nowhere"]}, "v_proj.lora_A.weight', which is no part of a plain LoRA"),
        ({"target_modules": "["}, "PEFT cannot put it on this base"),
        ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path must be a name, got \['a'\]"),
        ({"peft_type": None}, "of PEFT type None"),
        ({"x" * 500: 1}, "it has x{160}... = 1: which makes it more than a plain LoRA"),
    ],
)  # fmt: skip
def test_a_config_that_lies_is_refused(change, reason, tmp_path):
    stock_lora(tmp_path, **KINDS["narrow"])
    configure(tmp_path, **change)
    refused(tmp_path, reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"r": 1' + "0" * 5000 + "}", "not readable as JSON"),
        (" " * (1 << 20) + "{}", "no adapter's config is larger than 1 MiB"),
    ],
)
def test_a_config_that_is_none_is_refused(text, reason, tmp_path):
    stock_lora(tmp_path, **KINDS["narrow"])
    (tmp_path / CONFIG).write_text(text)
    refused(tmp_path, reason)
    (tmp_path / CONFIG).unlink()
    refused(tmp_path, r"no PEFT adapter \(no adapter_config.json in it\)")
    (tmp_path / CONFIG).symlink_to("/dev/zero")
    refused(tmp_path, r"no PEFT adapter \(no adapter_config.json in it\)")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {n: x for n, x in t.items() if n != FIRST}, f"tensor '{FIRST}' is missing"),
        (lambda t: {**t, "../../../etc/passwd": torch.zeros(1)}, "holds a tensor '../../../etc/passwd', which is no"),
        (lambda t: {**t, FIRST.replace(".layers.0", ".layers.7"): t[FIRST] * 1}, "layers.7.*, which is no part"),
        (lambda t: {**t, FIRST.replace("lora_A", "lora_magnitude_vector"): t[FIRST] * 1}, "lora_magnitude_vector"),
        (lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(64, 32)}, "lm_head.weight', which is no part"),
        (lambda t: {**t, FIRST: torch.zeros(2, 33)}, r"has shape \(2, 33\); its config and this base want \(2, 32\)"),
        (lambda t: {**t, FIRST: torch.zeros(4096, 32)}, r"has shape \(4096, 32\); its config and this base want"),
        (lambda t: {**t, FIRST: t[FIRST].reshape(-1)}, r"has shape \(64,\)"),
        (lambda t: {**t, FIRST: t[FIRST].int()}, "holds torch.int32, not floating point numbers"),
        (lambda t: {**t, FIRST: t[FIRST] * float("nan")}, "the update of 'model.layers.0.self_attn.q_proj' has values"),
        (lambda t: {**t, FIRST: t[FIRST].double() * 1e300}, "has values that are not finite"),
    ],
)  # fmt: skip
def test_weights_that_are_not_those_of_the_config_are_refused(change, reason, tmp_path):
    stock_lora(tmp_path, **KINDS["narrow"])
    rewrite(tmp_path, change)
    refused(tmp_path, reason)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: data + b"more",
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
        lambda data: b"not safetensors at all",
    ],
)
def test_a_file_that_is_cut_or_no_safetensors_is_refused(damage: Callable[[bytes], bytes], tmp_path):
    stock_lora(tmp_path, **KINDS["narrow"])
    (tmp_path / WEIGHTS).write_bytes(damage((tmp_path / WEIGHTS).read_bytes()))
    refused(tmp_path, "adapter_model.safetensors: not a whole safetensors file")


class Bomb:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was read",))


def test_pickles_are_never_read(tmp_path):
    stock_lora(tmp_path, **KINDS["narrow"])
    (tmp_path / WEIGHTS).unlink()
    refused(tmp_path, "no adapter_model.safetensors in it")
    torch.save(Bomb(), tmp_path / "adapter_model.bin")
    refused(tmp_path, r"its weights are pickled \(adapter_model.bin\), and reading a pickle can run any code")


# ---------------------------------------------------------------------- what does not fit the hub


def test_what_does_not_fit_the_hub_is_refused_and_changes_nothing(stock):
    paths = folders(stock)
    model = adapted("moa", {"rank": 6}, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for experts, reason in (
        ({**paths, "whom": paths["who"]}, r"no task 'whom' in this hub to import an expert for; did you mean 'who'\?"),
        (paths, "the LoRA for 'where' adapts 'model.layers.0.mlp.down_proj', which this hub does not; add it to"),
        ({"who": paths["who"], "when": paths["who"].parent / "none"}, "none: no PEFT adapter"),
    ):
        with pytest.raises(AdapterError, match=reason):
            import_experts(model, experts)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with pytest.raises(AdapterError, match=r"has rank 6 at 'model.layers.0.self_attn.q_proj', the hub's experts 5"):
        import_experts(adapted("moa", {"rank": 5}), {"where": paths["where"]})


def test_a_lora_that_was_read_once_can_be_used_again_on_its_own_base(stock):
    lora = read_lora(stock["who"][0], tiny_llama())
    model = adapted("moa", {"rank": 2}).eval()
    import_experts(model, {"who": lora, "when": lora})
    torch.testing.assert_close(logits(model, routing_tasks="when"), stock["who"][1], atol=1e-5, rtol=0)
    other = {name: LowRank(pair.down[:, 1:], pair.up) for name, pair in lora.factors.items()}
    with pytest.raises(AdapterError, match=r"the LoRA for 'who' was read for another base: .* has other sizes there"):
        import_experts(model, {"who": replace(lora, factors=other)})


@pytest.mark.parametrize("method", ["lora", "molora", "hydralora", "smora", "multilora"])
def test_a_method_whose_experts_belong_to_no_task_names_those_that_have_such(method, stock):
    with pytest.raises(AdapterError, match=r"no single plain LoRA per task .*: alter, arrow, .*moa, .*scalearn"):
        import_experts(adapted(method), folders(stock))


# ---------------------------------------------------------------------- helpers


def configure(folder: Path, **changes: object) -> None:
    """Change keys of an adapter's config."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of an adapter."""
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(folder / WEIGHTS)).items()}
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path, reason: str) -> None:
    """Assert that this adapter is not read."""
    with pytest.raises(AdapterError, match=reason):
        read_lora(folder, tiny_llama())
