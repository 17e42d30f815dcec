"""The scan beside the released code of Huang et al. (ICLR 2025), against a roofline, and at growing sizes.

python -m benchmarks.scan.speed released --code DIR [--embeddings FILE]   scores and seconds, beside the authors' code
python -m benchmarks.scan.speed roofline                                  distances against a product of matrices
python -m benchmarks.scan.speed growth --scratch DIR                      seconds and memory of whole scans

DIR is a checkout of HanxunH/Detect-CLIP-Backdoor-Samples. FILE has `image` and `text`, as `benchmarks.scan.training`
writes it; by default embeddings are drawn. Results go to `benchmarks/results/scan-*.md`.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks._record import RESULTS, heading
from guard._plots import BLUE, plain, svg
from guard.scan.nearest import _BLOCK, _QUERIES, Reference
from guard.scan.scores import ALL, Sampled, released

K, WIDTH, SEED = 16, 512, 0
GROWTH = (100_000, 300_000, 1_000_000)
DOCS = Path(__file__).parents[2] / "docs" / "images"
_EXACT = "donot_use_mm_for_euclid_dist"
"""How the released code measures distances when it scans."""
_COLUMNS = ("batch", "score", "released, µs", "ours, µs", "ratio", "default of guard scan, µs", "ratio")
_PARITY = ("batch", "score", "ours and released", "released and itself in float64", "ours and that in float64",
           "largest of the first", "of the second", "of the third")  # fmt: skip
_ABOUT_RELEASED = """\
Times are medians of turns, of processor time, for one pair. The reference of a batch is its images and captions; the
published scan has batches of 512 on each of 4 GPUs, with a common reference of 2,048 images and captions, which one
process has with a batch of 2,048 (and there each GPU measures all distances within the reference, so that the released
code is slower still). `all four` is the sum for the released code, which computes one score in each pass, and one pass
for ours. The default of `guard scan` compares with 8 samples of 256 images instead of a batch: another reference, and
other scores.
"""
_ABOUT_PARITY = """
Share of pairs whose scores agree within 1e-5, relative to the larger of 1 and the score, and the largest difference.
Where the k-th and the next neighbour are equally far but for rounding, either may be taken, and a score then differs by
more than rounding; the released code does so from itself in float64.
"""
_DETECTORS = {"k-distance": "KDistanceDetector", "slof": "SLOFDetector", "lid": "LIDDetector", "dao": "DAODetector"}


def beside_released(code: Path, file: Path | None) -> str:
    """Scores and seconds of both, in turns, on the same embeddings and k."""
    sys.path.insert(0, str(code))
    theirs: Any = import_module("backdoor_sample_detector")
    if file is None:
        generator = np.random.default_rng(SEED)
        image, text = (generator.standard_normal((8192, WIDTH)).astype(np.float32) for _ in range(2))
    else:
        stored = np.load(file)
        image, text = stored["image"][:8192], stored["text"][:8192]
    model = SimpleNamespace(encode_image=torch.from_numpy, encode_text=torch.from_numpy)
    detectors = {name: getattr(theirs, each)(k=K, compute_mode=_EXACT) for name, each in _DETECTORS.items()}
    sampled = Sampled([image], 256, 8, K, seed=SEED, device=torch.device("cpu"))
    times = ["| " + " | ".join(_COLUMNS) + " |", "| --- " * len(_COLUMNS) + "|"]
    parity = ["| " + " | ".join(_PARITY) + " |", "| --- " * len(_PARITY) + "|"]

    def by_them(name: str, part: Any, captions: Any) -> Any:  # noqa: ANN401
        with torch.no_grad():
            return detectors[name](model, part, captions).numpy()

    for batch, turns in ((512, 5), (2048, 1)):
        part, captions = image[:batch], text[:batch]
        in_all = np.zeros(3)
        for name in ALL:
            ours = released(part, captions, K, (name,))[name]
            single = by_them(name, part, captions)
            double = by_them(name, part.astype(np.float64), captions.astype(np.float64))
            apart = [_apart(ours, single), _apart(single, double), _apart(ours, double)]
            shares = [f"{np.mean(each <= 1e-5):.1%}" for each in apart] + [f"{each.max():.1e}" for each in apart]
            parity.append(f"| {batch} | {name} | " + " | ".join(shares) + " |")
            seconds = _turns(
                [
                    partial(by_them, name, part, captions),
                    partial(released, part, captions, K, (name,)),
                    partial(sampled.scores, part, 0, (name,)),
                ],
                turns,
            )
            in_all[0] += seconds[0]
            times.append(_row(batch, name, seconds))
        in_all[1:] = _turns([partial(released, part, captions, K), partial(sampled.scores, part, 0)], turns)
        times.append(_row(batch, "all four", in_all.tolist()))
    source = "drawn" if file is None else "of a trained CLIP"
    return "\n".join(
        [
            f"{len(image)} pairs of {image.shape[1]} numbers ({source}), k = {K}, {torch.get_num_threads()} thread(s).",
            _ABOUT_RELEASED,
            *times,
            _ABOUT_PARITY,
            *parity,
        ]
    )


def _row(batch: int, name: str, seconds: Sequence[float]) -> str:
    one, two, three = (1e6 * value / batch for value in seconds)
    return f"| {batch} | {name} | {one:.0f} | {two:.1f} | {one / two:.1f} | {three:.1f} | {one / three:.1f} |"


def _apart(one: Any, two: Any) -> Any:  # noqa: ANN401
    """Difference relative to the larger of 1 and the score."""
    return np.abs(one - two) / np.maximum(1, np.abs(two))


def roofline() -> str:
    """The rate of the search, as a share of that of the product alone."""
    generator = torch.Generator().manual_seed(SEED)
    queries = torch.randn(_QUERIES, WIDTH, generator=generator)
    block = torch.randn(_BLOCK, WIDTH, generator=generator)
    lines = [
        f"{_QUERIES} queries, {WIDTH} numbers, k = {K}, {torch.get_num_threads()} thread(s); medians of turns.",
        f"The roofline is the product of the same queries with blocks of {_BLOCK} rows, without anything else.\n",
        "| rows | roofline, GFLOP/s | search, GFLOP/s | share |",
        "| --- | --- | --- | --- |",
    ]
    for count, turns in ((100_000, 5), (1_000_000, 3)):
        bank = np.random.default_rng(SEED).standard_normal((count, WIDTH), np.float32)
        reference = Reference([bank])
        times = -(-count // _BLOCK)

        def product(times: int = times) -> None:
            for _ in range(times):
                queries @ block.T

        asked = queries.numpy()
        seconds = _turns([product, partial(reference.search, asked, K)], turns)
        rates = (2 * _QUERIES * times * _BLOCK * WIDTH / seconds[0], 2 * _QUERIES * count * WIDTH / seconds[1])
        lines.append(f"| {count} | {rates[0] / 1e9:.1f} | {rates[1] / 1e9:.1f} | {rates[1] / rates[0]:.0%} |")
    return "\n".join(lines)


_ONE = """
import json, sys, threading, time
from pathlib import Path
from guard.scan import ScanSettings, scan
peak = 0
def watch():
    global peak
    while True:
        for line in open('/proc/self/status'):
            if line.startswith('RssAnon'):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
