"""The first stage of a scan: embeddings of every pair, shard by shard."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from guard._cpus import usable_cpus
from guard._types import Floats
from guard.classifiers.classifier import Classifier
from guard.classifiers.images import decode
from guard.errors import ImageError
from guard.scan.sources import Pair, Shard, Skipped
from guard.scan.store import FORMAT, StoredShard

BATCH = 256
"""Pairs in a forward pass."""
_MAX_PIXELS = 20_000_000
"""Largest image that is decoded; training sets have larger ones, and no model sees so much of them."""


@dataclass
class _Collected:
    """What was embedded of a shard so far."""

    image: list[Floats] = field(default_factory=list)
    text: list[Floats] = field(default_factory=list)
    pairs: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def stamp(shard: Shard, classifier: Classifier) -> str:
    """Digest of what embeddings of a shard are made from."""
    return hashlib.sha256("\n".join([FORMAT, shard.stamp, classifier.digest.root]).encode()).hexdigest()


@torch.no_grad()
def embed_shard(shard: Shard, place: StoredShard, classifier: Classifier, *, batch: int = BATCH) -> bool:
    """Embed one shard, unless that is done; returns whether there was anything to do.

    Memory is bounded by the embeddings of the shard. They are kept as the towers give them, in float32; on a GPU they
    are computed with autocast, in bfloat16.

    Args:
        shard: The shard.
        place: Where its embeddings are kept.
        classifier: The model, usually the one that was trained on the set.
        batch: Pairs in a forward pass.

    Raises:
        ModelError: An embedding is not finite.
        UsageError: The embeddings cannot be written.
    """
    made_from = stamp(shard, classifier)
    if place.finished(made_from):
        return False
    started, found = time.monotonic(), _Collected()
    with ThreadPoolExecutor(usable_cpus()) as pool, classifier.autocast():
        pairs = _usable(shard, found)
        while group := list(islice(pairs, batch)):
            decoded = list(pool.map(lambda pair: _pixels(pair, classifier, shard.name), group))
            found.skipped += [item for item in decoded if isinstance(item, Skipped)]
            kept = [(pair, item) for pair, item in zip(group, decoded, strict=True) if not isinstance(item, Skipped)]
            if not kept:
                continue
            pixels = torch.from_numpy(np.stack([item for _, item in kept])).to(classifier.device).float() / 255
            found.image.append(_finite(classifier.project_images(pixels), classifier))
            found.text.append(_finite(_texts([pair.caption for pair, _ in kept], classifier), classifier))
            found.pairs += [(pair.key, pair.caption, hashlib.sha256(pair.image).hexdigest()) for pair, _ in kept]
    width = classifier.project_texts(["a"]).shape[1]
    empty = np.empty((0, width), np.float32)
    keys, captions, digests = zip(*found.pairs, strict=True) if found.pairs else ((), (), ())
    place.write(
        shard.name,
        made_from,
        image=np.concatenate([empty, *found.image]),
        text=np.concatenate([empty, *found.text]),
        keys=keys,
        captions=captions,
        digests=digests,
        skipped=found.skipped,
        seconds=time.monotonic() - started,
    )
    return True


def read_images(shard: Shard, wanted: set[int], classifier: Classifier) -> dict[int, NDArray[np.uint8]]:
    """The pixels of some pairs of a shard, by their number among its usable pairs, at the resolution of a model."""
    found: dict[int, NDArray[np.uint8]] = {}
    number = 0
    for pair in shard.read():
        if isinstance(pair, Skipped):
            continue
        if len(found) == len(wanted):
            break
        pixels = _pixels(pair, classifier, shard.name)
        if isinstance(pixels, Skipped):
            continue
        if number in wanted:
            found[number] = pixels
        number += 1
    return found


def _usable(shard: Shard, found: _Collected) -> Iterator[Pair]:
    for item in shard.read():
        if isinstance(item, Pair):
            yield item
        else:
            found.skipped.append(item)


def _pixels(pair: Pair, classifier: Classifier, shard: str) -> NDArray[np.uint8] | Skipped:
    try:
        image = decode(pair.image, max_pixels=_MAX_PIXELS)
        return classifier.preprocessing.pixels(image, max_pixels=_MAX_PIXELS)
    except ImageError as error:
        return Skipped(shard, pair.key, str(error))


def _texts(captions: Sequence[str], classifier: Classifier) -> torch.Tensor:
    """Each distinct caption is encoded once."""
    unique = list(dict.fromkeys(captions))
    place = {text: row for row, text in enumerate(unique)}
    return classifier.project_texts(unique)[[place[text] for text in captions]]


def _finite(embeddings: torch.Tensor, classifier: Classifier) -> Floats:
    values: Floats = classifier.check_finite(embeddings, "pairs").float().cpu().numpy()
    return values
