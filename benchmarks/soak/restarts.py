"""Sidecars and the upstream server that end and come back, while careful clients go on sending."""

import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from benchmarks.soak.checks import Check, Part, delivered, noted
from benchmarks.soak.load import HUNG, NO_REPLY, WRONG, Client, Ended, Requests
from benchmarks.soak.stage import Stage, ready

CYCLES = ("sidecar drained, then a new one", "upstream drained", "sidecar drained after a new one", "upstream killed")
_DRAIN_DELAY = 0.2
_SLOW = 0.05
"""Most seconds that the upstream server takes, so that something is under way whenever a process ends."""
_STREAMS, _MESSAGES = 0.25, 4
_FIRST_DELAY, _LAST_DELAY, _PATIENCE = 0.05, 1.0, 60.0
"""Seconds before a second attempt, at most before a further one, and until a client gives up."""
_LISTED = 10
AWAY, REFUSED, BROKEN, LOST, OTHER = (
    "the upstream server is away, says the sidecar",
    "no sidecar listened",
    "the connection ended before the request was forwarded",
    "the connection ended after it was forwarded: lost",
    "another status, which clients do not try again",
)


_NOTE = (
    "An attempt is counted with the restart that began last before its end. Ready again: from the signal (or the start "
    "of the new process, if that comes first) until a request is answered that was sent afterwards."
)


@dataclass(frozen=True)
class Attempt:
    """A message, and what was being restarted when it ended."""

    ended: Ended
    during: str


class Traffic:
    """Careful clients.

    Args:
        stage: Of the processes.
        numbers: For the messages.
        seed: Of the requests.
    """

    def __init__(self, stage: Stage, numbers: Iterator[int], seed: int) -> None:
        self._stage, self._numbers, self._seed = stage, numbers, seed
        self.attempts, self.during, self.open = list[Attempt](), "nothing", True
        self.requests = self.unanswered = 0
        self._lock = threading.Lock()

    def client(self, index: int) -> None:
        """Send requests until `open` is no more."""
        generator = np.random.default_rng([self._seed, index])
        requests = Requests(self._stage.pool, self._numbers, generator)
        connection = Client(*self._stage.ports[1:])
        while self.open:
            self.send(connection, requests, generator)
        connection.close()

    def send(self, client: Client, requests: Requests, generator: np.random.Generator) -> None:
        """Some requests, each again after UNAVAILABLE, as long as it was not answered."""
        count = int(generator.integers(1, _MESSAGES + 1)) if generator.random() < _STREAMS else 0
        kinds = [str(generator.choice(["clean", "triggered", "batch"])) for _ in range(count or 1)]
        sent, attempts, unanswered = len(kinds), list[Attempt](), 0
        end, delay = time.monotonic() + _PATIENCE, _FIRST_DELAY
        while kinds:
            messages = [requests.make(kind, float(generator.uniform(0, _SLOW))) for kind in kinds]
            ended = client.stream(messages, status=True) if count else [client.unary(messages[0])]
            attempts += [Attempt(item, self.during) for item in ended]
            kinds = [item.kind for item in ended if item.outcome == "UNAVAILABLE"]
            unanswered += sum(not item.answered for item in ended) - len(kinds)
            if time.monotonic() > end:
                unanswered += len(kinds)
                break
            if kinds:
                time.sleep(delay * generator.uniform(0.5, 1))
                delay = min(2 * delay, _LAST_DELAY)
        with self._lock:
            self.attempts += attempts
            self.requests += sent
            self.unanswered += unanswered


