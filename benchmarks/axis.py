"""How soon does the axis of the traffic show an attack that nothing was reconstructed of, and does it keep quiet?

python -m benchmarks.axis ZOO --measured FILE [--models PATTERN] [--clean REQUESTS]

Triggers are hidden from screening, and there is no second opinion. For each backdoored model: streams of the zoo's
requests, of which a share carries the attacker's trigger, until the alarm; then single requests along the axis. For
each clean model: streams of corrupted requests, of a new mix of classes, and `--clean` requests in all models together
that are drawn from a smoothed distribution. Each model is a line of FILE; what it holds is not made again. Then
benchmarks/results/axis-NAME.md is written.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._record import RESULTS, heading, read_rows
from benchmarks.screening import CORRUPTIONS, _changed
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet
from guard.evaluation.statistics import Rate
from guard.evaluation.subject import EvaluationSettings, Subject
from guard.screening import Banks, Detector, Monitor, Screen, default_k
from guard.screening.axis import AxisMonitor, AxisReference, AxisScores
from guard.screening.calibration import split

Floats = NDArray[np.float32]
SHARES = {0.01: (2000, 4000), 0.05: (300, 1000)}
"""Share of triggered requests → within how many requests the alarm is wanted, and when a stream is given up."""
SEEDS = range(5)
ALPHAS = (0.01, 0.001)
DRIFT = 5000
"""Requests of a stream of drift."""
SMOOTHED = (0.1, 0.3)
"""Standard deviations of the noise that smooths a distribution, in units of those of the embeddings."""
EACH = 1_000_000
"""Most clean requests of one model."""


def main() -> None:
    """Run what is missing, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--models", default="*")
    parser.add_argument("--clean", type=int, default=10_000_000)
    arguments = parser.parse_args()
    path: Path = arguments.measured
    rows = read_rows(path)
    zoo, sets = Zoo.read(arguments.zoo), {}
    for name in sorted(zoo.select(arguments.models), key=lambda name: _label(zoo, name) != "backdoored"):
        label = _label(zoo, name)
        if label not in {"backdoored", "clean"} or name in {row["model"] for row in rows}:
            continue
        data = zoo.models[name].images
        if data not in sets:
            sets[data] = ImageSet.of_zoo(zoo.root / "images" / data, vetting=1000, seed=0)
        subject = Subject(zoo, name, sets[data], EvaluationSettings(), searches=zoo.root / "evaluation" / ".searches")
        done = sum(row.get("quiet", {}).get("requests", 0) for row in rows)
        count = min(EACH, arguments.clean - done)
        row = _attacked(subject) if label == "backdoored" else _clean(subject, count)
        rows.append({"model": name, "label": label, **row})
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        sys.stderr.write(f"{rows[-1]}\n"[:400])
    command = f"python -m benchmarks.axis {zoo.name} --clean {arguments.clean}"
    seeded = "" if zoo.seed == 0 else f"-{zoo.seed}"
    out = RESULTS / f"axis-{zoo.name}{seeded}.md"
    out.write_text(heading(f"The axis of the traffic on the zoo {zoo.name}", command) + report(rows), encoding="utf-8")


def _label(zoo: Zoo, name: str) -> str:
    truth = zoo.truth(name)
    return "" if truth is None else truth.label


class _World:
    """A calibrated model, without triggers or a second opinion."""

    def __init__(self, subject: Subject) -> None:
        images = subject.pixels.calibration
        if images is None:
            raise AssertionError("the zoo has calibration images")
        self.calibration: Floats = subject.classifier.embed(images).numpy()
        self.head: Floats = np.ascontiguousarray(subject.classifier.head.float().cpu().numpy().T)
        parts = split(np.arange(len(images)), 0)
        self.bank, self.behind = self.calibration[parts.banks], self.calibration[parts.threshold]
        self.reference = AxisReference.fit(self.bank, self.behind, self.head)

    def detector(self, alpha: float) -> Detector:
        k = default_k(len(self.bank), self.head.shape[1])
        screen = Screen(Banks.fit(self.bank, {}, self.head, k=k))
        return Detector(screen, screen.score_samples(self.behind), alpha)

    def classes(self, embeddings: Floats) -> NDArray[np.int64]:
        found: NDArray[np.int64] = (embeddings @ self.head).argmax(1)
        return found