scan(Path(sys.argv[1]), Path(sys.argv[2]), settings=ScanSettings(share=0.01, most=2000))
summary = json.loads((Path(sys.argv[2]) / 'summary.json').read_text())
print(json.dumps({'peak': peak, 'scoring': summary['scoring_seconds']}))
"""


def growth(scratch: Path) -> str:
    """Whole scans of drawn embeddings, each in a process of its own; draws the curve too."""
    lines = [
        f"Embeddings of {WIDTH} numbers, drawn; 2,000 candidates; {torch.get_num_threads()} thread(s).",
        "Memory is the largest anonymous memory of the process, which leaves out mapped files. Processor time is",
        "that of the whole process, from its start to its end.\n",
        "| pairs | seconds of the clock | of the processor | of these scoring, by the clock | memory, MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    points = []
    for count in GROWTH:
        folder = scratch / str(count)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "drawn.npy"
        mapped = np.lib.format.open_memmap(file, "w+", np.float32, (count, WIDTH))
        generator = np.random.default_rng(SEED)
        for start in range(0, count, 50_000):
            mapped[start : start + 50_000] = generator.standard_normal((min(50_000, count - start), WIDTH), np.float32)
        del mapped
        started, before = time.monotonic(), _children()
        done = subprocess.run(
            [sys.executable, "-c", _ONE, str(file), str(folder / "out")], capture_output=True, text=True, check=True
        )
        seconds, processor, found = time.monotonic() - started, _children() - before, json.loads(done.stdout)
        shutil.rmtree(folder)
        points.append((count, processor, found["peak"] / 1024))
        lines.append(
            f"| {count:,} | {seconds:.0f} | {processor:.0f} | {found['scoring']:.0f} | {found['peak'] / 1024:.0f} |"
        )
        sys.stderr.write(lines[-1] + "\n")
    (DOCS / "scan-growth.svg").write_text(_curve(points), encoding="utf-8")
    return "\n".join(lines) + "\n\n![processor time and memory against pairs](../../docs/images/scan-growth.svg)"


def _children() -> float:
    """Processor time of the processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _curve(points: Sequence[tuple[int, float, float]]) -> str:
    figure = Figure(figsize=(7, 3), layout="constrained")
    pairs = [point[0] for point in points]
    for axis, values, label in zip(
        figure.subplots(1, 2), list(zip(*points, strict=True))[1:], ("processor time, s", "memory, MiB"), strict=True
    ):
        axis.loglog(pairs, values, "o-", color=BLUE)
        axis.set_xlabel("pairs")
        axis.set_ylabel(label)
        plain(axis)
    return svg(figure, "growth of a scan")


def _turns(functions: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """Median seconds of each, measured by turns, after one turn that does not count."""
    found: list[list[float]] = [[] for _ in functions]
    for turn in range(turns + 1):
        for function, seconds in zip(functions, found, strict=True):
            # Time of this process: others on the machine do not count.
            started = time.process_time()
            function()
            if turn:
                seconds.append(time.process_time() - started)
    return [statistics.median(seconds) for seconds in found]


def main() -> None:
    """Measure one part and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["released", "roofline", "growth"])
    parser.add_argument("--code", type=Path)
    parser.add_argument("--embeddings", type=Path)
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "released":
        text = beside_released(arguments.code, arguments.embeddings)
    else:
        text = roofline() if arguments.part == "roofline" else growth(arguments.scratch)
    name = arguments.part + ("-trained" if arguments.embeddings else "")
    title = {"released": "The scan beside the released code", "roofline": "Distances against a roofline",
             "growth": "Scans at growing sizes"}[arguments.part]  # fmt: skip
    command = f"python -m benchmarks.scan.speed {arguments.part}"
    (RESULTS / f"scan-{name}.md").write_text(heading(title, command) + text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
