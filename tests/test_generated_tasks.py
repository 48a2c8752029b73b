"""The generated tasks: deterministic, without leakage, and in conflict exactly where they say so."""

import hashlib
import json
from itertools import combinations
from pathlib import Path

import pytest

from loramux.support.config import load_yaml
from loramux.support.errors import ConfigError
from loramux.tasks import generated
from loramux.tasks.generated import FAMILIES, FAMILY_OF, SPLITS, rows
from loramux.tasks.words import KINDS, vocabulary

DEFAULT = load_yaml(Path(generated.__file__).with_name("default.yaml"))
NAMES = [task["name"] for task in DEFAULT]
CONFLICTS = [{"who", "where", "tomorrow"}, {"sort", "largest"}]


def inputs(task: str, split: str) -> list[str]:
    return [row["input"] for row in rows(task, split)]


def test_rows_are_the_same_everywhere() -> None:
    text = json.dumps([rows(task, split) for task in FAMILY_OF for split in SPLITS])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "321a5080c56b0587"
    generated.drawn.cache_clear()
    assert text == json.dumps([rows(task, split) for task in FAMILY_OF for split in SPLITS])


@pytest.mark.parametrize("task", FAMILY_OF)
def test_no_input_occurs_twice_in_or_across_splits(task: str) -> None:
    everything = [text for split in SPLITS for text in inputs(task, split)]
    assert len(everything) == len(set(everything)) == sum(SPLITS.values())


@pytest.mark.parametrize("task", ["who", "plural", "opposite", "kind"])
def test_evaluated_rows_use_words_no_training_row_contains(task: str) -> None:
    train = {word.strip(".,") for text in inputs(task, "train") for word in text.split()}
    for split in ("validation", "test"):
        assert all({word.strip(".,") for word in text.split()} - train for text in inputs(task, split))


def test_held_out_words_are_the_rest_of_the_vocabulary() -> None:
    seen, held_out, whole = vocabulary(False), vocabulary(True), vocabulary()
    assert set(seen.names) | set(held_out.names) == set(whole.names)
    assert not set(seen.nouns) & set(held_out.nouns)
    assert all(len(held_out.kinds[kind]) >= 3 for kind in KINDS)


@pytest.mark.parametrize("split", SPLITS)
def test_tasks_in_conflict_share_their_inputs_and_disagree(split: str) -> None:
    for group in CONFLICTS:
        for first, second in combinations(sorted(group), 2):
            assert inputs(first, split) == inputs(second, split)
            pairs = zip(rows(first, split), rows(second, split), strict=True)
            assert all(a["target"] != b["target"] for a, b in pairs)


def test_other_tasks_have_inputs_of_their_own() -> None:
    for first, second in combinations(NAMES, 2):
        if not any({first, second} <= group for group in CONFLICTS):
            assert not set(inputs(first, "train")) & set(inputs(second, "train"))


def test_answers_are_right_where_python_can_check_them() -> None:
    for row in rows("sort", "test"):
        assert row["target"].split() == sorted(row["input"].split(), key=int)
    for row in rows("largest", "test"):
        assert row["target"] == max(row["input"].split(), key=int)
    for row in rows("opposite", "test"):
        assert row["target"] != row["input"]
        assert row["target"].split()[:-1] == row["input"].split()[:-1]
    for row in rows("where", "test"):
        assert row["input"].endswith(f" {row['target']}.")
    for row in rows("who", "test"):
        assert row["input"].split()[0] == row["target"]


def test_kind_offers_every_kind_about_equally() -> None:
    targets = [row["target"] for row in rows("kind", "train")]
    assert {tuple(row["choices"]) for row in rows("kind", "test")} == {tuple(KINDS)}
    assert all(120 < targets.count(kind) < 200 for kind in KINDS)


def test_every_family_and_default_task_is_generated() -> None:
    assert set(FAMILY_OF.values()) == set(FAMILIES)
    assert {task["source"]["generated"] for task in DEFAULT} == set(NAMES) <= set(FAMILY_OF)
    assert set().union(*CONFLICTS) < set(NAMES)


def test_unknown_task_and_split_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'where'"):
        rows("were", "train")
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        rows("who", "trian")
