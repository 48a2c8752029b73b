"""Cards of published repositories: what they say, and that hand-written words in them stay."""

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from loramux.hub.card import write_card
from loramux.hub.source import Answered, Source, read_source
from loramux.support.errors import AdapterError, ConfigError, RunError


@pytest.fixture(scope="module")
def source(finished_job: Path) -> Source:
    return read_source(finished_job, examples=2)


@pytest.fixture(scope="module")
def card(source: Source) -> str:
    return write_card(source, "mia/three", licence="apache-2.0")


def test_the_metadata_is_what_the_hub_wants(card: str, source: Source) -> None:
    data = ModelCard(card).data  # not ignoring errors: a wrong model-index raises
    assert (data.base_model, data.library_name, data.license) == ("somebody/tiny-base", "peft", "apache-2.0")
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert {"lora", "loramux", "loramux:moa"} <= set(data.tags)
    assert data.metrics == ["exact_match"]
    exported = {r.task_name: r.metric_value for r in data.eval_results if r.metric_name == "exact_match (exported)"}
    assert exported == {a.task: pytest.approx(a.scores["exported"], abs=1e-5) for a in source.adapters}


def test_it_tells_what_a_reader_must_know(card: str, source: Source) -> None:
    for text in (
        "# three\n",
        "LoRA adapters for 3 tasks: `colour`, `sound`, `home`.",
        "Feng et al. 2024",
        "Licence: apache-2.0.",
        "matched LoRA",
        "What the exports lost",
        "![Routing](routing.png)",
        "known_as: null",  # the recipe, without this machine's path
        "torch 2.",
    ):
        assert text in card, text
    example = source.adapters[0].examples[0]
    assert re.search(rf"^\| `{example.prompt}` \| .* \| `{example.wanted}` \|$", card, re.MULTILINE)
    assert str(source.place.parent) not in card


def test_the_code_it_shows_is_python_and_names_the_repository(card: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert 'PeftModel.from_pretrained(base, "mia/three", subfolder="colour")' in blocks[0]
    assert "import loramux.adapters" in blocks[1]
    assert 'model.generate(**prompt, routing_tasks="colour")' in blocks[1]
    for block in blocks:
        ast.parse(block)
    assert 'hf download mia/three --include "colour/*" --local-dir adapter' in card


def test_a_card_for_one_task_loads_from_the_root(source: Source) -> None:
    card = write_card(source.only("sound"), "mia/sound")
    assert 'PeftModel.from_pretrained(base, "mia/sound")' in card
    assert "A LoRA adapter for the task `sound`" in card
    assert "none was given; ask the owner" in card
    assert "![" not in card  # pictures of the run are not beside it
    assert "license" not in ModelCard(card).data.to_dict()


def test_publishing_again_changes_nothing(card: str, source: Source) -> None:
    assert write_card(source, "mia/three", licence="apache-2.0", existing=card) == card


def test_words_around_the_parts_stay_and_the_parts_are_renewed(card: str, source: Source) -> None:
    by_hand = card.replace("# three\n", "# Three little tasks\n\nMade for the autumn course.\n")
    by_hand = by_hand.replace("<!-- /loramux:use -->", "<!-- /loramux:use -->\n\nAsk Mia if it does not load.")
    by_hand = by_hand.replace("license: apache-2.0", "license: mit\nlanguage: en").replace(
        "- lora\n", "- lora\n- nice\n"
    )
    by_hand = by_hand.replace("LoRA adapters for 3 tasks", "LoRA adapters for 2 tasks")
    again = write_card(source, "mia/three", existing=by_hand)
    for text in ("# Three little tasks\n\nMade for", "<!-- /loramux:use -->\n\nAsk Mia", "LoRA adapters for 3 tasks"):
        assert again.count(text) == 1
    data = ModelCard(again).data
    assert (data.license, data.language, "nice" in data.tags) == ("mit", "en", True)


def test_metrics_data_and_results_that_people_added_stay(card: str, source: Source) -> None:
    data = ModelCard(card).data.to_dict()
    own = {
        "task": {"type": "text-generation"},
        "dataset": {"name": "Theirs", "type": "theirs/data"},
        "metrics": [{"type": "bleu", "value": 0.5, "name": "BLEU"}],
    }
    data["model-index"][0]["results"].append(own)
    data |= {"metrics": [*data["metrics"], "bleu"], "datasets": ["theirs/data"]}
    by_hand = card.replace(card.split("---\n")[1], yaml.safe_dump(data))
    again = write_card(source, "mia/three", existing=by_hand)
    found = ModelCard(again).data
    assert (found.metrics, found.datasets) == (["exact_match", "bleu"], ["theirs/data"])
    scores = {result.metric_name: result.metric_value for result in found.eval_results}
    assert (scores["BLEU"], "exact_match (exported)" in scores) == (0.5, True)
    assert write_card(source, "mia/three", existing=again) == again
    unscored = replace(source, adapters=tuple(replace(adapter, scores={}) for adapter in source.adapters))
    left = ModelCard(write_card(unscored, "mia/three", existing=again)).data.eval_results
    assert [result.metric_name for result in left] == ["BLEU"]


def test_a_card_with_the_line_ends_of_windows_is_the_same_card(card: str, source: Source) -> None:
    assert write_card(source, "mia/three", existing=card.replace("\n", "\r\n")) == card


def test_parts_that_are_gone_go_and_a_card_without_parts_gets_them_below(card: str, source: Source) -> None:
    assert "## Routing" not in write_card(replace(source, files={}), "mia/three", existing=card)
    again = write_card(source, "mia/three", existing="Only my words.\n")
    assert again.index("Only my words.") < again.index("<!-- loramux:summary -->")


def test_results_that_are_not_there_any_more_leave_the_metadata(card: str, source: Source) -> None:
    unscored = tuple(replace(adapter, scores={}) for adapter in source.adapters)
    assert not ModelCard(write_card(replace(source, adapters=unscored), "mia/three", existing=card)).data.eval_results


def test_a_strangers_text_cannot_leave_its_cell(source: Source) -> None:
    hostile = Answered("a | b\n<script> `x` <!-- /loramux:tasks -->", None, "![p](http://x)")
    adapter = replace(source.adapters[0], examples=(hostile,))
    card = write_card(replace(source, adapters=(adapter,)), "mia/one")
    assert r"| `a \| b <script> 'x' <! -- /loramux:tasks -- >` | `![p](http://x)` |" in card


def test_adapters_that_other_tools_made_are_not_called_ours(finished_job: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_job / "exports" / "home", tmp_path / "home"))
    (folder / "export.json").unlink()
    card = write_card(read_source(folder, examples=1), "mia/home")
    assert ModelCard(card).data.tags == ["lora", "base_model:adapter:somebody/tiny-base"]
    assert "loramux" not in re.sub(r"<!--.*?-->", "", card)


