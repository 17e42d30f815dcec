"""Prompt learners as safetensors files, which are untrusted."""

from pathlib import Path

import torch
from safetensors.torch import save

from guard._files import replace_file
from guard._safetensors import open_tensors
from guard.classifiers.prompts.learner import FORMS, PromptLearner
from guard.errors import ModelError

MAX_TENSOR_BYTES = 256 * 2**20
"""Largest tensor of a prompt learner that is read."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {name for forms in FORMS.values() for name in forms}


def load_prompt_learner(path: Path | str) -> PromptLearner:
    """Read a prompt learner.

    Args:
        path: A safetensors file.

    Raises:
        ModelError: The file is missing, damaged, a pickle, or holds no prompt learner.
    """
    path = Path(path)
    with open_tensors(path, ModelError, wanted="learner.safetensors") as file:
        for name, entry in file.entries.items():
            if name not in _NAMES:
                raise ModelError(f"{path} has the tensor {name[:80]!r}, which no prompt learner has")
            if entry.dtype not in _DTYPES or not 0 < entry.size <= MAX_TENSOR_BYTES:
                raise ModelError(f"{path} has the tensor {name!r} in {entry.dtype} and {entry.size} bytes; refused")
        tensors = {
            name: torch.frombuffer(file.read(name), dtype=_DTYPES[entry.dtype]).reshape(entry.shape).float()
            for name, entry in file.entries.items()
        }
    try:
        return PromptLearner(tensors)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def save_prompt_learner(path: Path | str, learner: PromptLearner) -> None:
    """Write a prompt learner as a safetensors file, whole or not at all.

    Raises:
        UsageError: The file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in learner.tensors.items()}
    replace_file(Path(path), save(tensors, {"prompt_learner": learner.kind}))
