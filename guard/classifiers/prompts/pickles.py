"""Checkpoints of the public code of CoOp and CoCoOp, which are pickles, into what guard reads.

A pickle can run code when it is loaded. Here torch's restricted unpickler (`weights_only=True`) builds tensors and
plain containers only. The checkpoints also hold optimisers and schedulers; for these few classes it gets empty
stand-ins, and what they hold is thrown away.
"""

import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guard._documents import open_regular
from guard.classifiers.prompts.learner import CONTEXT, FORMS, PromptLearner
from guard.errors import ModelError, first_line

MAX_BYTES = 256 * 2**20
"""Largest checkpoint that is read: CoOp's own are below 10 MB."""
_IGNORED = {"token_prefix", "token_suffix", "token_middle"}
"""Embeddings of words, which follow from the class names; the public code ignores them too."""
_STANDING_IN = (
    "dassl.optim.lr_scheduler.ConstantWarmupScheduler",
    "dassl.optim.lr_scheduler.LinearWarmupScheduler",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "torch.optim.sgd.SGD",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "builtins.dict",
)


class _Discarded:
    """Stands for an object of a class that is not wanted; takes whatever state it is given."""

    def __init__(self, *_: object) -> None:
        """Forget the arguments."""

    def __setstate__(self, state: object) -> None:
        """Forget the state."""


def _plain(*_: object) -> OrderedDict[Any, Any]:
    """Stands for `collections.defaultdict`, whose items the unpickler puts into a plain dictionary only."""
    return OrderedDict()


def convert_prompt_learner(path: Path | str) -> PromptLearner:
    """Read a checkpoint of CoOp or CoCoOp without running anything in it.

    Accepted are torch files in the zip format that hold the state of a `PromptLearner`, by itself or under
    `state_dict`, with or without the prefix `prompt_learner.`. Only tensors that guard knows are kept, in their forms;
    embeddings of words are left out.

    Args:
        path: Such as `prompt_learner/model.pth.tar-50`.

    Raises:
        ModelError: The file is missing, too large, no such checkpoint, or asks for anything but tensors.
    """
    path = Path(path)
    with open_regular(path, MAX_BYTES, ModelError) as (file, _):
        try:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(item.file_size for item in archive.infolist())
                stored = all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise ModelError(f"{path} is not a checkpoint in torch's zip format: {first_line(error)}") from error
        if unpacked > MAX_BYTES or not stored:
            raise ModelError(f"{path} is compressed, or unpacks to more than {MAX_BYTES} bytes; refused")
        file.seek(0)
        known: list[Any] = [(_plain, "collections.defaultdict"), *((_Discarded, name) for name in _STANDING_IN)]
        try:
            with torch.serialization.safe_globals(known):
                document = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises whatever a damaged pickle leads to
            raise ModelError(f"{path} holds something else than tensors, or is damaged; it is not converted") from error
    state = document.get("state_dict", document) if isinstance(document, Mapping) else document
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ModelError(f"{path} holds no state of a prompt learner")
    tensors = {}
    for full, tensor in state.items():
        name = full.removeprefix("module.").removeprefix("prompt_learner.")
        if name in _IGNORED:
            continue
        if name not in FORMS["cocoop"]:
            raise ModelError(f"{path} has the entry {full[:80]!r}, which is not one of a prompt learner")
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise ModelError(f"{path} has the entry {full[:80]!r}, which is not a tensor of numbers")
        tensors[name] = tensor.detach().float().contiguous().clone()
    if CONTEXT not in tensors:
        raise ModelError(f"{path} has no {CONTEXT}; it is not the checkpoint of a prompt learner")
    try:
        return PromptLearner(tensors)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
