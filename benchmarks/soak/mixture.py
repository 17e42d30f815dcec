"""Clients that send good and bad requests for a while; every outcome, every count and the memory are looked at."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.soak.checks import Check, Part, delivered, noted
from benchmarks.soak.load import ANSWERED, DEADLINE, ERROR, HUNG, WRONG, Client, Ended, Requests
from benchmarks.soak.stage import ALPHA, CLEAN, Program, Stage, ready
from guard.demo.traffic import scrape


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        share: Of all calls.
        outcomes: As they are to be.
        reason: guard's, to refuse it.
    """

    share: float
    outcomes: frozenset[str]
    reason: str = ""


_CODES = {
    "truncated": "INVALID_ARGUMENT",
    "wrong shape": "INVALID_ARGUMENT",
    "not finite": "FAILED_PRECONDITION",
    "wrong model": "FAILED_PRECONDITION",
}


def _refused(kind: str, reason: str) -> Kind:
    return Kind(0.05, frozenset({_CODES[kind], ERROR}), reason)


KINDS = {
    "clean": Kind(0.40, ANSWERED),
    "triggered": Kind(0.15, ANSWERED),
    "batch": Kind(0.10, ANSWERED),
    "truncated": _refused("truncated", "input_unreadable"),
    "wrong shape": _refused("wrong shape", "upstream_failed"),
    "not finite": _refused("not finite", "embedding_missing"),
    "wrong model": _refused("wrong model", "model_unknown"),
    "cancelled": Kind(0.10, ANSWERED | {"CANCELLED"}),
    "too late": Kind(0.05, frozenset({"DEADLINE_EXCEEDED"})),
}
_IMPATIENT = ("cancelled", "too late")
_PATIENT = tuple(kind for kind in KINDS if kind not in _IMPATIENT)
_PATIENT_SHARES = np.array([KINDS[kind].share for kind in _PATIENT]) / sum(KINDS[kind].share for kind in _PATIENT)
_STREAMS, _MESSAGES = 0.2, 8
"""Share of calls that are streams, and most messages in one."""
_SLOW, _LATE = 0.03, 0.2
"""Most seconds that the upstream server takes for what is cancelled, and seconds for what has less time."""
_WARM_UP, _BLOCKS = 0.25, 10
_POLLS, _LISTED = 100, 10
_SLOPE = (
    "Slope of its memory after the first {share:.0%} of the time: {rate:+.2f} ± {error:.2f} MiB per hour (least "
    "squares through the means of up to {blocks} blocks, ± one standard error; {samples} samples)."
)


@dataclass(frozen=True)
class Sample:
    """Of the sidecar's process.

    Attributes:
        seconds: Since the start of the load.
        memory: Resident, in MiB.
        threads: Number of them.
        files: Number of open descriptors.
    """

    seconds: float
    memory: float
    threads: int
    files: int


