"""What it costs to start more threads than a container may use, for the sidecar and for vetting.

python -m benchmarks.container_cpus [--cores N] [--machine N] [--rounds N] [--out DIR]

It needs root and control groups. The programs run in a group with a CPU quota. One starts as many threads as guard
chooses, another as many as the machine has processors: `--machine`, which may be more than this one has, to see what a
larger one would do. They take turns. The tower is open_clip's ViT-B-32 with random weights; for vetting, its forward
and backward passes stand.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks._record import RESULTS, heading
from benchmarks._synthetic import TOWER, image
from benchmarks._turns import Client, Estimate, Target, Times
from benchmarks.sidecar_cost import Run, message
from guard.demo.traffic import sidecar

OWN = "guard's choice"
SECONDS, CONCURRENCY, PASSES, BATCH, ROWS = 4.0, 4, 3, 8, 2000
_ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
_PROGRAM = """
import sys
sys.argv = ["guard", *sys.argv[1:]]
from guard.cli import beginning
import time
import open_clip, torch
if len(sys.argv) > 1:
    torch.set_num_threads(int(sys.argv[1]))
tower = open_clip.create_model({tower!r}).visual
images = torch.rand({batch}, 3, 224, 224, requires_grad=True)
tower(images).sum().backward()
started = time.perf_counter()
for _ in range({passes}):
    tower(images).sum().backward()
print(torch.get_num_threads(), {passes} * {batch} / (time.perf_counter() - started))
"""


@contextmanager
def limited(cores: float) -> Iterator[None]:
    """This process, and those that it starts, in a control group with a quota."""
    root = next((each for each in _ROOTS if (each / "cgroup.procs").exists()), None)
    if root is None:
        raise SystemExit("no control groups are mounted here")
    group = root / f"guard-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text(str(round(cores * 100_000)))
        else:
            (group / "cpu.max").write_text(f"{round(cores * 100_000)} 100000")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(pid)
        group.rmdir()


def passes(threads: str) -> tuple[int, float]:
    """Threads that were used, and images per second forward and backward.

    Args:
        threads: Their number; "" for what guard chooses.
    """
    program = _PROGRAM.format(tower=TOWER, batch=BATCH, passes=PASSES)
    command = [sys.executable, "-c", program, *([threads] if threads else [])]
    count, rate = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(count), float(rate)


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=float, default=1.0, help="quota of the control group")
    parser.add_argument("--machine", type=int, default=max(16, os.cpu_count() or 1), help="processors of the machine")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    choices = {OWN: "", "all of the machine": str(options.machine)}
    passed: dict[str, list[float]] = {choice: [] for choice in choices}
    threads: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        profile, model = Run(Path(name), 0, SECONDS, options.seed).embedded_files(ROWS)
        targets = {}
        with limited(options.cores):
            for _ in range(options.rounds):
                for choice, number in choices.items():
                    threads[choice], rate = passes(number)
                    passed[choice].append(rate)
            for choice, number in choices.items():
                more = ("--threads", number) if number else ()
                line = stack.enter_context(sidecar("--profile", str(profile), "--model", str(model), *more))
                targets[choice] = Target(line["listen"])
        messages = [message("FP32", image(row).tobytes()) for row in range(8)]
        rates = Client(targets, messages, seed=options.seed).throughput(options.rounds, SECONDS, CONCURRENCY)
    backward = {choice: np.array(values) for choice, values in passed.items()}
    lines = [
        f"Quota: {options.cores:g} processors. {options.rounds} rounds in turns, seed {options.seed}.",
        "",
        "| | threads | images or requests per second | guard's choice against it (95 % interval) |",
        "| --- | --- | --- | --- |",
        *_rows("forward and backward passes", backward, threads),
        *_rows("sidecar, embedded", rates, threads),
    ]
    command = f"python -m benchmarks.container_cpus --cores {options.cores:g} --machine {options.machine}"
    text = heading("More threads than a container may use", f"{command} --rounds {options.rounds}")
    (options.out / "container-cpus.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def _rows(what: str, found: Mapping[str, Times], threads: Mapping[str, int]) -> Iterator[str]:
    own = found[OWN]
    for choice, values in found.items():
        ratio = Estimate.of(partial(_ratio, own, values), len(values))
        yield f"| {what}, {choice} | {threads[choice]} | {np.mean(values):.2f} | {ratio} |"


def _ratio(own: Times, other: Times, rows: NDArray[np.int64]) -> float:
    return float(own[rows].sum() / other[rows].sum())


if __name__ == "__main__":
    main()
