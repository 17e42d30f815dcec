"""What a sidecar costs: embedded, with screening against without; as a proxy, against a bare one; and at its start.

python -m benchmarks.sidecar_cost [--requests N] [--banks N ...] [--parts embedded,proxy,opinion,cold] [--out DIR]

Everything runs in one go, and targets take turns request by request in a random order, so that they meet the same
machine. The tower is open_clip's ViT-B-32 with random weights; embeddings in the banks are drawn. Client, proxy and
upstream server share the cores of one machine.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._hops import CLASSES, EMBEDDING, hop
from benchmarks._record import RESULTS, heading
from benchmarks._synthetic import SIDE, TOWER, WIDTH, Pairs, World, export_tower, image, unit, write_profile
from benchmarks._turns import Client, Estimate, Target, Times
from guard.classifiers import ClassifierDigest, ClassList, ExportedClassifier, Preprocessing
from guard.classifiers.digest import PARTS
from guard.demo.traffic import scrape, sidecar
from guard.profiles import ModelRecord
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.screening import ReferenceAnswers

GB = 1e9
PAYLOADS = {"UINT8": 1, "FP32": 4}
"""Bytes per value of an image: requests of 150,528 and 602,112 bytes."""
EMBEDDED_CONCURRENCY, EMBEDDED_BLOCKS = 4, 12
PROXY_CONCURRENCY, PROXY_BLOCKS = 8, 4
BANKS = (2000, 10_000)
"""`guard calibrate` makes the first of the 5,000 images that it takes by default."""
IMAGES, STARTS = 64, 5
PARTS_OF_RUN = ("embedded", "proxy", "opinion", "cold")
START_SECONDS, POLL_SECONDS = 60.0, 0.005
MAX_P50, MIN_THROUGHPUT, MAX_ADDED = 1.02, 0.97, 1.5
MAX_START, MAX_START_PER_GB = 2.0, 1.0
_CLASSES = ClassList(tuple(f"class {k}" for k in range(CLASSES)))


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600, help="rounds before a proxy; embedded takes half as many")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one block of the throughput")
    parser.add_argument("--banks", type=int, nargs="+", default=BANKS, help="rows of each of the three banks, by turns")
    parser.add_argument("--parts", default=",".join(PARTS_OF_RUN), help="which to run")
    parser.add_argument("--reference", default=TOWER, help="for `opinion`: open_clip's name, or student")
    parser.add_argument("--delay", type=float, default=0.06, help="seconds of the upstream server for `opinion`")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS_OF_RUN):
        parser.error(f"there is no part {min(unknown)!r}")
    command = "python -m benchmarks.sidecar_cost" + "".join(f" {item}" for item in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), arguments.requests, arguments.seconds, arguments.seed)
        run.reference, run.delay = arguments.reference, arguments.delay
        lines = [
            line
            for part in parts
            for line in (run.cold(arguments.banks[0]) if part == "cold" else _each(getattr(run, part), arguments.banks))
        ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = heading(f"Cost of a sidecar, seed {arguments.seed}", command)
    (arguments.out / "sidecar-cost.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def _each(part: Callable[[int], list[str]], banks: Sequence[int]) -> list[str]:
    return [line for rows in banks for line in part(rows)]


class Run:
    """One run of the benchmark.

    Args:
        folder: For what is made on the way.
        requests: Rounds in which each target gets one request.
        seconds: Of a block of the throughput.
        seed: Of everything random.

    Attributes:
        reference: open_clip's name of the reference model, or `STUDENT`.
        delay: Seconds that the upstream server takes for a reply where second opinions are measured.
    """

    reference, delay = TOWER, 0.06

    def __init__(self, folder: Path, requests: int, seconds: float, seed: int) -> None:
        self._folder, self._requests, self._seconds, self._seed = folder, requests, seconds, seed
        self._record: ModelRecord | None = None

    def embedded(self, rows: int) -> list[str]:
        """One pass gives answer and embedding; what does the check of that add?"""
        profile, model = self.embedded_files(rows)
        with ExitStack() as stack:
            served = {
                name: stack.enter_context(sidecar("--profile", str(profile), "--model", str(model), *more))
                for name, more in {"with screening": (), "without": ("--no-screening",)}.items()
            }
            targets = {name: Target(line["listen"]) for name, line in served.items()}
            messages = [message("FP32", image(row).tobytes()) for row in range(IMAGES)]
            client = Client(targets, messages, seed=self._seed)
            times = client.latency(self._requests // 2)
            rates = client.throughput(EMBEDDED_BLOCKS, self._seconds, EMBEDDED_CONCURRENCY)
            flagged = _metric(served["with screening"], 'guard_requests_total{decision="flag"')
            requests = _metric(served["with screening"], "guard_requests_total{")
        screened, plain = times["with screening"], times["without"]
        ratio = Estimate.of(lambda rows: float(np.median(screened[rows]) / np.median(plain[rows])), len(plain))
        more, less = rates["with screening"], rates["without"]
        throughput = Estimate.of(lambda rows: float(more[rows].sum() / less[rows].sum()), len(more))
        return [
            f"## Embedded, ViT-B-32 on ONNX Runtime, banks of {rows:,}",
            "",
            (
                f"One image of 602,112 bytes per request, {len(plain)} pairs, order at random; throughput at "
                f"concurrency {EMBEDDED_CONCURRENCY} in {len(more)} pairs of blocks of {self._seconds:g} s. "
                f"{_banks(rows)} "
                f"{flagged / requests:.1%} of the requests were flagged."
            ),
            "",
            "| | p50 ms | p95 ms | requests/s |",
            "| --- " * 4 + "|",
            *(f"| {name} | {_quantiles(times[name])} | {rates[name].mean():.1f} |" for name in times),
            "",
            f"- p50, with / without: {ratio}; at most {MAX_P50}: {_met(ratio.value <= MAX_P50)}",
            (
                f"- throughput, with / without: {throughput}; at least {MIN_THROUGHPUT}: "
                f"{_met(throughput.value >= MIN_THROUGHPUT)}"
            ),
            "",
        ]

    def proxy(self, rows: int) -> list[str]:
        """Before an upstream server that gives the embedding: what is added to a direct call, and by a bare proxy?"""
        profile, replies = self._upstream_files(rows)
        lines = [
            f"## Proxy, embedding from the upstream server, banks of {rows:,}",
            "",
            (
                f"Added: p50 of the difference to the direct call of the same round; {self._requests} rounds, order at "
                f"random. Throughput at concurrency {PROXY_CONCURRENCY}, {PROXY_BLOCKS} blocks of {self._seconds:g} "
                f"s. {_banks(rows)}"
            ),
            "",
        ]
        with ExitStack() as stack:
            upstream = stack.enter_context(hop("upstream", str(replies)))
            common = ("--profile", str(profile), "--upstream", upstream, "--embedding-output", EMBEDDING)
            served = {
                name: stack.enter_context(sidecar(*common, "--mode", *arguments))
                for name, arguments in {
                    "shadow": ("shadow",),
                    "tag": ("tag",),
                    "block": ("block",),
                    "shadow, no screening": ("shadow", "--no-screening"),
                    "tag, no screening": ("tag", "--no-screening"),
                }.items()
            }
            targets = {
                "direct": Target(upstream),
                "bytes-only proxy": Target(stack.enter_context(hop("proxy", upstream))),
                # Guard does not read the requests of this method.
                "guard, unread": Target(served["tag"]["listen"], "ModelMetadata"),
                **{name: Target(line["listen"], settle=name == "shadow") for name, line in served.items()},
            }
            for size, message in self._messages():
                times, rates, score = self._turns(targets, message, served["tag"])
                lines += [f"### {size:,} bytes", "", *_proxy_table(times, rates), *_breakdown(times, score)]
        return lines

    def opinion(self, rows: int) -> list[str]:
        """What does a second opinion add where guard serves the model, and beside an upstream server?"""
        profile, model, replies = self._compared_files(rows)
        messages = [message("FP32", image(row).tobytes()) for row in range(IMAGES)]
        with ExitStack() as stack:
            served = {
                rule: stack.enter_context(
                    sidecar("--profile", str(profile), "--model", str(model), "--second-opinion", rule, *_PATIENT)
                )
                for rule in ("off", "near", "all")
            }
            client = Client({name: Target(line["listen"]) for name, line in served.items()}, messages, seed=self._seed)
            times = client.latency(self._requests // 2)
            rates = client.throughput(EMBEDDED_BLOCKS, self._seconds, EMBEDDED_CONCURRENCY)
            asked = {name: _asked(line) for name, line in served.items()}
        lines = [
            f"## Second opinion, embedded, {TOWER} with {self.reference} as the reference model, banks of {rows:,}",
            "",
            (
                f"One image of 602,112 bytes per request, {len(times['off'])} rounds, order at random; throughput at "
                f"concurrency {EMBEDDED_CONCURRENCY} in {len(rates['off'])} blocks of {self._seconds:g} s. "
                f"{_banks(rows)}"
            ),
            "",
            *_opinion_table(times, rates, "off", asked),
        ]
        with ExitStack() as stack:
            upstream = stack.enter_context(hop("upstream", str(replies), delay=self.delay))
            common = ("--profile", str(profile), "--upstream", upstream, "--embedding-output", EMBEDDING, *_PATIENT)
            served = {
                f"{mode}, {rule}": stack.enter_context(sidecar(*common, "--mode", mode, "--second-opinion", rule))
                for mode in ("shadow", "tag")
                for rule in ("off", "near", "all")
            }
            targets = {
                "direct": Target(upstream),
                **{name: Target(line["listen"], settle=name.startswith("shadow")) for name, line in served.items()},
            }
            client = Client(targets, messages, seed=self._seed)
            times = client.latency(self._requests // 2)
            rates = client.throughput(PROXY_BLOCKS, self._seconds, PROXY_CONCURRENCY)
            asked = {name: _asked(line) for name, line in served.items()}
        return [
            *lines,
            (
                f"## Second opinion, before an upstream server that gives the embedding after {1000 * self.delay:g} "
                f"ms, banks of {rows:,}"
            ),
            "",
            (
                f"The server uses no processor of this machine. {len(times['direct'])} rounds, order at random; "
                f"throughput at concurrency {PROXY_CONCURRENCY} in {PROXY_BLOCKS} blocks of {self._seconds:g} s."
            ),
            "",
            *_opinion_table(times, rates, "direct", asked),
        ]

    def _compared_files(self, rows: int) -> tuple[Path, Path, Path]:
        """A profile with a reference model, the model that it is of, and embeddings for an upstream server."""
        _, model = self.embedded_files(rows)
        profile, other = self._folder / f"compared-{rows}", self._folder / "reference"
        replies = self._folder / "compared.npy"
        if self._record is None:
            raise AssertionError("the model has been exported")
        if not profile.exists():
            record = export_tower(
                self._folder / "reference-weights", other, _CLASSES, seed=self._seed + 1, tower=self.reference
            )
            images = np.stack([image(row) for row in range(IMAGES)])
            embeddings, _ = ExportedClassifier(model, gpu=False).run(images)
            pairs = Pairs(embeddings, ReferenceAnswers(*ExportedClassifier(other, gpu=False).run(images)))
            write_profile(
                profile, self._record, World(embeddings), rows, seed=self._seed, pairs=pairs, reference=(record, other)
            )
            np.save(replies, embeddings)
        return profile, model, replies

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        """Requests with one image, and the size of that."""
        for datatype, width in PAYLOADS.items():
            size = 3 * SIDE * SIDE * width
            yield size, message(datatype, np.random.default_rng(self._seed).bytes(size))

    def _turns(
        self, targets: Mapping[str, Target], message: bytes, tag: Mapping[str, Any]
    ) -> tuple[dict[str, Times], dict[str, Times], float]:
        """Latency and throughput of each target, and the milliseconds that a sidecar's scoring took meanwhile."""
        client, before = Client(targets, [message], seed=self._seed), _scoring(tag)
        times = client.latency(self._requests)
        seconds, count = (now - then for now, then in zip(_scoring(tag), before, strict=True))
        return times, client.throughput(PROXY_BLOCKS, self._seconds, PROXY_CONCURRENCY), 1000 * seconds / count

    def cold(self, rows: int) -> list[str]:
        """From the start of the process to a 200 from /readyz."""
        profile, model = self.embedded_files(rows)
        upstream_profile, replies = self._upstream_files(rows)
        lines = [
            "## Start",
            "",
            (
                f"Seconds from the start of the process to 200 from /readyz, {STARTS} starts, files in the page cache. "
                f"{_banks(rows)} At most {MAX_START:g} s and {MAX_START_PER_GB:g} s per GB of model and profile."
            ),
            "",
            "| | GB | median s | slowest s | at most | |",
            "| --- " * 6 + "|",
        ]
        with hop("upstream", str(replies)) as upstream:
            for name, arguments, folders in (
                ("embedded", ("--profile", str(profile), "--model", str(model)), (profile, model)),
                (
                    "before an upstream server",
                    ("--profile", str(upstream_profile), "--upstream", upstream, "--embedding-output", EMBEDDING),
                    (upstream_profile,),
                ),
            ):
                size = sum(file.stat().st_size for folder in folders for file in folder.iterdir()) / GB
                _start(arguments)  # brings the files into the page cache
                seconds, limit = [_start(arguments) for _ in range(STARTS)], MAX_START + MAX_START_PER_GB * size
                lines.append(
                    f"| {name} | {size:.3f} | {np.median(seconds):.2f} | {max(seconds):.2f} | {limit:.2f} | "
                    f"{_met(max(seconds) <= limit)} |"
                )
        return [*lines, "", f"Imported by then, of what only training needs: {_imported(profile, model)}.", ""]

    def embedded_files(self, rows: int) -> tuple[Path, Path]:
        """A profile and the model that it is of; each made once."""
        profile, model = self._folder / f"embedded-{rows}", self._folder / "model"
        if self._record is None:
            self._record = export_tower(self._folder / "weights", model, _CLASSES, seed=self._seed)
        if not profile.exists():
            images = np.stack([image(row) for row in range(IMAGES)])
            embeddings, _ = ExportedClassifier(model, gpu=False).run(images)
            write_profile(profile, self._record, World(embeddings), rows, seed=self._seed)
        return profile, model

    def _upstream_files(self, rows: int) -> tuple[Path, Path]:
        """A profile, and embeddings of which it flags none, for the upstream server; made once."""
        directory, replies = self._folder / f"upstream-{rows}", self._folder / f"replies-{rows}.npy"
        if not directory.exists():
            generator = np.random.default_rng(self._seed)
            world = World(unit(1.0 + generator.normal(size=(IMAGES, WIDTH))))
            parts = dict.fromkeys(PARTS, "0" * 64)
            preprocessing = Preprocessing(SIDE, (0.5,) * 3, (0.25,) * 3)
            record = ModelRecord("no model", ClassifierDigest(parts).root, parts, _CLASSES, preprocessing, WIDTH)
            profile = write_profile(directory, record, world, rows, seed=self._seed)
            drawn = world.draw(2 * IMAGES, generator)
            np.save(replies, drawn[~profile.detector().score(drawn).flags][:IMAGES])
        return directory, replies


