"""The metrics of several processes exposed as those of one; a label tells the processes apart."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample

FAMILIES = "application/vnd.guard.families+json"
"""Media type of the metrics that a process hands to its parent: the JSON that `encoded` writes and `_decoded` reads.

This format is lossless, and quicker to read than text.
"""
LABEL = "process"
"""The label that tells processes apart."""


class MergedRegistry:
    """The metrics of several processes, with a label `process`; the processes are asked again at each scrape.

    Nothing is added up. PromQL computes sums, and the counters of a restarted process begin at 0, which Prometheus
    expects of a series but not of a sum. The multiprocess mode of prometheus_client adds up files instead, and supports
    neither `Info` nor exemplars nor functions as gauges.

    `guard_processes` is the number of processes that gave a readable answer; the series of the others are absent.

    Args:
        ask: Asks the processes and returns the `encoded` metrics of those that answer, by the value of the label.
        own: The metrics of the asking process, which are exposed without the label.
    """

    def __init__(self, ask: Callable[[], Mapping[str, bytes]], own: CollectorRegistry) -> None:
        self._ask, self._own = ask, own

    def collect(self) -> Iterator[Metric]:
        """Each metric family once, with the samples of all processes."""
        merged: dict[str, Metric] = {}
        answered = 0
        for process, text in self._ask().items():
            try:
                families = _decoded(text)
            except ValueError:  # the answer was cut off
                continue
            answered += 1
            for family in families:
                into = merged.setdefault(family.name, _like(family, ()))
                into.samples += [sample._replace(labels={**sample.labels, LABEL: process}) for sample in family.samples]
        yield from merged.values()
        yield GaugeMetricFamily("guard_processes", "Processes that answered this scrape.", answered)
        yield from self._own.collect()

    def restricted_registry(self, names: Iterable[str]) -> Collector:
        """Only the samples of these names, for a scrape with `name[]`."""
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
    """Metrics in the format `FAMILIES`."""
    return json.dumps(
        [
            (family.name, family.documentation, family.type, family.unit, [sample[:5] for sample in family.samples])
            for family in registry.collect()
        ]
    ).encode()


def _decoded(text: bytes) -> list[Metric]:
    """Read metric families: name, documentation, type, unit; samples of name, labels, value, timestamp, exemplar."""
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
    """A metric family with the same name and type, and with these samples."""
    like = Metric(family.name, family.documentation, family.type, family.unit)
    like.samples = list(samples)
    return like
