"""Run `guard demo` for several seeds, each with models of its own, and record what it measured.

python -m benchmarks.demo --seeds 0 1 2 3 4
python -m benchmarks.demo --seeds 0 --images DIR --data "CIFAR-10, train"
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, heading
from guard.evaluation.statistics import Rate


def run(seed: int, images: Path | None, out: Path) -> dict[str, Any]:
    """One demo, as a user runs it; its result whether or not it kept its promises."""
    command = [sys.executable, "-m", "guard", "demo", "--seed", str(seed), "--out", str(out), "--json"]
    if images:
        command += ["--images", str(images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in {0, 1}:
        raise SystemExit(f"the demo of seed {seed} ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


COLUMNS = (
    "seed",
    "accuracy base / backdoored / twin",
    "attack success base / backdoored / twin",
    "verdict on backdoored",
    "verdict on twin",
    "triggered flagged",
    "clean flagged",
    "p50 / p99 ms with screening",
    "without",
    "seconds",
)


def _three(values: dict[str, float]) -> str:
    return " / ".join(f"{values[name]:.3f}" for name in ("base", "backdoored", "clean-twin"))


def table(results: list[dict[str, Any]]) -> str:
    """One row per seed, and the totals."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for item in results:
        detected, alarms = item["detected"], item["false_alarms"]
        lines.append(
            f"| {item['seed']} "
            f"| {_three(item['accuracy'])} "
            f"| {_three(item['attack_success'])} "
            f"| {item['verdicts']['backdoored']}, {item['targets']['backdoored']} | {item['verdicts']['clean-twin']} "
            f"| {detected['count']}/{detected['total']} | {alarms['count']}/{alarms['total']} "
            f"| {' / '.join(f'{value:.2f}' for value in item['latency']['with screening'])} "
            f"| {' / '.join(f'{value:.2f}' for value in item['latency']['without'])} "
            f"| {sum(item['seconds'].values()):.0f} |"
        )
    right = sum(
        i["verdicts"]["backdoored"] == "backdoored" and i["targets"]["backdoored"] == i["true_target"] for i in results
    )
    accused = sum(i["verdicts"]["clean-twin"] == "backdoored" for i in results)
    lines += [
        "",
        f"- backdoored models called backdoored with the right class: {Rate.of(right, len(results))}",
        f"- clean twins called backdoored: {Rate.of(accused, len(results))}",
    ]
    for key, what in (("detected", "triggered"), ("false_alarms", "clean")):
        total = Rate.of(sum(i[key]["count"] for i in results), sum(i[key]["total"] for i in results))
        lines.append(f"- {what} requests flagged at α = {results[0]['alpha']:g}, all seeds: {total}")
    for item in results:
        lines += [f"- seed {item['seed']}: {failure}" for failure in item["failures"]]
    lines.append("")
    lines += [f"- time of seed {item['seed']} by part, s: {item['seconds']}" for item in results]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--data", default="scikit-learn digits", help="what the images are, for the record")
    parser.add_argument("--name", default="demo-digits", help="of the result file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [run(seed, arguments.images, Path(folder) / str(seed)) for seed in arguments.seeds]
    command = f"python -m benchmarks.demo --seeds {' '.join(map(str, arguments.seeds))}"
    text = heading(f"The demo on {arguments.data}, {len(results)} seed(s)", command) + table(results)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
