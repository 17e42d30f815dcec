"""The files that a scan leaves: scores of every pair, a keep-list, a summary and a report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard._files import replace_file, replacing
from guard.scan.report import render
from guard.scan.results import ScanSummary
from guard.scan.sources import import_parquet
from guard.scan.store import StoredShard

SCORES_FILE, KEEP_FILE, SUMMARY_FILE, REPORT_FILE = "scores.parquet", "keep.txt", "summary.json", "report.html"


def write_results(
    out: Path,
    summary: ScanSummary,
    parts: Sequence[StoredShard],
    scores: NDArray[np.float64],
    chosen: NDArray[np.int64],
    probabilities: Mapping[int, float],
    read: Callable[[NDArray[np.int64]], Mapping[int, NDArray[np.uint8]]],
) -> None:
    """Write all results.

    `scores.parquet` has one row for each pair: shard, key, the score of the coarse stage, the conformal p-value of that
    score among all pairs, whether it was a candidate, the group (−1 for none) and its kind, and the probability to have
    a trigger. `keep.txt` has the shard and the key of every pair that is in no group of the kind `trigger` or
    `suspected`, with a tab between. Neither depends on when, where, or in how many attempts the scan ran.

    Args:
        out: Folder to write to.
        summary: What was found.
        parts: Shards with pairs.
        scores: Scores of all pairs.
        chosen: Numbers of the candidates.
        probabilities: To have a trigger, for pairs that were looked at.
        read: Reads images, for the report.

    Raises:
        UsageError: A file cannot be written.
    """
    total = len(scores)
    order = np.sort(scores)
    p_values = (1 + total - np.searchsorted(order, scores, side="left")) / (total + 1)
    groups = np.full(total, -1, np.int32)
    for number, group in reversed(list(enumerate(summary.groups))):
        groups[list(group.pairs)] = number
    kinds = ["", *(group.kind for group in summary.groups)]
    accused = [number for number, group in enumerate(summary.groups) if group.kind in ("trigger", "suspected")]
    candidate = np.zeros(total, bool)
    candidate[chosen] = True
    probability = np.zeros(total, np.float32)
    for row, value in probabilities.items():
        probability[row] = value
    columns: dict[str, Any] = {
        "score": scores, "p_value": p_values, "candidate": candidate, "group": groups, "probability": probability,
        "kind": np.array(kinds, object)[groups + 1],
    }  # fmt: skip
    _write_tables(out, parts, columns, np.isin(groups, accused))
    replace_file(out / SUMMARY_FILE, json.dumps(document(summary), indent=1, ensure_ascii=False).encode() + b"\n")
    wanted = np.array(sorted({row for group in summary.groups for row in group.pairs[:24]}), np.int64)
    captions = _captions(parts, wanted)
    replace_file(out / REPORT_FILE, render(summary, read(wanted), captions, scores).encode())


def document(summary: ScanSummary) -> dict[str, Any]:
    """The summary as JSON-like values: groups without their pairs, which `scores.parquet` has, and without pictures."""
    stated = asdict(summary)
    for group in stated["groups"]:
        group["pairs"] = len(group["pairs"])
        del group["shown"]
        if group["pattern"]:
            del group["pattern"]["mean"]
    return stated


def _write_tables(
    out: Path, parts: Sequence[StoredShard], columns: Mapping[str, Any], accused: NDArray[np.bool_]
) -> None:
    parquet = import_parquet()
    import pyarrow as pa

    schema = pa.schema(
        {"shard": pa.string(), "key": pa.string(), "score": pa.float64(), "p_value": pa.float64(),
         "candidate": pa.bool_(), "group": pa.int32(), "kind": pa.string(), "probability": pa.float32()}
    )  # fmt: skip
    start = 0
    with (
        replacing(out / SCORES_FILE) as table,
        replacing(out / KEEP_FILE) as keep,
        parquet.ParquetWriter(table, schema, compression="zstd") as writer,
    ):
        for part in parts:  # one shard in memory at a time
            rows = slice(start, start + part.note.pairs)
            keys, shard = part.column("key"), part.note.name
            own = {name: values[rows] for name, values in columns.items()}
            writer.write_table(pa.table({"shard": [shard] * len(keys), "key": keys, **own}, schema))
            kept = [key for key, out_of_it in zip(keys, accused[rows].tolist(), strict=True) if not out_of_it]
            keep.write("".join(f"{shard}\t{key}\n" for key in kept).encode())
            start = rows.stop


def _captions(parts: Sequence[StoredShard], wanted: NDArray[np.int64]) -> dict[int, str]:
    found, start = dict[int, str](), 0
    for part in parts:
        stop = start + part.note.pairs
        inside = wanted[(wanted >= start) & (wanted < stop)]
        if len(inside):
            captions = part.column("caption")
            found |= {int(row): captions[row - start] for row in inside}
        start = stop
    return found