def restarts(stage: Stage, numbers: Iterator[int], *, cycles: int, clients: int, seed: int) -> Part:
    """Run this part.

    Args:
        stage: Fresh.
        numbers: For the messages.
        cycles: How many processes are ended and started again.
        clients: How many send, one call at a time each.
        seed: Of requests and pauses.
    """
    upstream = stage.upstream()
    sidecar, place = stage.sidecar(drain_delay=_DRAIN_DELAY), 1
    ready(sidecar)
    traffic, generator = Traffic(stage, numbers, seed), np.random.default_rng([seed, clients])
    probe, probes = Client(*stage.ports[1:]), Requests(stage.pool, numbers, generator)
    codes, seconds = list[int](), defaultdict[str, list[float]](list)
    with ThreadPoolExecutor(clients) as pool:
        try:
            sending = [pool.submit(traffic.client, index) for index in range(clients)]
            for cycle in range(cycles):
                time.sleep(generator.uniform(0.2, 0.6))
                traffic.during = CYCLES[cycle % len(CYCLES)]
                start = time.monotonic()
                if traffic.during.startswith("upstream"):
                    upstream.end(signal.SIGKILL if traffic.during.endswith("killed") else signal.SIGTERM)
                    upstream = stage.upstream()
                elif traffic.during.endswith("then a new one"):
                    codes.append(sidecar.end())
                    sidecar = stage.sidecar(place, drain_delay=_DRAIN_DELAY)
                else:
                    old, place = sidecar, 3 - place
                    sidecar = stage.sidecar(place, drain_delay=_DRAIN_DELAY)
                    ready(sidecar)
                    codes.append(old.end())
                traffic.send(probe, probes, generator)
                seconds[traffic.during].append(time.monotonic() - start)
            time.sleep(0.5)
        finally:
            traffic.open = False
        for client in sending:
            client.result()
    probe.close()
    codes.append(sidecar.end())
    return _result(stage, traffic, codes, seconds)


def _result(stage: Stage, traffic: Traffic, codes: Sequence[int], seconds: dict[str, list[float]]) -> Part:
    arrivals, ended = stage.arrivals(), [attempt.ended for attempt in traffic.attempts]
    causes = {id(attempt): _cause(attempt, arrivals.keys()) for attempt in traffic.attempts}
    lost = [attempt for attempt in traffic.attempts if causes[id(attempt)] == LOST]
    other = [attempt for attempt in traffic.attempts if causes[id(attempt)] == OTHER]
    counts = Counter((attempt.during, causes[id(attempt)]) for attempt in traffic.attempts)
    columns = ("answered", AWAY, REFUSED, BROKEN, LOST, OTHER)
    lines = [
        f"{traffic.requests:,} requests of clients that try again after UNAVAILABLE, in {len(ended):,} attempts.",
        "",
        f"| while this was restarted | times | ready again, median / most s | {' | '.join(columns)} |",
        "| --- " * (3 + len(columns)) + "|",
    ]
    for during in ("nothing", *CYCLES):
        took = seconds.get(during, [])
        times = f"{np.median(took):.1f} / {max(took):.1f}" if took else "–"
        lines.append(
            f"| {during} | {len(took)} | {times} | {' | '.join(f'{counts[during, cause]:,}' for cause in columns)} |"
        )
    lines += ["", _NOTE]
    checks = [
        Check("requests lost that were accepted", len(lost)),
        Check("attempts that hung", sum(item.outcome == HUNG for item in ended)),
        Check("attempts with a wrong answer", sum(item.outcome == WRONG for item in ended)),
        Check("attempts that ended with another status", len(other)),
        Check("requests never answered", traffic.unanswered),
        *delivered(ended, arrivals),
        *noted(ended, stage.evidence()),
        Check("drained sidecars that did not end with exit code 0", sum(code != 0 for code in codes)),
        Check("errors in the logs", stage.logged().total()),
    ]
    errors = [
        f"- {item.during}; {item.ended.way}, {'' if item.ended.number in arrivals else 'not '}forwarded: "
        f"{item.ended.outcome} {item.ended.details}"
        for item in (*lost, *other)
    ]
    return Part(lines, checks, errors[:_LISTED] + [f"- logged {n} times: {text}" for text, n in stage.logged().items()])


def _cause(attempt: Attempt, arrived: Collection[int]) -> str:
    """What became of an attempt.

    What guard says bears its name, in the status or beside it; in a stream the errors of an upstream server pass as
    they are. Any other UNAVAILABLE is of gRPC, on one side or the other, when the connection to a sidecar ends or there
    is none; that guard had accepted the request is known if it was forwarded.
    """
    ended = attempt.ended
    if ended.answered:
        return "answered"
    if ended.outcome in {HUNG, NO_REPLY}:
        return LOST
    unavailable, guards = ended.outcome == "UNAVAILABLE", ended.reason or ended.details.startswith("guard: ")
    if unavailable and not guards and "onnection refused" in ended.details:
        return REFUSED
    if guards or attempt.during.startswith("upstream"):
        return AWAY if unavailable else OTHER
    if ended.number in arrived:
        return LOST
    return BROKEN if unavailable else OTHER