def _attacked(subject: Subject) -> dict[str, Any]:
    world, requests = _World(subject), subject.requests.numpy()
    triggered = np.concatenate([attack.embeddings.numpy() for attack in subject.attacks])
    targets = [attack.target for attack in subject.attacks]
    streams: list[dict[str, Any]] = []
    for share, (_, limit) in SHARES.items():
        for seed in SEEDS:
            monitor, generator = AxisMonitor(world.reference), np.random.default_rng(seed)
            axis = None
            while axis is None and monitor.observed < limit:
                pool = triggered if generator.random() < share else requests
                one = pool[generator.integers(len(pool))][None]
                axis = next((alarm.axis for alarm in monitor.observe(one, world.classes(one))), None)
            stream: dict[str, Any] = {"share": share, "seed": seed, "after": axis and axis.observed}
            if axis is not None:
                stream |= {"right": axis.target in targets, "estimate": axis.share, "within": axis.within}
                scores = AxisScores([axis], world.reference)
                for alpha in ALPHAS:
                    before = world.detector(alpha)
                    after = before.along(scores)
                    stream[str(alpha)] = [
                        [int(each.score(pool).flags.sum()), len(pool)]
                        for each in (before, after)
                        for pool in (triggered, requests)
                    ]
            streams.append(stream)
    truth = subject.truth
    return {
        "family": truth.family if truth else "",
        "streams": streams,
        "published": [_published(world, requests, triggered, share) for share in SHARES],
    }


def _published(world: _World, requests: Floats, triggered: Floats, share: float) -> list[float]:
    """The top eigenvalue of the globally whitened traffic as LoREx takes it: clean, attacked, and TPR at 1 % FPR."""
    mean, covariance = world.bank.mean(0), np.cov(world.bank.T)
    ridge = 1e-3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    matrix = np.linalg.inv(np.linalg.cholesky(covariance + ridge)).T
    generator, size = np.random.default_rng(0), 2000
    clean = requests[generator.integers(len(requests), size=size)]
    mixed = clean.copy()
    rows = generator.choice(size, round(share * size), replace=False)
    mixed[rows] = triggered[generator.integers(len(triggered), size=len(rows))]
    tops = []
    for stream in (clean, mixed):
        values, directions = np.linalg.eigh(np.cov(((stream - mean) @ matrix).T))
        tops.append((float(values[-1]), directions[:, -1]))
    scores = [np.abs((pool - mean) @ matrix @ tops[1][1]) for pool in (world.behind, triggered)]
    return [tops[0][0], tops[1][0], float((scores[1] > np.quantile(scores[0], 0.99)).mean())]


