"""Embeddings in a file: recorded traffic, or what another program computed."""

import io
from pathlib import Path

import numpy as np

from guard._files import replace_file
from guard._types import Floats
from guard.errors import EmbeddingsError

_MAX_BYTES = 8 * 2**30


def read_embeddings(path: Path, dimension: int) -> Floats:
    """Read a NumPy file of float embeddings; nothing in it is executed.

    Args:
        path: A `.npy` file, shape [N, D].
        dimension: The D that is expected.

    Returns:
        float32, shape [N, D], not necessarily normalised.

    Raises:
        EmbeddingsError: There is no such file, it is none of these, or of another model.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise EmbeddingsError(f"{path} is larger than {_MAX_BYTES} bytes")
        with path.open("rb") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise EmbeddingsError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, EOFError, MemoryError) as error:
        raise EmbeddingsError(f"{path} is no NumPy file of numbers: {error}") from error
    if values.ndim != 2 or values.shape[1] != dimension or not np.issubdtype(values.dtype, np.floating):
        raise EmbeddingsError(
            f"{path} holds {values.dtype} of shape {values.shape}; embeddings of this model are floats of shape "
            f"[N, {dimension}]"
        )
    if not np.isfinite(values).all():
        raise EmbeddingsError(f"{path} holds a value that is not finite")
    return values.astype(np.float32)


def write_embeddings(path: Path, embeddings: Floats) -> None:
    """Write embeddings, shape [N, D], so that `read_embeddings` reads them; whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, embeddings, allow_pickle=False)
    replace_file(path, buffer.getvalue())
