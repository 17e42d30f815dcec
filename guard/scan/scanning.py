"""A scan from a training set to its results: embed, score, find groups, write."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from guard.classifiers import Classifier, ClassList, load
from guard.classifiers.classes import EVERYDAY
from guard.classifiers.open_clip import pick_device
from guard.distributed import Engine, Lost, Serial
from guard.errors import DataError
from guard.scan.captions import Captions
from guard.scan.embedding import BATCH, embed_shard, read_images
from guard.scan.fine import examine_set
from guard.scan.given import store_given
from guard.scan.results import ScanSettings, ScanSummary
from guard.scan.scoring import Scorer, StoredScores
from guard.scan.sources import Columns, Shard, find_shards
from guard.scan.store import StoredShard, shard_stem
from guard.scan.vectors import Unit
from guard.scan.writing import write_results

Task = TypeVar("Task")
Progress = Callable[[str, int, int], None]
EMBEDDINGS, SCORES = "embeddings", "scores"


@dataclass(frozen=True)
class _Embed:
    """Embed one shard."""

    shard: Shard
    stem: Path
    model: str
    device: str | None
    batch: int


@dataclass(frozen=True)
class _Score:
    """Score one shard."""

    stems: tuple[Path, ...]
    number: int
    stem: Path
    settings: ScanSettings
    device: str | None


def scan(
    data: Path,
    out: Path,
    *,
    model: str | None = None,
    settings: ScanSettings | None = None,
    columns: Columns | None = None,
    batch: int = BATCH,
    device: str | None = None,
    engine: Engine | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> ScanSummary:
    """Find the poisoned pairs of a training set.

    Finished shards are kept in `out`, and are neither embedded nor scored again: a scan that was killed continues, and
    ends with the same results. Memory is bounded by one shard, the candidates, and a few numbers for each pair.

    Args:
        data: The training set (`find_shards`), or a file of its embeddings (`store_given`).
        out: Folder of the results.
        model: The model that was trained on the set, as for `guard.load`; None where embeddings are given.
        settings: How to scan.
        columns: Columns of tables.
        batch: Pairs in a forward pass.
        device: torch device; by default a GPU if there is one.
        engine: What runs the shards; by default this process.
        say: Called with a message for the person who waits.
        progress: Called with (what, done, total).

    Raises:
        DataError: The set, or the embeddings, cannot be used.
        ModelError: The model cannot be loaded, or its embeddings overflow.
        UsageError: The settings do not fit each other, or the folder cannot be written.
    """
    settings, engine = settings or ScanSettings(), engine or Serial()
    shards: tuple[Shard, ...] = ()
    if model is None:
        stored = store_given(data, out / EMBEDDINGS, progress)
    else:
        shards = find_shards(data, columns)
        stems = [shard_stem(out / EMBEDDINGS, number, shard.name) for number, shard in enumerate(shards)]
        tasks = [_Embed(shard, stem, model, device, batch) for shard, stem in zip(shards, stems, strict=True)]
        _run(engine, _embed, tasks, "embedding shards", progress)
        stored = tuple(StoredShard(stem) for stem in stems)
        _check_pairs(stored)
    used = [number for number, shard in enumerate(stored) if shard.note.pairs]
    say(f"{sum(shard.note.pairs for shard in stored)} pairs in {len(stored)} shards")
    stems = [stored[number].stem for number in used]
    places = [out / SCORES / stem.name for stem in stems]
    scoring = [_Score(tuple(stems), number, place, settings, device) for number, place in enumerate(places)]
    _run(engine, _score, scoring, "scoring shards", progress)
    scored = [StoredScores(place) for place in places]
    scores = np.concatenate([each.read(settings.method) for each in scored])
    if not np.isfinite(scores).all():
        raise DataError("a score is not finite; the embeddings are too large to be compared")
    parts = [stored[number] for number in used]
    unit = [Unit(part.image) for part in parts]
    captions = Captions(
        [(partial(part.column, "caption"), partial(part.column, "digest")) for part in parts],
        [part.note.pairs for part in parts],
    )
    read = _reader([shards[number] for number in used] if shards else [], parts, model, device)
    chosen, groups, probabilities = examine_set(unit, scores, captions, read, settings, pick_device(device))
    say(f"{len(groups)} groups, of {len(chosen)} candidates and {settings.words} words")
    scorer = _scorer(tuple(stems), settings, device)
    accused = [group for group in groups if group.kind in ("trigger", "suspected")]
    certain = [group for group in groups if group.kind == "trigger"]
    summary = ScanSummary(
        data=str(data),
        model=model or "",
        pairs=len(scores),
        shards=len(stored),
        skipped=tuple(item for shard in stored for item in shard.note.skipped),
        settings=settings,
        search="none" if settings.reference != "global" else "approximate" if scorer.approximate else "exact",
        recall=next((each.note.recall for each in scored if each.note.recall is not None), None),
        candidates=len(chosen),
        groups=groups,
        poisoned=sum(group.count for group in accused),
        low=sum(group.low for group in certain),
        high=sum(group.high for group in accused),
        removed=len({row for group in accused for row in group.pairs}),
        embedding_seconds=round(sum(shard.note.seconds for shard in stored), 3),
        scoring_seconds=round(sum(each.note.seconds for each in scored), 3),
    )
    write_results(out, summary, parts, scores, chosen, probabilities, read)
    return summary


def _check_pairs(stored: Sequence[StoredShard]) -> None:
    if not any(shard.note.pairs for shard in stored):
        reasons = [item.reason for shard in stored for item in shard.note.skipped[:1]]
        raise DataError(f"not one pair of the training set can be used: {reasons[0] if reasons else 'it is empty'}")


def _run(
    engine: Engine, function: Callable[[Task], bool], tasks: Sequence[Task], what: str, progress: Progress
) -> None:
    """Run tasks that leave their results on the disk.

    Raises:
        DataError: A process died over one of them.
    """
    for done, (position, outcome) in enumerate(engine.map(function, tasks), 1):
        if isinstance(outcome, Lost):
            raise DataError(f"{what}: number {position} was lost: {outcome.reason}; run the command again to continue")
        progress(what, done, len(tasks))


@lru_cache(maxsize=1)
def _classifier(model: str, device: str | None) -> Classifier:
    # The classes of the model do not matter here; a model without any must do too.
    return load(model, classes=ClassList.read(Path(EVERYDAY)), device=device)


@lru_cache(maxsize=1)
def _scorer(stems: tuple[Path, ...], settings: ScanSettings, device: str | None) -> Scorer:
    return Scorer([StoredShard(stem) for stem in stems], settings, pick_device(device))


def _embed(task: _Embed) -> bool:
    return embed_shard(task.shard, StoredShard(task.stem), _classifier(task.model, task.device), batch=task.batch)


def _score(task: _Score) -> bool:
    return _scorer(task.stems, task.settings, task.device).score(task.number, StoredScores(task.stem))


def _reader(
    shards: Sequence[Shard], parts: Sequence[StoredShard], model: str | None, device: str | None
) -> Callable[[NDArray[np.int64]], Mapping[int, NDArray[np.uint8]]]:
    """Reads images of pairs by their number in the set; knows of none where embeddings were given."""
    starts = np.cumsum([0, *(part.note.pairs for part in parts)])

    def read(rows: NDArray[np.int64]) -> Mapping[int, NDArray[np.uint8]]:
        found: dict[int, NDArray[np.uint8]] = {}
        if model is None:
            return found
        for shard, start, stop in zip(shards, starts, starts[1:], strict=False):
            wanted = {int(row - start) for row in rows[(rows >= start) & (rows < stop)]}
            if wanted:
                images = read_images(shard, wanted, _classifier(model, device))
                found |= {int(start) + place: pixels for place, pixels in images.items()}
        return found

    return read
