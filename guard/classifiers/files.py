"""Checks of model files that may be anybody's, before a library opens them. No torch here."""

import json
import struct
from pathlib import Path

from guard.errors import ModelError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
CLASSES_FILE = "classes.json"
MAX_LAYERS, MAX_SIZE = 256, 2**20
"""Largest number of layers, and largest value of any other number, in the configuration of a tower."""
_MAX_HEADER_BYTES = 100_000_000
MAX_CONFIG_BYTES = 1_000_000
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


def check_weights_file(path: Path, *, wanted: str = WEIGHTS_FILE) -> None:
    """Refuse anything that is not a whole safetensors file, judged by its bytes and not by its name.

    Args:
        path: The file.
        wanted: File name that the error message suggests for a converted pickle.

    Raises:
        ModelError: The file is missing, a pickle, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start[:2] == b"PK" or start[:1] == b"\x80":
                raise ModelError(
                    f"{path} is a pickle, which can run code when it is loaded; convert it on a machine that you can "
                    "throw away: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
                    f"'{wanted}')"
                )
            header_size = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < header_size <= min(_MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"{path} is not a safetensors file, or it is truncated ({size} bytes)")
            header = json.loads(file.read(header_size))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
        expected = 8 + header_size + max(ends, default=0)
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file: its header is damaged") from error
    if expected != size:
        raise ModelError(
            f"{path} is truncated or has extra bytes at its end: it has {size} bytes, its header promises {expected}"
        )


def missing_weights(directory: Path, name: str) -> ModelError:
    """The error for a directory without its weights.

    Raises:
        ModelError: The directory holds them as a pickle; the message says how to convert it.
    """
    pickles = sorted(path for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        check_weights_file(pickles[0], wanted=name)
    return ModelError(f"{directory} has no {name}")