def _clean(subject: Subject, count: int) -> dict[str, Any]:
    world, requests = _World(subject), subject.requests.numpy()
    if subject.pixels.requests is None:
        raise AssertionError("the zoo has requests")
    kinds: dict[str, Floats] = {"as they are": requests}
    for name, change in CORRUPTIONS.items():
        kinds[name] = subject.classifier.embed(_changed(subject.pixels.requests, change)).numpy()
    few = np.isin(world.classes(requests), [0, 1, 2])
    kinds["a new mix: three classes only"] = requests[few]
    drift = {}
    for name, pool in kinds.items():
        generator = np.random.default_rng(0)
        rows = np.concatenate([generator.permutation(len(pool)) for _ in range(DRIFT // len(pool) + 1)])[:DRIFT]
        axis = AxisMonitor(world.reference)

        def looked_at(one: Floats, axis: AxisMonitor = axis) -> Sequence[Any]:
            return axis.observe(one, world.classes(one))

        found = _first(looked_at, pool, rows)
        detector = world.detector(ALPHAS[0])
        monitor = Monitor(detector.streams())
        seen = detector.observations(detector.screen.score_samples(pool))
        other = next((at + 1 for at, row in enumerate(rows) if monitor.observe(seen[row])), None)
        drift[name] = [found, other]
    return {"drift": drift, "quiet": _quiet(world, requests, count, subject.name)}


def _first(observe: Callable[[Floats], Sequence[Any]], pool: Floats, rows: NDArray[np.int64]) -> int | None:
    """The number of the request that raises the first alarm."""
    return next((at + 1 for at, row in enumerate(rows) if observe(pool[row][None])), None)


def _quiet(world: _World, requests: Floats, count: int, name: str) -> dict[str, Any]:
    """Alarms in clean requests from a distribution of which the calibration is a sample too.

    It is that of all images, each blurred by normal noise, so that no request comes twice, and each image is as common
    in the calibration as in the traffic.
    """
    if count <= 0:
        return {"requests": 0, "alarms": 0, "seconds": 0.0}
    pool = np.concatenate([world.calibration, requests])
    generator = np.random.default_rng(sum(name.encode()))
    width = SMOOTHED[int(generator.integers(len(SMOOTHED)))] * pool.std(0)

    def draw(size: int) -> Floats:
        values = pool[generator.integers(len(pool), size=size)] + width * generator.normal(size=(size, pool.shape[1]))
        drawn: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
        return drawn

    reference = AxisReference.fit(draw(len(world.bank)), draw(len(world.behind)), world.head)
    monitor, alarms, highest, began = AxisMonitor(reference), 0, 0.0, time.perf_counter()
    for _ in range(count // 1000):
        batch = draw(1000)
        alarms += len(monitor.observe(batch, world.classes(batch)))
        highest = max(highest, float(monitor.bets.sums[:, 0].sum(axis=(1, 2)).max()))
    seconds = time.perf_counter() - began
    return {
        "requests": count // 1000 * 1000,
        "alarms": alarms,
        "seconds": seconds,
        "highest": highest / monitor.bets.limit,
        "noise": float(width.mean() / pool.std(0).mean()),
    }


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables."""
    attacked = [row for row in rows if row["label"] == "backdoored"]
    clean = [row for row in rows if row["label"] == "clean"]
    lines = [
        (
            f"{len(attacked)} backdoored and {len(clean)} clean models. Triggers are hidden from screening; no second "
            "opinion. The calibration is as `guard calibrate` splits it: "
            "40 % of the images fill the bank, 40 % set the threshold."
        ),
        "",
        "## How soon the alarm comes",
        "",
        (
            f"{len(SEEDS)} streams for each model and share: requests of the zoo, drawn with replacement, of which a "
            "share carries the trigger. A model counts as found if the median stream raises the alarm in time with the "
            "right class. Intervals are exact, at 95 %."
        ),
        "",
        "| triggered | wanted within | models found | streams found | median delay of all alarms | wrong class |",
        "| --- " * 6 + "|",
    ]
    for share, (wanted, _) in SHARES.items():
        streams = [stream for row in attacked for stream in _of(row, share)]
        models = sum(_median(row, share) <= wanted for row in attacked)
        hits = [stream["after"] for stream in streams if stream["after"]]
        lines.append(
            f"| {share:.0%} | {wanted:,} | {Rate.of(models, len(attacked)).brief} | "
            f"{Rate.of(sum(_in_time(stream, wanted) for stream in streams), len(streams)).brief} | "
            f"{np.median(hits):,.0f} | {sum(not stream.get('right', True) for stream in streams)} |"
        )
    lines += ["", "| model | family | 1 %: median, streams | 5 %: median, streams |", "| --- " * 4 + "|"]
    for row in attacked:
        cells = [
            f"{_delay(row, share)}, {sum(_in_time(stream, wanted) for stream in _of(row, share))}/{len(SEEDS)}"
            for share, (wanted, _) in SHARES.items()
        ]
        lines.append(f"| {row['model']} | {row['family']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Single requests after the alarm",
        "",
        (
            "All triggered and all clean requests of the zoo, by density alone and with the axis, on the streams that "
            "raised the alarm; pooled over streams, which share requests, so that there are no intervals."
        ),
        "",
        "| triggered in the stream | α | TPR before | TPR after | FPR before | FPR after |",
        "| --- " * 6 + "|",
    ]
    for share in SHARES:
        for alpha in map(str, ALPHAS):
            counts = np.array([stream[alpha] for row in attacked for stream in _of(row, share) if stream["after"]])
            rates = counts[:, :, 0].sum(0) / counts[:, :, 1].sum(0)
            before, alarms, after, alarms_after = rates
            lines.append(f"| {share:.0%} | {alpha} | {before:.1%} | {after:.1%} | {alarms:.2%} | {alarms_after:.2%} |")
    lines += [
        "",
        "## The top eigenvalue of the globally whitened traffic, as LoREx takes it",
        "",
        (
            "Windows of 2,000 requests; the largest, median and smallest ratio of attacked to clean, and the share of "
            "triggered requests along that eigenvector at 1 % false alarms (mean over models)."
        ),
        "",
        "| triggered | ratio of eigenvalues | TPR |",
        "| --- " * 3 + "|",
    ]
    for place, share in enumerate(SHARES):
        ratios = [row["published"][place][1] / row["published"][place][0] for row in attacked]
        rates = [row["published"][place][2] for row in attacked]
        spread = " / ".join(f"{value:.2f}" for value in (max(ratios), np.median(ratios), min(ratios)))
        lines.append(f"| {share:.0%} | {spread} | {np.mean(rates):.1%} |")
    return "\n".join([*lines, *_quiet_report(clean)]) + "\n"


def _quiet_report(clean: Sequence[dict[str, Any]]) -> list[str]:
    quiet = [row["quiet"] for row in clean if row["quiet"]["requests"]]
    requests, seconds = sum(item["requests"] for item in quiet), sum(item["seconds"] for item in quiet)
    alarms = sum(item["alarms"] for item in quiet)
    found: dict[str, list[list[int | None]]] = defaultdict(list)
    for row in clean:
        for name, each in row["drift"].items():
            found[name].append(each)
    highest = max((item["highest"] for item in quiet), default=0.0)
    return [
        "",
        "## Clean requests",
        "",
        (
            f"{requests:,} clean requests over {len(quiet)} models raised {alarms} alarms; "
            f"the largest sum of capital was {highest:.2g} of the limit. "
            f"{seconds / max(1, requests) * 1e6:.0f} µs per request, one thread."
        ),
        "",
        (
            f"Streams of {DRIFT:,} clean requests of the zoo; models with an alarm of the axis, and with one of the "
            "stream monitor over density scores:"
        ),
        "",
        "| requests | axis | drift |",
        "| --- " * 3 + "|",
        *(
            f"| {name} | {sum(axis is not None for axis, _ in each)}/{len(each)} | "
            f"{sum(drift is not None for _, drift in each)}/{len(each)} |"
            for name, each in found.items()
        ),
    ]


def _of(row: dict[str, Any], share: float) -> list[dict[str, Any]]:
    return [stream for stream in row["streams"] if stream["share"] == share]


def _in_time(stream: dict[str, Any], wanted: int) -> bool:
    return bool(stream["after"] and stream["after"] <= wanted and stream["right"])


def _median(row: dict[str, Any], share: float) -> float:
    return float(np.median([stream["after"] if stream.get("right") else np.inf for stream in _of(row, share)]))


def _delay(row: dict[str, Any], share: float) -> str:
    median = _median(row, share)
    return f"{median:,.0f}" if np.isfinite(median) else f"over {SHARES[share][1]:,}"


if __name__ == "__main__":
    main()
