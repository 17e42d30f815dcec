"""Finished searches on disk: what makes a long vetting resumable."""

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
"""What is stored of one class: numbers, and tensors."""
_NUMBERS = TypeAdapter(list[dict[str, Any]])


class SearchCache:
    """A folder with one safetensors file per finished batch of classes.

    Args:
        folder: Created when something is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> list[Entry] | None:
        """What is stored under a name; None if there is nothing, or if the file is damaged."""
        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:
                numbers = _NUMBERS.validate_json(file.metadata()["results"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
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
            f"{k}.{key}": value.contiguous() for k, (_, held) in enumerate(entries) for key, value in held.items()
        }
        numbers = json.dumps([values for values, _ in entries])
        replace_file(self.folder / f"{name}.safetensors", save(tensors, {"results": numbers}))
