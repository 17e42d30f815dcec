"""Training on disk, so that a run that was killed continues where it stopped."""

import json
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from guard._files import replace_file

_EVERY = 30.0
"""Seconds of training that a kill can cost."""


class Checkpoint:
    """One file with the weights of a model and the state of its optimiser after a step.

    Args:
        path: The file.
        identity: Digest of everything that the training follows from. A file of another training is not used.
        every: Seconds between two writings.
    """

    def __init__(self, path: Path, identity: str, *, every: float = _EVERY) -> None:
        self.path, self._identity, self._every = path, identity, every
        self._written = time.monotonic()

    def restore(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
        """Take up the state that was kept, if there is one of this training.

        Returns:
            The next step, and the seconds that the steps before it took; (0, 0) if there is nothing to take up.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                document = json.loads((file.metadata() or {})["training"])
                if document["identity"] != self._identity:
                    return 0, 0.0
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return 0, 0.0  # trained again
        model.load_state_dict(_below("model.", tensors))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _below("optimiser.", tensors).items():
            number, _, field = name.partition(".")
            state.setdefault(int(number), {})[field] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        return int(document["step"]), float(document["seconds"])

    def keep(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, step: int, seconds: float, *, last: bool
    ) -> None:
        """Write the state before a step, if enough time has passed since the last writing, or if it is the last one."""
        if not last and time.monotonic() - self._written < self._every:
            return
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for number, fields in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": tensor for name, tensor in fields.items()}
        document = {"identity": self._identity, "step": step, "seconds": seconds}
        plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        replace_file(self.path, save(plain, {"training": json.dumps(document)}))
        self._written = time.monotonic()


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
