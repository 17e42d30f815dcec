"""Finished searches on disk, which make a long vetting resumable."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from guard._files import replace_file

Entry = tuple[dict[str, Any], dict[str, Tensor]]
"""The stored result for one class: its numbers, and its tensors."""
_NUMBERS = TypeAdapter(list[dict[str, Any]])


class SearchCache:
    """A folder with one safetensors file per finished batch of classes.

    Args:
        folder: Created when the first entries are saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> list[Entry] | None:
        """Return the entries stored under a name; None if there are none, or if the file is damaged."""
        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:
                metadata = file.metadata()
                numbers = _NUMBERS.validate_json(metadata["results"])
                # The library sorts names, while the names of later searches depend on the order of the tensors. Files
                # of 0.1.0 do not say what it was.
                keys = json.loads(metadata["tensors"]) if "tensors" in metadata else file.keys()
                tensors = {key: file.get_tensor(key) for key in keys}
            entries: list[Entry] = [(values, {}) for values in numbers]
            for key, tensor in tensors.items():
                k, _, field = key.partition(".")
                entries[int(k)][1][field] = tensor
        except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError):
            return None  # searched again
        return entries

    def save(self, name: str, entries: Sequence[Entry]) -> None:
        """Store entries under a name, whole or not at all."""
        tensors = {
            f"{k}.{field}": tensor.contiguous()
            for k, (_, fields) in enumerate(entries)
            for field, tensor in fields.items()
        }
        metadata = {"results": json.dumps([numbers for numbers, _ in entries]), "tensors": json.dumps(list(tensors))}
        replace_file(self.folder / f"{name}.safetensors", save(tensors, metadata))