def _banks(rows: int) -> str:
    return f"Banks: 3 of {rows:,} × {WIDTH}."


def message(datatype: str, raw: bytes) -> bytes:
    """A request with one image."""
    request = ModelInferRequest(model_name="classifier", id="1")
    request.inputs.add(name="image", datatype=datatype, shape=[1, 3, SIDE, SIDE])
    request.raw_input_contents.append(raw)
    return request.SerializeToString()


def _metric(line: Mapping[str, Any], prefix: str) -> float:
    """The sum of all series that start so; labels are in alphabetical order."""
    return sum(float(text.rpartition(" ")[2]) for text in scrape(str(line["metrics"]), (prefix,)))


def _scoring(line: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of scoring so far, and how often."""
    labels = '{model="classifier",stage="screening",version=""}'
    total, count = (_metric(line, f"guard_check_duration_seconds_{kind}{labels}") for kind in ("sum", "count"))
    return total, count


def _proxy_table(times: Mapping[str, Times], rates: Mapping[str, Times]) -> list[str]:
    direct, bare = times["direct"], times["bytes-only proxy"] - times["direct"]
    rows, verdicts = [], []
    for name, values in times.items():
        added, ratio = values - direct, "|"
        if name not in {"direct", "bytes-only proxy"}:
            estimate = Estimate.of(lambda r: float(np.median(added[r]) / np.median(bare[r])), len(bare))  # noqa: B023
            ratio = f"{estimate} |"
            if name in {"shadow", "tag", "block"}:
                verdicts.append(
                    f"- {name}: {estimate.value:.2f} × what the bytes-only proxy adds; at most {MAX_ADDED}: "
                    f"{_met(estimate.value <= MAX_ADDED)}"
                )
        rows.append(f"| {name} | {_quantiles(values)} | {np.median(added):.3f} | {ratio} {rates[name].mean():.0f} |")
    return [
        "| | p50 ms | p95 ms | added ms | × bytes-only proxy | requests/s |",
        "| --- " * 6 + "|",
        *rows,
        "",
        *verdicts,
        "",
    ]


def _breakdown(times: Mapping[str, Times], search: float) -> list[str]:
    """Where the time goes in `tag`: p50 of differences within rounds."""

    def step(name: str, before: str) -> float:
        return float(np.median(times[name] - times[before]))

    checked = step("tag", "tag, no screening")
    rows = {
        "a hop that moves bytes": step("bytes-only proxy", "direct"),
        "guard's own calls and routing": step("guard, unread", "bytes-only proxy"),
        "read the request, count": step("shadow, no screening", "guard, unread"),
        "read, annotate and write the reply; trailers": step("tag, no screening", "shadow, no screening"),
        "score (mean of the metric `guard_check_duration_seconds`)": search,
        "hand-over to a thread and back, monitor, metrics of the images": checked - search,
        "all": step("tag", "direct"),
    }
    return [
        "| tag: where the time goes | ms |",
        "| --- " * 2 + "|",
        *(f"| {n} | {v:.3f} |" for n, v in rows.items()),
        "",
    ]


_PATIENT = ("--timeout", "30")
"""Waiting in a queue of this benchmark must not end a check, which would make it cheap."""


def _asked(line: Mapping[str, Any]) -> float:
    """The share of the images that the reference model was asked about."""
    results = {
        result: _metric(line, f'guard_second_opinions_total{{model="classifier",result="{result}"')
        for result in ("agrees", "differs", "not_near")
    }
    return (results["agrees"] + results["differs"]) / max(1.0, sum(results.values()))


def _opinion_table(
    times: Mapping[str, Times], rates: Mapping[str, Times], base: str, asked: Mapping[str, float]
) -> list[str]:
    """Latency and throughput of each target, and their ratios to one of them within rounds."""
    rows = []
    for name, values in times.items():
        slower = Estimate.of(lambda r: float(np.median(values[r]) / np.median(times[base][r])), len(values))  # noqa: B023
        fewer = float(rates[name].sum() / rates[base].sum())
        share = f"{asked[name]:.0%}" if name in asked else "–"
        rows.append(f"| {name} | {share} | {_quantiles(values)} | {slower} | {rates[name].mean():.1f} | {fewer:.3f} |")
    return [
        f"| | asked | p50 ms | p95 ms | p50 / {base} | requests/s | / {base} |",
        "| --- " * 7 + "|",
        *rows,
        "",
    ]


def _start(arguments: tuple[str, ...]) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "guard", "serve", "--listen", "127.0.0.1:0", "--metrics", address, *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GUARD_")}
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            while not _ready(address):
                if process.poll() is not None or time.perf_counter() - started > START_SECONDS:
                    raise SystemExit("the sidecar did not become ready")
                time.sleep(POLL_SECONDS)
            return time.perf_counter() - started
        finally:
            process.terminate()


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _imported(profile: Path, model: Path) -> str:
    """Which packages of training a process has loaded that is as far as a sidecar before it opens its ports."""
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom guard.sidecar import Settings, serve\n"
        "import guard.sidecar.host.server\nfrom guard.sidecar.decisions.loading import load\n"
        "load(Settings(profile=Path(sys.argv[1]), model=Path(sys.argv[2])), embedded=True)\n"
        "print(json.dumps(sorted({'torch', 'open_clip', 'sklearn', 'matplotlib', 'onnxscript'} & set(sys.modules))))"
    )
    command = [sys.executable, "-c", program, str(profile), str(model)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return ", ".join(found) or "nothing, so no torch"


def _quantiles(times: Times) -> str:
    return f"{np.median(times):.3f} | {np.quantile(times, 0.95):.3f}"


def _met(holds: bool) -> str:  # noqa: FBT001 - a private helper of one argument
    return "met" if holds else "**missed**"


if __name__ == "__main__":
    main()
