"""The metrics of several processes as those of one."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from guard.sidecar.telemetry.exposition import MergedRegistry, encoded

NAME = 'a "name" with \\, {}, # and\na line end'


def exposed(requests: int, *, seen: str = "seen") -> CollectorRegistry:
    """What a process exposes: a metric of each kind, with exemplars, a label that is hard to quote, and odd numbers."""
    registry = CollectorRegistry()
    counter = Counter("guard_requests", "Requests.", ["model"], registry=registry)
    histogram = Histogram("guard_score", "Scores.", ["model"], buckets=(-0.1, 1.0), registry=registry)
    for number in range(requests):
        counter.labels(NAME).inc(exemplar={"trace_id": f"{number:032x}"})
        histogram.labels(NAME).observe(1 / 3 - 2 * number, {"trace_id": f"{number:032x}"})
    Gauge("guard_trouble", "A function.", registry=registry).set_function(lambda: requests / 4)
    Gauge("guard_threshold", "Unknown.", registry=registry).set(float("inf"))
    Gauge(f"guard_{seen}", "Not in every process.", registry=registry).set(1)
    Info("guard_build", "Version.", registry=registry).info({"version": "1"})
    return registry


def merged(texts: Mapping[str, bytes], own: CollectorRegistry | None = None) -> MergedRegistry:
    return MergedRegistry(lambda: texts, own or CollectorRegistry())


def samples(registry: Collector) -> list[Sample]:
    families = list(registry.collect())
    assert len({family.name for family in families}) == len(families)
    return [sample for family in families for sample in family.samples]


def test_each_process_keeps_its_samples_and_exemplars_under_a_label() -> None:
    processes = {"0": exposed(3), "1": exposed(1, seen="other")}
    found = samples(merged({process: encoded(registry) for process, registry in processes.items()}))
    for process, registry in processes.items():
        expected = [
            sample._replace(labels={**sample.labels, "process": process})
            for family in registry.collect()
            for sample in family.samples
        ]
        shown = [sample for sample in found if sample.labels.get("process") == process]
        assert sorted(shown, key=str) == sorted(expected, key=str)
    assert sum(sample.exemplar is not None for sample in found) == 5
    assert {sample.name for sample in found if "process" not in sample.labels} == {"guard_processes"}


def test_both_forms_of_text_show_a_family_once_and_one_shows_exemplars() -> None:
    registry = merged({"0": encoded(exposed(1)), "1": encoded(exposed(1))})
    plain = generate_latest(registry).decode()
    assert plain.count("# TYPE guard_score histogram\n") == 1
    assert 'guard_build_info{process="1",version="1"} 1.0\n' in plain
    openmetric = openmetrics.generate_latest(registry).decode()  # type: ignore[no-untyped-call]
    assert openmetric.count(f'# {{trace_id="{0:032x}"}}') == 4


def test_a_process_whose_answer_is_cut_off_anywhere_is_left_out_as_a_whole() -> None:
    text = encoded(exposed(1))
    for end in range(len(text)):
        found = samples(merged({"0": text, "1": text[:end]}))
        assert {sample.labels.get("process", "") for sample in found} == {"", "0"}
        assert [sample.value for sample in found if sample.name == "guard_processes"] == [1]


def test_what_the_asking_process_exposes_itself_stands_beside_it() -> None:
    own = CollectorRegistry()
    Counter("guard_process_restarts", "Restarts.", ["process"], registry=own).labels("0").inc()
    text = generate_latest(merged({}, own)).decode()
    assert 'guard_process_restarts_total{process="0"} 1.0\n' in text
    assert "guard_processes 0.0\n" in text


def test_a_scrape_may_ask_for_some_names() -> None:
    registry = merged({"0": encoded(exposed(1)), "1": encoded(exposed(2))})
    found = samples(registry.restricted_registry(["guard_trouble", "guard_score_count"]))
    assert [(sample.name, sample.value) for sample in found] == [
        ("guard_score_count", 1),
        ("guard_score_count", 2),
        ("guard_trouble", 0.25),
        ("guard_trouble", 0.5),
    ]
