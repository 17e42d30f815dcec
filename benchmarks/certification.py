"""What certificates cost: hashing against the machine's plain SHA-256, and verifying.

python -m benchmarks.certification --demo FOLDER [--bytes 1000000000] [--rounds 5]

FOLDER is one that `guard demo --out` wrote. Hashing and the plain loop take turns; the ratio of their medians counts.
"""

import argparse
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._record import RESULTS, heading
from guard.certificates import CERTIFICATE_FILE, Policy, files_of_model, files_of_profile, verify
from guard.certificates.subjects import hash_files

_CHUNK = 2**18


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    lines = ["| what | median | |", "| --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        with path.open("wb") as file:
            for _ in range(given.bytes // _CHUNK):
                file.write(os.urandom(_CHUNK))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        plain, ours = in_turns(given.rounds, lambda: _plain(path), lambda: hash_files(path.parent, "m", [path.name]))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        size = path.stat().st_size / 1e9
        lines.append(f"| plain SHA-256 of {size:.1f} GB | {plain:.2f} s | {size / plain:.2f} GB/s |")
        lines.append(f"| hashing for a certificate | {ours:.2f} s | {plain / ours:.2f} × the plain throughput |")
        lines.append(f"| growth of the peak memory meanwhile | {grown / 1024:.1f} MiB | |")
    demo: Path = given.demo
    profile, model = demo / "profiles" / "clean-twin", demo / "models" / "clean-twin"
    files = files_of_model(model) | files_of_profile(profile)
    policy = Policy.trusting([demo / "demo.pub"])

    def check() -> None:
        found = files_of_model(model) | files_of_profile(profile)
        verify(profile / CERTIFICATE_FILE, found, [policy], "model").demand()

    check()
    guard = [sys.executable, "-m", "guard"]
    asked = [*guard, "verify", str(model), "--profile", str(profile), "--trust", str(demo / "demo.pub")]
    inside, program, empty = in_turns(
        given.rounds, check, lambda: _run(asked), lambda: _run([*guard, "verify", "--help"])
    )
    mebibytes = sum((demo / "models" / "clean-twin" / name.partition("/")[2]).stat().st_size
                    for name in files if name.startswith("model/")) / 2**20  # fmt: skip
    lines.append(f"| verifying the demo's model ({mebibytes:.1f} MiB), in Python | {1000 * inside:.1f} ms | |")
    lines.append(f"| `guard verify` of it | {program:.2f} s | `--help` alone: {empty:.2f} s |")
    text = heading(
        "What certificates cost", f"python -m benchmarks.certification --demo FOLDER --rounds {given.rounds}"
    )
    (RESULTS / "certification.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def in_turns(rounds: int, *actions: Callable[[], object]) -> list[float]:
    """Median seconds of each action, run in turns."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, taken in zip(actions, seconds, strict=True):
            began = time.perf_counter()
            action()
            taken.append(time.perf_counter() - began)
    return [statistics.median(each) for each in seconds]


def _plain(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
