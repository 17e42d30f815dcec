"""What scans and vettings would cost that no single machine can do, from unit costs that were measured here.

python -m benchmarks.scan.scaling --images DIR --evaluation DIR

Measured are, on one core: decoding and resizing a JPEG file of the first folder, scoring a pair (512 numbers), and
reading stored embeddings back; how far the durations of vettings spread is taken from the second, where
`guard evaluate` left its results. Everything else is an assumption, and stands in `ASSUMED`. From these, shards and
models are given to machines one after the other, as an engine does. Writes `benchmarks/results/scan-scaling.md` and
`docs/images/scan-cost.svg`.
"""

import argparse
import heapq
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks._record import RESULTS, heading
from guard._plots import BLUE, GREY, RED, plain, svg
from guard.classifiers import ImageFolder, Preprocessing, decode
from guard.scan.results import ScanSettings
from guard.scan.scores import Sampled

WIDTH = 512
SIZES = {"CC3M": 3_000_000, "LAION-400M": 400_000_000, "LAION-5B": 5_000_000_000}


@dataclass(frozen=True)
class Assumed:
    """What was not measured.

    Attributes:
        embedding: Arithmetic of one pair in a ViT-B/16 and its text tower, in operations.
        gpu: Operations that one GPU does in a second, of its peak in bfloat16 what such models reach.
        image: Bytes of an encoded image of 256 px with its caption.
        network: Bytes that one machine reads in a second from shared storage.
        storage: Bytes that shared storage delivers to all machines together in a second.
        cores: Cores of a machine.
        gpus: GPUs of a machine.
        euros: Price of a machine for an hour, with its GPUs; a made-up round number.
        shard: Pairs in a shard.
        memory: Bytes of the process that looks for groups, for each pair; an estimate from the arrays that it
            holds, not a measurement.
        passes: Image passes of vetting a ViT-B/32 with 1,000 classes against its base (`real-sizes.md`).
        operations: Arithmetic of one of these passes, forwards and back.
        vetting: Hours of one core of the same (`real-sizes.md`).
        checkpoint: Bytes of a suspect and its base.
    """

    embedding: float = 41e9
    gpu: float = 120e12
    image: float = 20e3
    network: float = 1.5e9
    storage: float = 20e9
    cores: int = 32
    gpus: int = 4
    euros: float = 10.0
    shard: int = 10_000
    memory: float = 100.0
    passes: int = 193_000
    operations: float = 26e9
    vetting: float = 11.4
    checkpoint: float = 1.2e9


ASSUMED = Assumed()
_COLUMNS = ("set", "machines", "read images, h", "decode, h", "embed, h", "score, h", "read embeddings, h", "in all, h",
            "simulated, h", "saturates", "euros", "embeddings, TB", "memory of the last step, GB")  # fmt: skip
_MODELS, _SPREAD_OF_SHARDS = 1000, 0.2


@dataclass(frozen=True)
class Units:
    """Seconds of one core for one pair.

    Attributes:
        decoding: Decoding and resizing one image.
        scoring: Scoring one pair against the samples.
        reading: Reading the stored embeddings of one pair.
    """

    decoding: float
    scoring: float
    reading: float


