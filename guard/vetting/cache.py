"""Finished searches on disk: what makes a long vetting resumable."""

import json
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from guard._files import replace_file
from guard.triggers import InvertibleTrigger
from guard.vetting.inversion import Reconstruction

_NUMBERS = tuple(field.name for field in fields(Reconstruction) if field.name != "trigger")


class SearchCache:
    """A folder with one safetensors file per finished batch of classes.

    Args:
        folder: Created when something is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, family: type[InvertibleTrigger]) -> list[Reconstruction] | None:
        """The results stored under a name; None if there are none, or if the file is damaged."""
        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:
                numbers = json.loads(file.metadata()["results"])
                keys = list(file.keys())
                return [
                    Reconstruction(
                        trigger=family.from_tensors(
                            {key.removeprefix(f"{k}."): file.get_tensor(key) for key in keys if key.startswith(f"{k}.")}
                        ),
                        **values,
                    )
                    for k, values in enumerate(numbers)
                ]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None  # searched again

    def save(self, name: str, results: list[Reconstruction]) -> None:
        """Store results under a name, whole or not at all."""
        tensors = {
            f"{k}.{key}": tensor.contiguous()
            for k, result in enumerate(results)
            for key, tensor in result.trigger.tensors().items()
        }
        numbers = [{key: getattr(result, key) for key in _NUMBERS} for result in results]
        replace_file(self.folder / f"{name}.safetensors", save(tensors, {"results": json.dumps(numbers)}))