def test_without_examples_the_tasks_are_described_all_the_same(source: Source) -> None:
    adapter = replace(source.adapters[0], examples=(), description="Says the colour.")
    card = write_card(replace(source, adapters=(adapter,)), "mia/one")
    assert "### colour\n\nSays the colour." in card
    assert "Examples of its" not in card


def test_exports_alone_have_a_card_too(finished_job: Path) -> None:
    found = read_source(finished_job / "exports", examples=1)
    card = write_card(found, "mia/three")
    assert [adapter.task for adapter in found.adapters] == ["colour", "home", "sound"]
    assert ModelCard(card).data.eval_results
    for text in ("| input | answer |", "held-out answer tokens it is", "| matched LoRA", "moa"):
        assert text in card


def test_a_licence_that_the_hub_does_not_know_the_form_of(source: Source) -> None:
    with pytest.raises(ConfigError, match=r"licence 'Apache 2': give it as the Hub names it, such as apache-2\.0"):
        write_card(source, "mia/three", licence="Apache 2")


def test_metadata_that_cannot_be_read_is_not_overwritten(source: Source) -> None:
    with pytest.raises(ConfigError, match=r"mia/three: the metadata of the README.md that is there cannot be read"):
        write_card(source, "mia/three", existing="---\nlicense: [mit\n---\nhello\n")


def test_a_folder_with_nothing_to_publish(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to publish there: no run"):
        read_source(tmp_path, examples=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "other/base"}, "do not name one base .*home: other/base.*together, from a folder"),
        ({"revision": "abc"}, None),
        ({"base_model_name_or_path": None}, "do not name one base .*home: none"),
    ],
)
def test_adapters_must_be_of_one_public_base(
    change: dict, message: str | None, finished_job: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_job / "exports", tmp_path / "exports")
    edit(tmp_path / "exports" / "home", change)
    if message is None:
        assert read_source(tmp_path / "exports", examples=1).base.revision == "abc"
        edit(tmp_path / "exports" / "sound", {"revision": "def"})
        message = "home: somebody/tiny-base@abc; .*sound: somebody/tiny-base@def"
    with pytest.raises(AdapterError, match=message):
        read_source(tmp_path / "exports", examples=1)


def test_a_base_that_nobody_else_can_find_is_refused(finished_job: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_job / "exports" / "home", tmp_path / "home")
    edit(tmp_path / "home", {"base_model_name_or_path": "/home/mia/base"})
    with pytest.raises(ConfigError, match=r"name '/home/mia/base' as their base, which nobody else can find.*known_as"):
        read_source(tmp_path / "home", examples=1)
    (tmp_path / "home" / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not readable as JSON"):
        read_source(tmp_path / "home", examples=1)


def test_what_cannot_be_read_is_named(finished_job: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_job / "exports" / "home", tmp_path / "home"))
    (folder / "export.json").write_text("{")
    with pytest.raises(RunError, match=r"export.json: not readable as JSON"):
        read_source(folder, examples=1)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(RunError, match=r"no adapter_model.safetensors in it; other formats, pickles above all"):
        read_source(folder, examples=1)


def edit(folder: Path, change: dict) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
