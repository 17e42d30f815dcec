"""The metrics of several processes as those of one: what each of them exposes, told apart by a label."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample

FAMILIES = "application/vnd.guard.families+json"
"""The form in which a process hands its metrics to its parent: a JSON list of what `_decoded` takes.

It loses nothing. OpenMetrics text would: prometheus_client cannot read what it writes of a histogram with buckets below
0, which has a count and no sum.
"""
LABEL = "process"
"""The label that tells processes apart."""


class MergedRegistry:
    """Everything that several processes expose, with a label `process`, asked for anew at each scrape.

    Nothing is added up: sums are PromQL's, and the counters of a process that was started again begin at 0, which
    Prometheus expects of a series and not of a sum. prometheus_client's own multiprocess mode adds up files instead,
    and knows neither `Info` nor exemplars nor functions as gauges.

    `guard_processes` says how many processes answered, with what could be read; the series of the others are absent.

    Args:
        ask: Asks the processes: `encoded` metrics of those that answer, by the value of the label.
        own: What the asking process exposes itself, without the label.
    """

    def __init__(self, ask: Callable[[], Mapping[str, bytes]], own: CollectorRegistry) -> None:
        self._ask, self._own = ask, own

    def collect(self) -> Iterator[Metric]:
        """Every family once, with the samples of all processes."""
        merged: dict[str, Metric] = {}
        answered = 0
        for process, text in self._ask().items():
            try:
                families = _decoded(text)
            except ValueError:  # it was cut off
                continue
            answered += 1
            for family in families:
                into = merged.setdefault(family.name, _like(family, ()))
                into.samples += [sample._replace(labels={**sample.labels, LABEL: process}) for sample in family.samples]
        yield from merged.values()
        yield GaugeMetricFamily("guard_processes", "Processes that answered this scrape.", answered)
        yield from self._own.collect()

    def restricted_registry(self, names: Iterable[str]) -> Collector:
        """The samples of these names alone, for a scrape with `name[]`."""
        return _Restricted(self, frozenset(names))


@dataclass(frozen=True)
class _Restricted:
    whole: MergedRegistry
    names: frozenset[str]

    def collect(self) -> Iterator[Metric]:
        for family in self.whole.collect():
            if kept := [sample for sample in family.samples if sample.name in self.names]:
                yield _like(family, kept)


def encoded(registry: Collector) -> bytes:
    """Metrics in the form `FAMILIES`."""
    return json.dumps(
        [
            (family.name, family.documentation, family.type, family.unit, [sample[:5] for sample in family.samples])
            for family in registry.collect()
        ]
    ).encode()


def _decoded(text: bytes) -> list[Metric]:
    """The families: name, documentation, type, unit, and samples of name, labels, value, timestamp and exemplar."""
    families = []
    for *about, samples in json.loads(text):
        family = Metric(*about)
        family.samples = [
            Sample(name, labels, value, timestamp, None if exemplar is None else Exemplar(*exemplar))
            for name, labels, value, timestamp, exemplar in samples
        ]
        families.append(family)
    return families


def _like(family: Metric, samples: Iterable[Sample]) -> Metric:
    """A family of the same name and kind."""
    like = Metric(family.name, family.documentation, family.type, family.unit)
    like.samples = list(samples)
    return like
