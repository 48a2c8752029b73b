"""Metrics: known values, the range, and that they are what `evaluate` users expect, without network."""

import evaluate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.support.errors import ConfigError, DataError
from loramux.tasks import METRICS, compute

ANSWERS = st.sampled_from(["yes", "no", "maybe", "artist: jack white; playlist: x", "a b c d e"])


def score(name: str, predictions: list[str], references: list[str]) -> float:
    return compute([name], predictions, references)[name]


@pytest.mark.parametrize(
    ("name", "predictions", "references", "value"),
    [
        ("accuracy", ["a", "b", "c", "d"], ["a", "b", "c", "x"], 0.75),
        ("accuracy", ["a "], ["a"], 0.0),
        ("exact_match", [" a  b", "c"], ["a b", "C"], 0.5),
        ("macro_f1", ["a", "a", "a", "a"], ["a", "a", "a", "b"], (6 / 7 + 0) / 2),
        ("matthews", ["a", "a", "b", "b"], ["a", "a", "b", "b"], 1.0),
        ("matthews", ["b", "b", "a", "a"], ["a", "a", "b", "b"], -1.0),
        ("matthews", ["a", "a", "a", "a"], ["a", "a", "b", "b"], 0.0),
        ("slot_f1", ["artist: jack  white ; playlist: y"], ["playlist: x; artist: jack white"], 0.5),
        ("slot_f1", ["a: 1; a: 1"], ["a: 1"], 2 / 3),
        ("slot_f1", ["1: a"], ["a: 1"], 0.0),
        ("slot_f1", ["nothing to parse"], ["a: 1"], 0.0),
        ("slot_f1", ["none"], ["none"], 1.0),
        ("rouge_l", ["the cat sat"], ["the cat lay"], 2 / 3),
        ("bleu", ["the cat sat on the mat"], ["the cat sat on the mat"], 1.0),
        ("bleu", ["entirely different words are written here"], ["the cat sat on the mat today"], 0.0),
    ],
)
def test_known_values(name: str, predictions: list[str], references: list[str], value: float) -> None:
    assert score(name, predictions, references) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=15, deadline=None)
@given(pairs=st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=6))
def test_range_and_best_value(name: str, pairs: list[tuple[str, str]]) -> None:
    predictions, references = map(list, zip(*pairs, strict=True))
    value = score(name, predictions, references)
    assert (-1 if name == "matthews" else 0) <= value <= 1 + 1e-9
    if name not in ("matthews", "bleu"):  # constant answers have no correlation, short ones no 4-grams
        assert score(name, references, references) == pytest.approx(1)


def test_a_constant_answer_beats_chance_in_accuracy_but_not_in_macro_f1() -> None:
    references = ["a"] * 9 + ["b"]
    scores = compute(["accuracy", "macro_f1", "matthews"], ["a"] * 10, references)
    assert scores["accuracy"] == pytest.approx(0.9)
    assert scores["macro_f1"] < 0.5
    assert scores["matthews"] == 0


def test_they_are_evaluate_modules() -> None:
    combined = evaluate.combine([METRICS["accuracy"](), METRICS["macro_f1"]()])
    assert combined.compute(predictions=["a", "b"], references=["a", "b"]) == {"accuracy": 1.0, "macro_f1": 1.0}
    metric = METRICS["exact_match"]()
    metric.add_batch(predictions=["a"], references=["a"])
    metric.add(prediction="b", reference="c")
    assert metric.compute() == {"exact_match": 0.5}
    assert "white space" in metric.description


def test_several_at_once_keep_their_order() -> None:
    assert list(compute(["rouge_l", "accuracy"], ["a"], ["a"])) == ["rouge_l", "accuracy"]


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'rougel'; did you mean 'rouge_l'"):
        compute(["rougel"], ["a"], ["a"])


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_predictions_must_match_references(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(DataError, match=f"got {len(predictions)} and {len(references)}"):
        compute(["accuracy"], predictions, references)