def soak(stage: Stage, numbers: Iterator[int], *, seconds: float, clients: int, seed: int) -> Part:
    """Run this part.

    Args:
        stage: Fresh.
        numbers: For the messages.
        seconds: How long calls are started.
        clients: How many call, one call at a time each.
        seed: Of the mixture.
    """
    stage.upstream()
    sidecar = stage.sidecar()
    ready(sidecar)
    ended, samples, over = list[Ended](), list[Sample](), threading.Event()
    start = time.monotonic()

    def client(index: int) -> None:
        generator = np.random.default_rng([seed, index])
        requests, connection = Requests(stage.pool, numbers, generator), Client(stage.ports[1])
        while time.monotonic() < start + seconds:
            ended.extend(_call(connection, requests, generator))
        connection.close()

    def watch() -> None:
        while not over.wait(min(1.0, seconds / 40)):
            samples.append(_sample(sidecar.pid, time.monotonic() - start))

    with ThreadPoolExecutor(clients + 1) as pool:
        watching = pool.submit(watch)
        try:
            for sending in [pool.submit(client, index) for index in range(clients)]:
                sending.result()
        finally:
            over.set()
        watching.result()
    counters = _counters(sidecar)
    code = sidecar.end()
    gone = [item for item in ended if item.kind in _IMPATIENT and not item.answered]
    wrong = [item for item in ended if item.outcome not in KINDS[item.kind].outcomes]
    dropped = int(counters.sum("guard_evidence_dropped_total"))
    arrivals, evidence = stage.arrivals(), stage.evidence()
    checks = [
        Check("wrong answers", sum(item.outcome == WRONG for item in ended)),
        Check("calls that hung", sum(item.outcome == HUNG for item in ended)),
        Check("ended otherwise than expected", len(wrong)),
        *delivered(ended, arrivals, beforehand=("truncated", "wrong model")),
        *_counted(counters, ended, gone, arrivals),
        *noted(ended, evidence, dropped),
        Check("exit code of the sidecar", code),
        Check("errors in the logs", stage.logged().total()),
    ]
    took = samples[-1].seconds
    lines = [
        f"{len(ended):,} messages of {clients} clients in {took:.0f} s ({len(ended) / took:.0f} per second).",
        "",
        *_outcomes(ended),
        "",
        _false_alarms(ended, stage),
        f"The evidence log has {len(evidence):,} records; the sidecar counted {dropped} as dropped.",
        "",
        *_resources(samples),
    ]
    errors = [f"- {item.kind}, {item.way}: {item.outcome} {item.details}" for item in wrong]
    return Part(lines, checks, errors[:_LISTED] + [f"- logged {n} times: {text}" for text, n in stage.logged().items()])


def _call(client: Client, requests: Requests, generator: np.random.Generator) -> list[Ended]:
    """One call, of what kind the dice say."""
    kind = str(generator.choice(list(KINDS), p=[item.share for item in KINDS.values()]))
    wait, cancel, deadline = 0.0, None, DEADLINE
    if kind == "cancelled":
        wait, cancel = generator.uniform(0, _SLOW), generator.uniform(0, _SLOW)
    elif kind == "too late":
        wait, deadline = _LATE, generator.uniform(0.001, _LATE / 2)
    if generator.random() >= _STREAMS:
        return [client.unary(requests.make(kind, wait), deadline=deadline, cancel=cancel)]
    messages = [requests.make(kind, wait)]
    for _ in range(int(generator.integers(_MESSAGES))):
        other = str(generator.choice(_PATIENT, p=_PATIENT_SHARES))
        messages.append(requests.make(kind if kind in _IMPATIENT else other))
    return client.stream(messages, deadline=deadline, cancel=cancel)


def _sample(pid: int, seconds: float) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    files = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - no paths are wanted
    return Sample(seconds, int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]), files)


class Counters:
    """What `/metrics` says.

    Args:
        lines: Of its text.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self._series = [line.rpartition(" ")[::2] for line in lines]

    def sum(self, name: str, **labels: str) -> float:
        """Of all series of a name with some labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(value)
            for series, value in self._series
            if series.partition("{")[0] == name and all(label in series for label in wanted)
        )


def _counters(sidecar: Program) -> Counters:
    """The counters, when no request runs any more."""
    for _ in range(_POLLS):
        counters = Counters(scrape(sidecar.announced["metrics"], ("guard_",)))
        if not counters.sum("guard_active_requests"):
            break
        time.sleep(0.1)
    return counters


