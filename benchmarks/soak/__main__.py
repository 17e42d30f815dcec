"""Hours of a sidecar in minutes: a mixture of good and bad requests, and restarts under load.

python -m benchmarks.soak --seconds 600 --restarts 100

Everything runs on the loopback interface: a real `guard serve` before a server of guard.testing in a process of its
own, which embeds with one matrix. Each message has a number of its own, which that server writes down and echoes.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks._record import RESULTS, heading
from benchmarks.soak.checks import Part
from benchmarks.soak.mixture import soak
from benchmarks.soak.restarts import restarts
from benchmarks.soak.stage import Stage
from guard._files import replace_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and record; 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="how long the mixture is sent")
    parser.add_argument("--restarts", type=int, default=100, help="how many processes are restarted")
    parser.add_argument("--clients", type=int, default=8, help="how many send, one call at a time each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.md", help="the result file")
    given = parser.parse_args(arguments)
    if given.seconds < 1 or given.restarts < 0 or given.clients < 1 or given.seed < 0:
        parser.error("--seconds and --clients are at least 1, --restarts and --seed at least 0")
    command = f"python -m benchmarks.soak --seconds {given.seconds:g} --restarts {given.restarts}"
    text = heading("Soak and restarts", f"{command} --clients {given.clients} --seed {given.seed}")
    parts = {
        "Mixture": _run(given, soak, seconds=given.seconds),
        "Restarts": _run(given, restarts, cycles=given.restarts),
    }
    text += "\n".join(f"## {title}\n\n{part.text}" for title, part in parts.items())
    replace_file(given.out, text.encode())
    return int(not all(check.holds for part in parts.values() for check in part.checks))


def _run(given: argparse.Namespace, run: Callable[..., Part], **more: float) -> Part:
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), given.seed)
        try:
            return run(stage, itertools.count(1), clients=given.clients, seed=given.seed, **more)
        finally:
            stage.close()


if __name__ == "__main__":
    raise SystemExit(main())
