"""Files of embeddings, such as recorded traffic."""

import io
from pathlib import Path
from tokenize import TokenError

import numpy as np

from guard._documents import open_regular
from guard._files import replace_file
from guard._types import Floats
from guard.errors import EmbeddingsError, first_line

_MAX_BYTES = 8 * 2**30
_DAMAGED = (ValueError, EOFError, OSError, OverflowError, TypeError, SyntaxError, TokenError, RecursionError)
"""What NumPy raises for the head of a file that is not its own."""


def read_embeddings(path: Path, dimension: int) -> Floats:
    """Read a NumPy file of embeddings; code in the file is never executed.

    Args:
        path: A `.npy` file of floats, shape [N, D].
        dimension: The expected length D of an embedding.

    Returns:
        float32, shape [N, D], not necessarily normalised.

    Raises:
        EmbeddingsError: The file is missing, is not a file of embeddings, or its embeddings are of another model.
    """
    missing = f"cannot read {path}: there is no such file"
    try:
        with open_regular(path, _MAX_BYTES, EmbeddingsError, missing=missing) as (file, _):
            # Nothing is allocated that the file is too short for, whatever its head says.
            np.lib.format.open_memmap(path, mode="r")
            values = np.lib.format.read_array(file, allow_pickle=False)
    except MemoryError as error:
        raise EmbeddingsError(f"there is not enough memory to read {path}") from error
    except _DAMAGED as error:
        raise EmbeddingsError(f"{path} is not a NumPy file of numbers: {first_line(error)}") from error
    if values.ndim != 2 or values.shape[1] != dimension or not np.issubdtype(values.dtype, np.floating):
        raise EmbeddingsError(
            f"{path} contains {values.dtype} of shape {values.shape}; embeddings of this model are floats of shape "
            f"[N, {dimension}]"
        )
    if not np.isfinite(values).all():
        raise EmbeddingsError(f"{path} contains a value that is not finite")
    return values.astype(np.float32)


def write_embeddings(path: Path, embeddings: Floats) -> None:
    """Write embeddings, shape [N, D], to a file that `read_embeddings` reads; completely or not at all.

    Only this user can read the file: embeddings tell what images were sent.

    Raises:
        UsageError: The file cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, embeddings, allow_pickle=False)
    replace_file(path, buffer.getvalue(), mode=0o600)