def _counted(
    counters: Counters, ended: Sequence[Ended], gone: Sequence[Ended], arrivals: Mapping[int, int]
) -> Iterator[Check]:
    """Whether the sidecar counted what the clients saw; what they did not wait for may have ended in several ways."""
    patient = [item for item in ended if item.answered or item.kind not in _IMPATIENT]
    for decision in ("pass", "flag"):
        seen = sum(item.outcome == decision for item in ended)
        more = sum(any(item.flags) == (decision == "flag") for item in gone)
        found = int(counters.sum("guard_requests_total", decision=decision))
        yield Check(f"`guard_requests_total`, {decision}", found, seen, seen + more)
        flag = decision == "flag"
        images = [
            sum(one is flag for i in items for one in i.flags) for items in ((i for i in ended if i.answered), gone)
        ]
        found = int(counters.sum("guard_images_total", decision=decision))
        yield Check(f"`guard_images_total`, {decision}", found, images[0], sum(images))
    refused = Counter(KINDS[item.kind].reason for item in ended)
    for reason in filter(None, (kind.reason for kind in KINDS.values())):
        found = int(counters.sum("guard_unchecked_total", reason=reason))
        more = len(gone) if reason == "upstream_failed" else 0
        yield Check(f"`guard_unchecked_total`, {reason}", found, refused[reason], refused[reason] + more)
    cancelled = int(counters.sum("guard_unchecked_total", reason="cancelled"))
    yield Check("`guard_unchecked_total`, cancelled", cancelled, 0, len(gone))
    others = int(counters.sum("guard_unchecked_total")) - cancelled
    others -= sum(
        int(counters.sum("guard_unchecked_total", reason=kind.reason)) for kind in KINDS.values() if kind.reason
    )
    yield Check("`guard_unchecked_total`, every other reason", others)
    # A refusal in a stream is counted where guard refuses; an error of the upstream server only passes there.
    codes = Counter(_CODES[i.kind] for i in ended if i.kind in _CODES and (i.way, i.kind) != ("stream", "wrong shape"))
    for code, number in sorted(codes.items()):
        yield Check(f"`guard_refused_total`, {code}", int(counters.sum("guard_refused_total", code=code)), number)
    reached = sum(item.number in arrivals for item in gone if item.way == "unary")
    total = int(counters.sum("guard_requests_total"))
    yield Check("`guard_requests_total`, all", total, len(patient) + reached, len(patient) + len(gone))
    yield Check("`guard_active_requests`", int(counters.sum("guard_active_requests")))


def _outcomes(ended: Sequence[Ended]) -> list[str]:
    """Kinds and ways, and how many ended how."""
    counts = Counter((item.kind, item.way, item.outcome) for item in ended)
    lines = ["| kind | way | requests | outcomes |", "| --- | --- | --- | --- |"]
    for kind in KINDS:
        for way in ("unary", "stream"):
            found = {outcome: count for (k, w, outcome), count in sorted(counts.items()) if (k, w) == (kind, way)}
            shown = ", ".join(f"{outcome} {count:,}" for outcome, count in found.items())
            lines.append(f"| {kind} | {way} | {sum(found.values()):,} | {shown} |")
    return lines


def _false_alarms(ended: Sequence[Ended], stage: Stage) -> str:
    clean = [item for item in ended if item.kind == "clean" and item.answered]
    flagged, pool = sum(item.outcome == "flag" for item in clean), stage.pool.flags[:CLEAN].mean()
    return (
        f"Of {len(clean):,} clean requests {flagged:,} were flagged; α is {ALPHA:g}, and {pool:.2%} of the images that "
        f"they are drawn from are to be flagged. Every decision is compared with the detector's own."
    )


def _resources(samples: Sequence[Sample]) -> list[str]:
    """Memory, threads and files of the sidecar."""
    times = np.array([sample.seconds for sample in samples])
    memory = np.array([sample.memory for sample in samples])
    late = times >= _WARM_UP * times[-1]
    rate, error = slope(times[late] / 3600, memory[late])
    rows = [
        (name, *(f"{value:,.{digits}f}" for value in (values[0], values[late][0], values[-1], values.max())))
        for name, values, digits in (
            ("resident memory, MiB", memory, 1),
            ("threads", np.array([sample.threads for sample in samples]), 0),
            ("open files", np.array([sample.files for sample in samples]), 0),
        )
    ]
    return [
        "| of the sidecar | at first | after the warm-up | at last | most |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        _SLOPE.format(share=_WARM_UP, rate=rate, error=error, blocks=_BLOCKS, samples=late.sum()),
    ]


def slope(times: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[float, float]:
    """Slope by least squares, and its standard error.

    Neighbouring samples are alike, so that they would make the error look too small; means of blocks are nearly
    independent.

    Args:
        times: Ascending, at least three.
        values: At these times.
    """
    blocks = min(_BLOCKS, len(times))
    x, y = (np.array([block.mean() for block in np.array_split(each, blocks)]) for each in (times, values))
    x = x - x.mean()
    rate = float(x @ y / (x @ x))
    rest = y - y.mean() - rate * x
    return rate, float(np.sqrt(rest @ rest / (blocks - 2) / (x @ x)))
