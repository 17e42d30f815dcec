"""A uniform sample of the traffic, for the next calibration, and its files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import Field

from guard._documents import read_document
from guard._files import replace_file
from guard._types import Floats
from guard.errors import StateError
from guard.profiles import read_embeddings, write_embeddings

_FORMAT: Final = 1
_MAX_BYTES = 2**16


@dataclass(frozen=True)
class _About:
    """What is known of a stored sample besides its embeddings.

    Attributes:
        format: Version of this document.
        model: Digest of the model that made the embeddings.
        seen: Number of embeddings that the sample was drawn from.
    """

    format: Literal[1]
    model: str
    seen: Annotated[int, Field(ge=0, le=2**53)]


class Reservoir:
    """A uniform sample of a stream of embeddings (Vitter's algorithm R), including those of flagged images.

    Without those of flagged images the next threshold would be too low.

    Args:
        size: The most embeddings that are kept.
        dimension: Length of an embedding.
        seed: Seed for the random choice of embeddings.
    """

    def __init__(self, size: int, dimension: int, *, seed: int = 0) -> None:
        self._kept = np.empty((size, dimension), np.float32)
        self._seen, self._seed = 0, seed
        self._generator = np.random.default_rng(seed)

    @property
    def seen(self) -> int:
        """Number of embeddings that the sample is drawn from."""
        return self._seen

    @property
    def embeddings(self) -> Floats:
        """The sample, shape [n, D]."""
        return self._kept[: min(self._seen, len(self._kept))]

    def add(self, embeddings: Floats) -> None:
        """Offer embeddings, shape [N, D], to the sample."""
        for embedding in embeddings:
            place = self._seen if self._seen < len(self._kept) else int(self._generator.integers(self._seen + 1))
            if place < len(self._kept):
                self._kept[place] = embedding
            self._seen += 1

    def restore(self, path: Path, model: str) -> None:
        """Continue a stored sample, unless it is of another model.

        A sample that was larger is thinned out evenly. One that was smaller than there is room for now counts as drawn
        from as many embeddings as it has: new ones fill the room first.

        Args:
            path: The `.npy` file that `store` wrote.
            model: Digest of the model that is served now.

        Raises:
            StateError: What is known of the sample is missing or damaged.
            EmbeddingsError: The file of embeddings is damaged.
        """
        missing = f"{path} has no {about_file(path).name} beside it"
        about = read_document(about_file(path), _About, _MAX_BYTES, StateError, missing=missing, strict=True)
        if about.model != model:
            return
        stored, room = read_embeddings(path, self._kept.shape[1]), len(self._kept)
        # Other choices than those of before.
        self._generator = np.random.default_rng((self._seed, about.seen))
        if len(stored) > room:
            stored = stored[np.sort(self._generator.choice(len(stored), room, replace=False))]
        self._kept[: len(stored)] = stored
        self._seen = len(stored) if len(stored) < room else max(about.seen, room)

    def snapshot(self) -> tuple[Floats, int]:
        """A copy of the sample, and the number of embeddings that it is drawn from."""
        return self.embeddings.copy(), self._seen


def store(path: Path, embeddings: Floats, seen: int, model: str) -> None:
    """Write a sample, so that `Reservoir.restore` continues it and `guard calibrate --embeddings` reads it.

    Args:
        path: A `.npy` file; what else is known is written to a `.json` file beside it.
        embeddings: The sample, shape [n, D].
        seen: Number of embeddings that it is drawn from.
        model: Digest of the model that made the embeddings.

    Raises:
        UsageError: A file cannot be written.
    """
    # The embeddings first: until the second file is there too, the first one says that they are of another model, or
    # counts a few too few.
    write_embeddings(path, embeddings)
    about = json.dumps(asdict(_About(_FORMAT, model, seen))) + "\n"
    replace_file(about_file(path), about.encode(), mode=0o600)


def about_file(path: Path) -> Path:
    """The file beside a sample that holds what else is known of it."""
    return path.with_suffix(".json")