def measured(images: Path) -> Units:
    """Measure the unit costs, as medians of five turns of processor time."""
    files = ImageFolder.scan(images).sample(64, seed=0).files
    encoded = [file.read_bytes() for file in files]
    preprocessing = Preprocessing(224, (0.5,) * 3, (0.25,) * 3)
    bank = np.random.default_rng(0).standard_normal((8192, WIDTH), np.float32)
    settings = ScanSettings()
    sampled = Sampled([bank], settings.sample, settings.draws, settings.k, seed=0, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bank.npy"
        np.save(file, bank)
        return Units(
            _seconds(lambda: [preprocessing.pixels(decode(data)) for data in encoded]) / len(encoded),
            _seconds(lambda: sampled.scores(bank, 0, (settings.method,))) / len(bank),
            _seconds(lambda: np.load(file, mmap_mode="r").sum()) / len(bank),
        )


def _seconds(function: Callable[[], object]) -> float:
    function()
    found = []
    for _ in range(5):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return statistics.median(found)


def stages(pairs: int, machines: int, units: Units, assumed: Assumed = ASSUMED) -> dict[str, float]:
    """Hours of each stage if nothing else limited it. Decoding, embedding and reading images overlap."""
    cores, gpus = machines * assumed.cores, machines * assumed.gpus
    bandwidth = min(machines * assumed.network, assumed.storage)
    hours = {
        "read images": pairs * assumed.image / bandwidth,
        "decode": pairs * units.decoding / cores,
        "embed": pairs * assumed.embedding / (gpus * assumed.gpu),
        "score": pairs * (units.scoring + units.reading) / cores,
        "read embeddings": pairs * 2 * 4 * WIDTH / bandwidth,
    }
    return {name: seconds / 3600 for name, seconds in hours.items()}


def total(hours: dict[str, float]) -> float:
    """Hours of a scan: the slowest of what overlaps in each of the two stages."""
    first = max(hours[name] for name in ("read images", "decode", "embed"))
    return first + max(hours["score"], hours["read embeddings"])


def simulated(pairs: int, machines: int, units: Units, seed: int = 0) -> float:
    """Hours of a scan whose shards take 20 % more or less at random, each of which one machine works on."""
    generator = np.random.default_rng(seed)
    hours = stages(pairs, machines, units)
    count = -(-pairs // ASSUMED.shard)
    both = (
        max(hours[name] for name in ("read images", "decode", "embed")),
        max(hours["score"], hours["read embeddings"]),
    )
    return sum(
        makespan(generator.lognormal(-(_SPREAD_OF_SHARDS**2) / 2, _SPREAD_OF_SHARDS, count) * part * machines / count,
                 machines)
        for part in both
    )  # fmt: skip


def makespan(durations: NDArray[np.float64], workers: int) -> float:
    """When the last of some tasks ends, if each worker takes the next one as soon as it is free."""
    free = [0.0] * min(workers, len(durations))
    for duration in durations.tolist():
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def spread(folder: Path) -> NDArray[np.float64]:
    """Durations of vettings without a base, in units of their mean."""
    found = [json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in folder.glob("*/vetting-derived.json")]
    ratios: NDArray[np.float64] = np.array(found) / np.mean(found)
    return ratios


def vettings(ratios: NDArray[np.float64], seed: int = 0) -> list[str]:
    """Rows: a thousand models, on cores and on GPUs; their one base comes first, alone."""
    each = np.random.default_rng(seed).choice(ratios, _MODELS)
    on_gpu = ASSUMED.passes * ASSUMED.operations / ASSUMED.gpu / 3600
    rows = []
    for name, hours, width in (("core", ASSUMED.vetting, ASSUMED.cores), ("GPU", on_gpu, ASSUMED.gpus)):
        for machines in (1, 8, 64):
            workers = machines * width
            computing = hours * (ratios.mean() + makespan(each, workers))
            reading = _MODELS * ASSUMED.checkpoint / min(machines * ASSUMED.network, ASSUMED.storage) / 3600
            busy = hours * each.sum() / workers / computing
            slowest = "reading checkpoints" if reading > computing else f"{name}s" if busy > 0.5 else "too few models"
            times = f"{hours:.3f} | {computing:.2f} | {reading:.2f}"
            rows.append(f"| {name} | {machines} | {workers} | {times} | {busy:.0%} | {slowest} |")
    return rows


def report(units: Units, ratios: NDArray[np.float64]) -> str:
    """The tables."""
    lines = [
        f"Measured on one core: decoding {1000 * units.decoding:.2f} ms, scoring {1e6 * units.scoring:.1f} µs,",
        f"reading embeddings {1e6 * units.reading:.2f} µs a pair. Durations of {len(ratios)} vettings lie between",
        f"{ratios.min():.2f} and {ratios.max():.2f} times their mean.\n",
        f"Assumed: `{ASSUMED}`\n",
        "## Scans\n",
        "| " + " | ".join(_COLUMNS) + " |",
        "| --- " * len(_COLUMNS) + "|",
    ]
    for name, pairs in SIZES.items():
        for machines in (1, 8, 64):
            hours = stages(pairs, machines, units)
            slowest = max(hours, key=lambda stage: hours[stage])
            lines.append(
                f"| {name} | {machines} | " + " | ".join(f"{value:.2f}" for value in hours.values())
                + f" | {total(hours):.2f} | {simulated(pairs, machines, units):.2f} | {slowest} | "
                f"{total(hours) * machines * ASSUMED.euros:.0f} | {pairs * 2 * 4 * WIDTH / 1e12:.2f} | "
                f"{pairs * ASSUMED.memory / 1e9:.1f} |"
            )  # fmt: skip
    lines += [
        "",
        "*In all* is the slowest of what overlaps, in each of the two stages; *simulated* gives shards to machines one",
        "by one. Groups among the candidates come on top: minutes of one core, whatever the set.\n",
        "The stage with the largest figure of a row limits it: with fewer cores to a GPU decoding,",
        f"from {int(ASSUMED.storage / ASSUMED.network) + 1} machines on whatever shared storage delivers.\n",
        f"## {_MODELS:,} models (ViT-B/32, 1,000 classes, a common base)\n",
        "| on a | machines | tasks at once | one, h | all, h | reading checkpoints, h | busy | limited by |",
        "| --- " * 8 + "|",
        *vettings(ratios),
        "",
        "Hours of one on a core are measured, those on a GPU assumed: arithmetic at the assumed rate.",
    ]
    return "\n".join(lines)


def plot(units: Units) -> str:
    """Hours against pairs, for one machine and for 64, and for the exact search of the whole set on one machine."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    pairs = np.logspace(5, 10, 40)
    for machines, colour in ((1, BLUE), (64, RED)):
        axis.loglog(pairs, [total(stages(int(n), machines, units)) for n in pairs], color=colour,
                    label=f"{machines} machine{'s' if machines > 1 else ''}")  # fmt: skip
    exact = 2 * WIDTH * pairs**2 / (ASSUMED.gpus * ASSUMED.gpu / 4) / 3600
    axis.loglog(pairs, exact, color=GREY, linestyle="--", label="exact neighbours in the whole set, 1 machine, float32")
    axis.set_ylim(1e-3, 1e5)
    axis.set_xlabel("pairs")
    axis.set_ylabel("hours")
    axis.legend(frameon=False, fontsize=8)
    plain(axis)
    return svg(figure, "cost of a scan")


def main() -> None:
    """Measure, compute, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    arguments = parser.parse_args()
    units, ratios = measured(arguments.images), spread(arguments.evaluation)
    command = "python -m benchmarks.scan.scaling --images DIR --evaluation DIR"
    text = heading("Scans and vettings beyond one machine", command) + report(units, ratios)
    (RESULTS / "scan-scaling.md").write_text(text + "\n", encoding="utf-8")
    (RESULTS.parents[1] / "docs" / "images" / "scan-cost.svg").write_text(plot(units), encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
