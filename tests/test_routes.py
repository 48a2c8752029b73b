"""What `loramux routes` shows: the right figures, nothing missing without a word, and a page that no text can break."""

import base64
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, a_batch, adapted, task_of_rows
from tiny_tokenizers import merging
from training_cases import ANSWERS, make_recipe, write_base, write_tasks

from loramux.routing import Granularity, RoutingStatistics
from loramux.support.errors import ConfigError
from loramux.training.assess import encode_tasks
from loramux.training.evaluate import questions
from loramux.training.routes import RouteReport, report_routes, task_distances, untracked
from loramux.training.run import TrainedRun, train_run
from loramux.training.token_page import TracedText, token_texts, write_page
from loramux.training.usage import expert_names, routing_usage

SMORA = ["method.name=smora", "method.options={rank: 6, top_k: 2}", "train.log_gradients=4"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("routes")
    return write_base(root / "base"), write_tasks(root / "tasks")


def run_of(places: tuple[Path, Path], folder: Path, *settings: str) -> TrainedRun:
    return train_run(make_recipe(*places, *settings), folder, evaluate=None)


@pytest.fixture(scope="module")
def run(places, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return run_of(places, tmp_path_factory.mktemp("run") / "smora", *SMORA)


@pytest.fixture(scope="module")
def report(run: TrainedRun) -> RouteReport:
    return report_routes(run, run.folder.path / "routes", examples=2)


@pytest.fixture(scope="module")
def data(run: TrainedRun, report: RouteReport) -> dict:
    return json.loads((run.folder.path / "routes" / "routes.json").read_text(), parse_constant=pytest.fail)


class Page(HTMLParser):
    """The elements of a page, and what stands in its scripts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts.append(data)
            self.inside = False

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def unpacked(text: str, shown: int) -> list[list[tuple[int, float]]]:
    """Per token the experts and their shares, as the page's script reads them."""
    raw = base64.b64decode(text)
    numbers = struct.unpack(f"<{len(raw) // 2}H", raw)
    pairs = [(expert, share / 65535) for expert, share in zip(numbers[::2], numbers[1::2], strict=True)]
    return [pairs[start : start + shown] for start in range(0, len(pairs), shown)]


# ---------------------------------------------------------------------- figures


def test_the_data_are_those_of_the_examples(run: TrainedRun, data: dict) -> None:
    usage = routing_usage(run.model, run.tokenizer, encode_tasks(run))
    assert usage is not None
    assert data["layers"] == usage.to_data()["layers"]
    assert (data["tasks"], data["method"], data["split"]) == (list(ANSWERS), "smora", "test")
    assert (data["untracked"], data["experts"]) == ({}, None)
    assert data["distances"].keys() == data["layers"].keys()


def test_the_table_has_a_row_per_router_and_names_the_most_distinct_tasks(report: RouteReport, data: dict) -> None:
    assert len(report.rows) == len(data["layers"]) == 14
    for (name, effective, entropy, distinct), layer in zip(report.rows, data["layers"].items(), strict=True):
        assert name == layer[0]
        assert effective == f"{layer[1]['effective_experts']:.2f} of 6"
        assert float(entropy) == pytest.approx(layer[1]["entropy"], abs=0.006)
        largest = max(value for row in data["distances"][name] for value in row)
        one, other, distance = re.fullmatch(r"(\w+), (\w+) \(([\d.]+)\)", distinct).groups()
        assert float(distance) == pytest.approx(largest, abs=0.006)
        assert data["distances"][name][data["tasks"].index(one)][data["tasks"].index(other)] == largest


def test_many_routers_are_told_by_decoder_layer(places, tmp_path: Path) -> None:
    """madx has two at every linear."""
    languages = "{rank: 2, language_rank: 2, languages: {colour: en, sound: de, home: en}}"
    run = run_of(places, tmp_path / "run", "method.name=madx", f"method.options={languages}", "train.steps=2")
    report = report_routes(run, tmp_path / "routes")
    assert [row[0] for row in report.rows] == ["layer 0, mean of 14", "layer 1, mean of 14"]
    assert report.rows[0][1] == "2.40 of 2-3"  # 1.8 of two languages, three of three tasks
    found = json.loads((tmp_path / "routes" / "routes.json").read_text())
    by_language = found["layers"]["model.layers.0.mlp.up_proj"]["usage"]
    assert by_language == [[1, 0], [0, 1], [1, 0]]
    assert found["layers"]["model.layers.0.mlp.up_proj (branch 2)"]["usage"] == np.eye(3).tolist()
    assert "No tokens.html: madx decides once per task, not token by token." in report.remarks
    assert any(remark.startswith("No gradients.png: ") for remark in report.remarks)


def test_distances_are_0_for_the_same_use_and_1_for_none_in_common() -> None:
    usage = np.array([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0.25, 0.25, 0.5, 0]])
    distances = task_distances(usage)
    np.testing.assert_allclose(distances[:3, :3], [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=1e-7)
    assert np.isnan(distances[3]).all()
    assert 0 < distances[0, 4] < 1


def test_a_row_of_nothing_is_null_in_the_data(places, tmp_path: Path) -> None:
    """taps shuts layers altogether."""
    options = ["method.options={rank: 2, sparsity_loss: 10}", "train.task_logit_learning_rate=0.1", "train.steps=4"]
    options.append("train.batch_size=24")
    run = run_of(places, tmp_path / "run", "method.name=taps", *options)
    report = report_routes(run, tmp_path / "routes")
    found = json.loads((tmp_path / "routes" / "routes.json").read_text(), parse_constant=pytest.fail)
    assert found["distances"]["model.layers.0.mlp.up_proj"] == [[None] * 3] * 3
    assert report.rows[0][3] == "-"
    assert any(remark.startswith("No similarity.png: ") for remark in report.remarks)


def test_experts_are_called_by_tasks_only_where_each_task_has_its_own() -> None:
    tasks = ["a", "b", "c"]
    named = {method: expert_names(adapted(method, tasks=tasks).base_model) for method in ("moa", "arrow", "molora")}
    assert named == {"moa": tasks, "arrow": tasks, "molora": None}
    assert expert_names(adapted("hydralora", {"experts": 3}, tasks=tasks).base_model) is None


# ---------------------------------------------------------------------- what is missing is told


def test_layers_without_figures_are_named_with_the_reason(places, tmp_path: Path) -> None:
    """mixlora routes whole feed-forward blocks, and puts a plain LoRA on the rest."""
    options = "method.options={rank: 2, experts: 3}"
    run = run_of(places, tmp_path / "run", "method.name=mixlora", options, "train.steps=2")
    report = report_routes(run, tmp_path / "routes")
    plain = sorted(f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qkvo")
    assert [row[0] for row in report.rows] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    (told,) = [remark for remark in report.remarks if remark.startswith("Not in the table")]
    assert told.startswith("Not in the table, has no router: all is always on: ")
    assert sorted(told.removesuffix(".").rpartition(": ")[2].split(", ")) == plain
    assert untracked(adapted("smora").base_model, RoutingStatistics([])) == dict.fromkeys(
        adapted("smora").base_model.layers(), "decided nothing on these examples"
    )
    chance = untracked(adapted("mosa").base_model, RoutingStatistics([]))
    assert list(chance.values()) == ["weights its experts without looking at task or text"] * 14


@pytest.mark.parametrize("method", CASES)
def test_routers_have_the_names_that_statistics_use_and_count_every_real_token(method: str) -> None:
    hub = adapted(method).base_model.eval()
    batch = a_batch()
    tasks = {"routing_tasks": task_of_rows()} if hub.needs_task else {}
    with hub.collect_statistics() as seen, torch.no_grad():
        hub(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **tasks)
    routers = hub.named_routers()
    looking = {name: router.gates for name, router in routers.items() if router.granularity > Granularity.FIXED}
    assert {name: layer.weights.shape[-1] for name, layer in seen.layers.items()} == looking
    for name, layer in seen.layers.items():
        assert layer.tokens.sum() == (4 if name in ("prompt", "model") else 38)  # rows, or forty less two of padding


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("lora", "method 'lora' has no router: all is always on, so there are no routes to show"),
        ("mosa", "method 'mosa' chooses among its experts by chance alone, so there are no routes to show"),
    ],
)
def test_a_method_that_never_chooses_is_refused_in_words(places, tmp_path: Path, method: str, message: str) -> None:
    options = "method.options={rank: 4, modules: 2}" if method == "mosa" else "method.options={rank: 4}"
    run = run_of(places, tmp_path / "run", f"method.name={method}", options, "train.steps=1")
    with pytest.raises(ConfigError, match=message):
        report_routes(run, tmp_path / "routes")
    assert not (tmp_path / "routes").exists()


def test_an_unknown_task_is_refused(run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this run has no task 'hoem'; did you mean 'home'"):
        report_routes(run, tmp_path, only=["hoem"])


def test_every_picture_is_there(run: TrainedRun, report: RouteReport) -> None:
    folder = run.folder.path / "routes"
    names = {str(file.relative_to(folder)) for file in report.written}
    pictures = {"routing.png", "routing/layer-0.png", "routing/layer-1.png", "over_time.png", "similarity.png"}
    assert names == {*pictures, "gradients.png", "tokens.html", "routes.json"}
    for name in {*pictures, "gradients.png"}:
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert report.remarks == []


# ---------------------------------------------------------------------- the page


def test_the_page_shows_each_token_with_the_weights_it_got(run: TrainedRun, report: RouteReport) -> None:
    shown = Page(run.folder.path / "routes" / "tokens.html").data
    assert [text["task"] for text in shown["texts"]] == [task for task in ANSWERS for _ in range(2)]
    assert set(shown["gates"].values()) == {6}
    task = encode_tasks(run)[1]
    question, text = questions(task, "test", 2)[1], shown["texts"][3]
    ids = list(question.encoded.input_ids)
    assert text["prompt"] == question.encoded.prompt_length
    assert "".join(text["tokens"]).split() == run.tokenizer.decode(ids).split()
    with run.model.base_model.collect_statistics() as seen, torch.no_grad():
        run.model(input_ids=torch.tensor([ids]))
    for name, layer in seen.layers.items():
        routes = unpacked(text["routes"][name], shown["shown"][name])
        assert len(routes) == len(ids) == len(text["tokens"])
        summed = np.zeros(6)
        for token in routes:
            assert sum(share for _, share in token) == pytest.approx(1, abs=1e-3)  # two experts are open
            for expert, share in token:
                summed[expert] += 2 * share  # the weights of two open experts sum to two
        np.testing.assert_allclose(summed, layer.weights.sum(0).numpy(), atol=0.01)


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "]]>",
    "&lt;b&gt;",
    "'\"`${x}",
    "\u2028\u202e\x00",
    "\ud800",
]


def test_no_text_can_become_markup(tmp_path: Path) -> None:
    routes = {"layer": (torch.zeros(len(HOSTILE), 1, dtype=torch.long), torch.ones(len(HOSTILE), 1))}
    texts = [TracedText("</script><b>", HOSTILE, 1, routes)]
    write_page(tmp_path / "tokens.html", texts, {"layer": 2}, ["</title><i>", "$data"], title="</title><script>x")
    page = Page(tmp_path / "tokens.html")
    assert page.data["texts"][0]["tokens"] == HOSTILE
    assert page.data["texts"][0]["task"] == "</script><b>"
    assert page.data["experts"] == ["</title><i>", "$data"]
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["application/json", None]
    assert not {"b", "i", "img"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_page_needs_nothing_else_and_lets_no_other_script_run(run: TrainedRun, report: RouteReport) -> None:
    file = run.folder.path / "routes" / "tokens.html"
    page, text = Page(file), file.read_text()
    assert not [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert not re.search(r"https?:|//[a-z]|@import|url\(|innerHTML|eval\(", text)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert len(re.findall("'sha256-", policy)) == 2


def test_the_page_serves_keyboards_and_both_colour_schemes(run: TrainedRun, report: RouteReport) -> None:
    text = (run.folder.path / "routes" / "tokens.html").read_text()
    for part in ("prefers-color-scheme: dark", ":focus-visible", "ArrowRight", "aria-live", "<label>Layer <select"):
        assert part in text


def test_tokens_are_told_by_what_they_add_to_the_text() -> None:
    tokenizer = merging()
    ids = tokenizer("Is it só?\nAnswer: 🙂")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    whole = [text for text in texts if text in "Is it só?\nAnswer: 🙂"]
    assert "".join(whole) == "Is it só?\nAnswer: 🙂"
    assert texts[-1] == "🙂"
    assert "\ufffd" not in "".join(texts)
