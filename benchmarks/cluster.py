"""Many models vetted, and a set scanned, on a Ray cluster of two nodes, one of which is killed in the middle.

python -m benchmarks.cluster

Models and images are tiny and untrained: what is measured is the engine. Writes `benchmarks/results/cluster.md`.
"""

import argparse
import hashlib
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks._record import RESULTS, heading
from guard.classifiers import save
from guard.distributed import Engine, Processes
from guard.evaluation import EvaluationSettings, Zoo, evaluate
from guard.scan import ScanSettings
from guard.scan.scanning import scan
from tests.cluster import Cluster, Killing, large_zoo
from tests.conftest import CLASSES, CONFIG, random_images, tiny_model
from tests.unit.scan.conftest import add, png

MODELS, SHARDS, EMPTY = 21, 12, 200
SETTINGS = EvaluationSettings("quick", 64, (0.05,), 0, "cpu")
FILES = ("scores.parquet", "keep.txt", "report.html")
_ABOUT = f"""\
{MODELS} untrained models of 16 pixels, vetted with their base and the budget `quick`; a scan of {SHARDS} tar shards of
64 images; {EMPTY} tasks that do nothing. Every engine has two processors. Results are compared by the SHA-256 of all
results but durations, and of {", ".join(FILES)}. Seconds are of the clock, in one run, the engines one after the other.
Work is the sum of the durations that the tasks state.
"""


@dataclass(frozen=True)
class Row:
    """What one engine did.

    Attributes:
        engine: Its name.
        vetted: Number of models with a result.
        lost: Number without one.
        vetting: Seconds that vetting took.
        work: Seconds of work in it.
        vetting_digest: Digest of the results.
        scanning: Seconds that the scan took.
        scan_digest: Digest of its files.
        empty: Seconds that the empty tasks took.
    """

    engine: str
    vetted: int
    lost: int
    vetting: float
    work: float
    vetting_digest: str
    scanning: float
    scan_digest: str
    empty: float


@contextmanager
def _engine(name: str, after: int) -> Iterator[Engine]:
    if name == "processes":
        yield Processes(2)
        return
    cluster = Cluster()
    try:
        yield Killing(cluster, after) if "killed" in name else cluster.engine
    finally:
        cluster.close()


def one(name: str, zoo: Zoo, model: Path, shards: Path, out: Path) -> Row:
    """Everything with one engine, the node killed in each of vetting and scanning."""
    with _engine(name, MODELS // 3) as engine:
        started = time.monotonic()
        done = evaluate(zoo, out / "evaluation", methods=("vetting-base",), settings=SETTINGS, engine=engine)
        vetting = time.monotonic() - started
    stated = sorted((key, replace(result, seconds=0.0, threads=0)) for key, result in done.results.items())
    with _engine(name, SHARDS // 3) as engine:
        started = time.monotonic()
        scan(shards, out / "scan", model=str(model), settings=ScanSettings(k=4, sample=64), device="cpu", engine=engine)
        scanning = time.monotonic() - started
        started = time.monotonic()
        assert len(list(engine.map(nothing, range(EMPTY)))) == EMPTY  # noqa: S101
        empty = time.monotonic() - started
    return Row(
        name, len(stated), len(done.failures), vetting, sum(result.seconds for result in done.results.values()),
        _digest([str(stated).encode()]), scanning, _digest([(out / "scan" / file).read_bytes() for file in FILES]),
        empty,
    )  # fmt: skip


def nothing(item: int) -> int:
    """A task that does nothing, to see what a task costs."""
    return item


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def write_shards(folder: Path) -> None:
    """Tar shards of random images."""
    folder.mkdir()
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number:02}.tar", "w") as archive:
            for index, pixels in enumerate(random_images(64, seed=number).numpy()):
                add(archive, f"{index:03}.png", png(pixels))


def table(rows: Sequence[Row]) -> str:
    """One line for each engine."""
    columns = ("engine", "models vetted", "lost", "seconds", "work, s", "digest", "scan, s", "digest",
               f"{EMPTY} empty tasks, s")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += [
        f"| {row.engine} | {row.vetted} | {row.lost} | {row.vetting:.1f} | {row.work:.1f} | `{row.vetting_digest}` | "
        f"{row.scanning:.1f} | `{row.scan_digest}` | {row.empty:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every engine and write the result."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        zoo, model, shards = Zoo.read(large_zoo(root / "zoo", MODELS)), root / "model", root / "shards"
        save(model, tiny_model(), CONFIG, CLASSES)
        write_shards(shards)
        for name in ("processes", "ray, two nodes", "ray, one node killed"):
            rows.append(one(name, zoo, model, shards, root / name))
            sys.stderr.write(table(rows[-1:]))
    same = len({(row.vetting_digest, row.scan_digest) for row in rows}) == 1
    text = _ABOUT + "\n" + table(rows) + f"\nAll engines gave the same results: {'yes' if same else 'NO'}.\n"
    (RESULTS / "cluster.md").write_text(
        heading("Many models on a cluster", "python -m benchmarks.cluster") + text, encoding="utf-8"
    )
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
