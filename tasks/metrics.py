"""Metrics as `evaluate.Metric` classes that come with the package and need no network.

Every metric compares predicted with reference texts and is better when higher: 0..1, or -1..1 for `matthews`.
A new metric is a class below with a `name`; it needs no other entry.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import datasets
import evaluate

from ..support.errors import ConfigError, DataError, did_you_mean

METRICS: dict[str, type["TextMetric"]] = {}


class TextMetric(evaluate.Metric):
    """Base of the metrics here: `score` works on two equally long lists of texts."""

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        METRICS[cls.name] = cls

    def __init__(self, **options: Any) -> None:
        super().__init__(config_name=self.name, keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references: equally long lists of texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {self.name: float(self.score(predictions, references))}

    def score(self, predictions: list[str], references: list[str]) -> float:
        raise NotImplementedError


class Accuracy(TextMetric):
    """The share of predictions that equal the reference as it stands."""

    name = "accuracy"

    def score(self, predictions: list[str], references: list[str]) -> float:
        return _mean(p == r for p, r in zip(predictions, references, strict=True))


class ExactMatch(TextMetric):
    """The share of predictions that equal the reference up to the amount of white space."""

    name = "exact_match"

    def score(self, predictions: list[str], references: list[str]) -> float:
        return _mean(p.split() == r.split() for p, r in zip(predictions, references, strict=True))


class MacroF1(TextMetric):
    """F1 of every answer that occurs, averaged with equal weight."""

    name = "macro_f1"

    def score(self, predictions: list[str], references: list[str]) -> float:
        from sklearn.metrics import f1_score

        return f1_score(references, predictions, average="macro", zero_division=0)


class Matthews(TextMetric):
    """Matthews' correlation coefficient over the answers, -1..1; 0 when there is only one answer."""

    name = "matthews"

    def score(self, predictions: list[str], references: list[str]) -> float:
        from sklearn.metrics import matthews_corrcoef

        return matthews_corrcoef(references, predictions) if len({*references, *predictions}) > 1 else 0.0


class SlotF1(TextMetric):
    """Micro-averaged F1 of slot and value together, in answers such as `artist: jack white; playlist: x`.

    White space is counted once; a slot that is named twice must be found twice.
    """

    name = "slot_f1"

    def score(self, predictions: list[str], references: list[str]) -> float:
        pairs = [(_slots(p), _slots(r)) for p, r in zip(predictions, references, strict=True)]
        right = sum((p & r).total() for p, r in pairs)
        named = sum(p.total() + r.total() for p, r in pairs)
        return 2 * right / named if named else 1.0


class RougeL(TextMetric):
    """ROUGE-L F-measure (Lin, 2004), averaged over examples. It splits on everything but a-z and 0-9."""

    name = "rouge_l"

    def score(self, predictions: list[str], references: list[str]) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        pairs = zip(predictions, references, strict=True)
        return _mean(scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs)


class Bleu(TextMetric):
    """Corpus BLEU-4 (Papineni et al., 2002) as sacrebleu computes it by default, over 100."""

    name = "bleu"

    def score(self, predictions: list[str], references: list[str]) -> float:
        import sacrebleu

        return sacrebleu.corpus_bleu(predictions, [references]).score / 100


def compute(metric_names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Every named metric over all predictions.

    Raises:
        ConfigError: for an unknown metric.
        DataError: for no predictions, or as many references as predictions are not given.
    """
    check_metrics(metric_names, where="metrics")
    if not predictions or len(predictions) != len(references):
        raise DataError(
            f"metrics need as many predictions as references and at least one: got {len(predictions)} and "
            f"{len(references)}"
        )
    scores: dict[str, float] = {}
    for name in metric_names:
        scores |= METRICS[name]().compute(predictions=list(predictions), references=list(references)) or {}
    return scores


def check_metrics(names: Iterable[str], *, where: str) -> None:
    """Raise `ConfigError` for the first unknown metric."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"{where}: unknown metric {name!r}; {did_you_mean(name, METRICS)}")


def _slots(answer: str) -> Counter[tuple[str, str]]:
    pairs = (part.partition(":") for part in answer.split(";") if ":" in part)
    return Counter((_squeezed(slot), _squeezed(value)) for slot, _, value in pairs)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
