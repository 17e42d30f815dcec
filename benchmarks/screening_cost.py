"""What a decision costs on one core, beside the products that it cannot do without.

python -m benchmarks.screening_cost

Embeddings are made: 1,000 classes in 512 dimensions, with variances that fall as 1 / rank (as those of image towers do,
roughly), and random directions as the worst case. The stamped bank is the clean one, drawn towards one point.
"""

import argparse
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import LocalOutlierFactor
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks._record import RESULTS, heading
from guard.baselines import DAO, LID, SLOF, DensityScore, KDistance
from guard.screening import neighbours
from guard.screening.neighbours import Nearest, Neighbours
from guard.screening.products import products

Floats = NDArray[np.float32]

DIMENSION, CLASSES = 512, 1000
BANKS = (10_000, 50_000)
BATCHES = (1, 32)
REQUESTS = 10_000
ALPHA = 0.01
K, WIDE = 16, 64
ROUNDS, CALLS = 9, {1: 40, 32: 4}


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--banks", type=int, nargs="+", default=BANKS)
    banks = parser.parse_args().banks
    with threadpool_limits(1):
        lines = _costs(banks) + _agreement(banks)
    text = heading("Cost of a decision, one core, seed 0", "python -m benchmarks.screening_cost")
    (RESULTS / "screening-cost.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class World:
    """Where embeddings come from: class centres and variances, or all directions alike."""

    flat: bool
    seed: int = 0

    def clean(self, count: int, *, seed: int) -> Floats:
        """Unit vectors, shape [count, DIMENSION]."""
        generator = np.random.default_rng([self.seed, seed])
        if self.flat:
            return _unit(generator.normal(size=(count, DIMENSION)))
        common = np.random.default_rng([self.seed, 0])
        spread = np.arange(1, DIMENSION + 1) ** -0.5
        rotation, _ = np.linalg.qr(common.normal(size=(DIMENSION, DIMENSION)))
        centres = common.normal(size=(CLASSES, DIMENSION)) * spread
        offset = common.normal(size=DIMENSION) * np.linalg.norm(spread) / np.sqrt(DIMENSION)
        values = centres[generator.integers(0, CLASSES, count)] + generator.normal(size=(count, DIMENSION)) * spread
        return _unit(values @ rotation.T + offset)


def _unit(values: NDArray[np.float64]) -> Floats:
    unit: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _stamp(embeddings: Floats) -> Floats:
    target = _unit(np.random.default_rng(7).normal(size=(1, DIMENSION)))
    return _unit((0.5 * embeddings + 0.8 * target).astype(np.float64))


class Decision:
    """All scores of a request: four from one search in the clean bank, and the match to the stamped bank."""

    def __init__(self, clean: Floats, stamped: Floats, within: Nearest, *, in_full: bool = False) -> None:
        # As on a machine whose products of 8-bit codes are not exact.
        least = sys.maxsize if in_full else neighbours._QUANTISED_BYTES  # noqa: SLF001 - switched off here only
        with patch.object(neighbours, "_QUANTISED_BYTES", least):
            self.reference, self.stamped = Neighbours(clean), Neighbours(stamped)
        scores: tuple[DensityScore, ...] = (KDistance(K), SLOF(K), LID(WIDE), DAO(K))
        self.scores = [score.fit(self.reference, within=within) for score in scores]

    def __call__(self, requests: Floats) -> dict[str, Floats]:
        """Each score by name."""
        nearest = self.reference.search(requests, WIDE)
        found = {type(score).__name__: score.score(nearest) for score in self.scores}
        found["match"] = np.log(
            (found["KDistance"] + 1e-3) / (self.stamped.search(requests, K).distances[:, -1] + 1e-3)
        )
        return found


def _costs(sizes: tuple[int, ...]) -> list[str]:
    rows, ratios, notes = [], [], []
    world = World(flat=False)
    for size in sizes:
        clean = world.clean(size, seed=1)
        stamped, within = _stamp(clean), Neighbours(clean).within(K)
        in_full, more = _grown(lambda: Decision(clean, stamped, within, in_full=True))  # noqa: B023  # called at once
        exact, grown = _grown(lambda: Decision(clean, stamped, within))  # noqa: B023
        both = clean.nbytes + stamped.nbytes
        notes.append(f"{size:,}: {1 + grown / both:.2f}, in full {1 + more / both:.2f}")
        flat = import_module("faiss").IndexFlatIP(DIMENSION)
        flat.add(clean)
        outliers = LocalOutlierFactor(n_neighbors=K, novelty=True, algorithm="brute").fit(clean)
        slof = exact.scores[1]
        for batch in BATCHES:
            requests = world.clean(batch, seed=2)
            times = _interleaved(
                {
                    "matrix products, `bank @ requests.T`": lambda: (clean @ requests.T, stamped @ requests.T),  # noqa: B023
                    "quickest products found": lambda: (products(clean, requests), products(stamped, requests)),  # noqa: B023
                    "decision, all scores": lambda: exact(requests),  # noqa: B023
                    "decision in full, all scores": lambda: in_full(requests),  # noqa: B023
                    f"SLOF alone, one bank, k = {K}": lambda: slof.score_samples(requests),  # noqa: B023
                    f"LocalOutlierFactor, one bank, k = {K}": lambda: outliers.score_samples(requests),  # noqa: B023
                    f"search alone, one bank, k = {K}": lambda: exact.reference.search(requests, K),  # noqa: B023
                    f"faiss IndexFlatIP, one bank, k = {K}": lambda: flat.search(requests, K),  # noqa: B023
                },
                CALLS[batch],
            )
            bare, quick = (np.median(values, axis=1) for values in list(times.values())[:2])
            for name, values in times.items():
                against = [np.median(np.median(values, axis=1) / base) for base in (bare, quick)]
                rows.append(
                    f"| {size:,} | {batch} | {name} | {np.median(values):.3f} | {np.quantile(values, 0.99):.3f} | "
                    f"{against[0]:.2f} | {against[1]:.2f} |"
                )
            middle = {name.split(",")[0]: float(np.median(values)) for name, values in times.items()}
            ratios.append(
                f"- {size:,}, batch {batch}: LocalOutlierFactor takes "
                f"{middle['LocalOutlierFactor'] / middle['SLOF alone']:.1f} times as long as SLOF, faiss "
                f"{middle['faiss IndexFlatIP'] / middle['search alone']:.1f} times as long as the search, the decision "
                f"in full {middle['decision in full'] / middle['decision']:.1f} times as long as the decision"
            )
    return [
        "A decision reads codes of 8 bits first, and is exact; in full it reads the float32 bank, as it does where the",
        "machine does not multiply such codes exactly.",
        "",
        f"Two banks; {WIDE} neighbours in the clean one, {K} in the stamped one. Milliseconds per call;",
        f"ratios are medians of {ROUNDS} interleaved rounds.",
        "",
        "| bank | batch | what | p50 ms | p99 ms | × matrix products | × quickest products |",
        "| --- " * 7 + "|",
        *rows,
        "",
        *ratios,
        "",
        f"Memory, as a multiple of the banks: {'; '.join(notes)}.",
        "",
    ]


def _interleaved(contenders: Mapping[str, Callable[[], object]], calls: int) -> dict[str, NDArray[np.float64]]:
    """Milliseconds, shape [rounds, calls] each. A contender's calls follow each other, as they do in service."""
    times = {name: np.empty((ROUNDS, calls)) for name in contenders}
    for row in range(ROUNDS):
        for name, call in contenders.items():
            call()
            for column in range(calls):
                start = time.perf_counter()
                call()
                times[name][row, column] = 1000 * (time.perf_counter() - start)
    return times


def _grown(make: Callable[[], Decision]) -> tuple[Decision, int]:
    """What is made, and the bytes that it keeps, ONNX Runtime's among them."""
    make()  # what is imported and allocated once
    before = _resident()
    made = make()
    return made, _resident() - before


def _resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _agreement(sizes: tuple[int, ...]) -> list[str]:
    rows = []
    for size in sizes:
        for flat in (False, True):
            world = World(flat=flat)
            clean = world.clean(size, seed=1)
            requests = world.clean(REQUESTS, seed=3)
            stamped, within = _stamp(clean), Neighbours(clean).within(K)
            reference, found = (
                {name: np.concatenate(parts) for name, parts in _joined(decide, requests).items()}
                for decide in (Decision(clean, stamped, within, in_full=in_full) for in_full in (True, False))
            )
            for name, values in reference.items():
                limit = np.quantile(values, 1 - ALPHA)
                equal = np.mean((values > limit) == (found[name] > limit))
                same = np.mean(values == found[name])
                kind = "random" if flat else "1 / rank"
                rows.append(f"| {size:,} | {kind} | {name} | {100 * equal:.2f} % | {100 * same:.2f} % |")
    return [
        f"The decision against that in full; {REQUESTS:,} clean requests, {100 * ALPHA:g} % of them above a threshold:",
        "",
        "| bank | variances | score | equal decisions | equal scores |",
        "| --- " * 5 + "|",
        *rows,
    ]


def _joined(decide: Decision, requests: Floats) -> dict[str, list[Floats]]:
    parts: dict[str, list[Floats]] = {}
    for start in range(0, len(requests), BATCHES[-1]):
        for name, values in decide(requests[start : start + BATCHES[-1]]).items():
            parts.setdefault(name, []).append(values)
    return parts


if __name__ == "__main__":
    main()
