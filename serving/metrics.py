"""What Prometheus reads: traffic, time and tokens per adapter, the queue, the slots, and what the router chose."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from .request import Finished

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
OTHER = "(other)"
"""The label of all adapters beyond the limit, which no adapter can be called."""
MIX = "(mix)"
"""The label of all weighted mixes of adapters."""


class Metrics:
    """The counters of one server.

    Args:
        gauges: what there is at the moment, by name, as `(help, label, values by label value)`.
        serves: whether an adapter is served; a late answer of one that is not gets no series of its own.
        labels: adapters that get series of their own.
    """

    def __init__(self, gauges: Callable[[], "Gauges"], serves: Callable[[str], bool], labels: int) -> None:
        self.registry = CollectorRegistry()
        self._serves = serves
        self._labels, self._known = labels, set[str]()
        self.requests = self._counter("requests", "Answers by adapter and how they ended", "adapter", "end")
        self.tokens = self._counter("tokens", "Tokens by adapter: prompt, cached, completion", "adapter", "kind")
        self.choices = self._counter("router_choices", "What the automatic choice picked", "adapter")
        self.swaps = self._counter("adapter_changes", "Adapters loaded, replaced, unloaded", "change", "result")
        self.http = self._counter("http_requests", "Requests by route and status", "route", "status")
        self.seconds = self._histogram("request_seconds", "From arrival to the end of an answer", "adapter")
        self.queued = self._histogram("queue_seconds", "From arrival to the first step")
        self.first = self._histogram("first_token_seconds", "From arrival to the first token")
        self.http_seconds = self._histogram("http_seconds", "Of requests by route", "route")
        self.registry.register(_Now(gauges))

    def note_http(self, route: str, status: int, seconds: float) -> None:
        self.http.labels(route, status).inc()
        self.http_seconds.labels(route).observe(seconds)

    def note_answer(self, adapter: str, end: Finished) -> None:
        """Count an answer that came to its end."""
        label = self.label(adapter)
        self.requests.labels(label, end.reason).inc()
        self.tokens.labels(label, "prompt").inc(end.prompt_tokens)
        self.tokens.labels(label, "cached").inc(end.cached_tokens)
        self.tokens.labels(label, "completion").inc(end.completion_tokens)
        self.seconds.labels(label).observe(end.queued_s + end.prefill_s + end.decode_s)
        self.queued.observe(end.queued_s)
        self.first.observe(end.queued_s + end.prefill_s)

    def note_failure(self, adapter: str, code: str) -> None:
        self.requests.labels(self.label(adapter), code).inc()

    def label(self, adapter: str) -> str:
        """An adapter's own label while there are few, and while it is served; one for all others."""
        if adapter not in self._known and (len(self._known) >= self._labels or not self._serves(adapter)):
            return OTHER
        self._known.add(adapter)
        return adapter

    def forget(self, adapter: str) -> None:
        """Drop the series of an adapter that was unloaded, so that another one can have its own."""
        if adapter not in self._known:
            return
        self._known.discard(adapter)
        for metric in (self.requests, self.tokens, self.choices, self.seconds):
            metric.remove_by_labels({"adapter": adapter})

    def traffic(self) -> dict[str, dict[str, float]]:
        """Answers, completion tokens and router choices by adapter, for people."""
        found: dict[str, dict[str, float]] = {}
        for key, metric, wanted in (
            ("answers", self.requests, {}),
            ("tokens", self.tokens, {"kind": "completion"}),
            ("choices", self.choices, {}),
        ):
            for sample in next(iter(metric.collect())).samples:
                if sample.name.endswith("_total") and wanted.items() <= sample.labels.items():
                    row = found.setdefault(sample.labels["adapter"], {})
                    row[key] = row.get(key, 0) + sample.value
        return found

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(f"loramux_{name}", help_, labels, registry=self.registry)

    def _histogram(self, name: str, help_: str, *labels: str) -> Histogram:
        return Histogram(f"loramux_{name}", help_, labels, registry=self.registry, buckets=_SECONDS)


Gauges = dict[str, tuple[str, str | None, dict[str, float]]]


class _Now:
    """Gauges that are looked up when they are read."""

    def __init__(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for name, (help_, label, values) in self._gauges().items():
            family: Any = GaugeMetricFamily(f"loramux_{name}", help_, labels=[label] if label else None)
            for value, number in values.items():
                family.add_metric([value] if label else [], number)
            yield family
