"""Weights from safetensors files into a model: each tensor once, in exactly its shape, and nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from guard._safetensors import TensorFile, open_tensors
from guard.errors import ModelError

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of numbers that a float is read from. Others need a scale that is not in the file, or say more than float32."""
_OTHERS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


class Weights:
    """Safetensors files that are open, and whose headers were checked.

    Args:
        files: The files.
        ignored: Names of tensors that are in some files and never read.

    Raises:
        ModelError: A tensor is in two files.
    """

    def __init__(self, files: Sequence[TensorFile], ignored: AbstractSet[str]) -> None:
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for file in files:
            for name in file.entries.keys() - ignored:
                if name in self._places:
                    raise ModelError(f"{file.path} has a tensor that another file has too: {name[:120]!r}")
                self._places[name] = file, name
        self._where = files[0].path if len(files) == 1 else files[0].path.parent

    @property
    def names(self) -> AbstractSet[str]:
        """Names of the tensors."""
        return self._places.keys()

    def rename(self, change: Callable[[str], str]) -> None:
        """Give the tensors the names that they have in the model; those in the files stay as they are."""
        self._places = {change(name): place for name, place in self._places.items()}

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Make sure that there is every tensor of a model, in its shape, and no other.

        Args:
            expected: The tensors of the model by name; they need no memory of their own (`meta`).

        Raises:
            ModelError: A tensor is missing, superfluous, or of another shape or type.
        """
        for name, (file, written) in sorted(self._places.items()):
            entry = file.entries[written]
            if name not in expected:
                raise ModelError(f"{file.path} has a tensor that its configuration has no place for: {written[:120]!r}")
            if entry.shape != tuple(expected[name].shape):
                raise ModelError(
                    f"{file.path} cannot be loaded: it holds {written!r} in shape {list(entry.shape)}; its "
                    f"configuration says {list(expected[name].shape)}"
                )
            accepted = _accepted(expected[name].dtype)
            if entry.dtype not in accepted:
                raise ModelError(f"{file.path} holds {written!r} as {entry.dtype}; {', '.join(accepted)} are accepted")
        if missing := expected.keys() - self._places.keys():
            raise ModelError(f"{self._where} lacks {len(missing)} tensors, such as {min(missing)!r}")

    def fill(self, model: Mapping[str, Tensor]) -> None:
        """Copy the tensors into those of a model, one at a time, so that only one model's worth of memory is needed.

        Raises:
            ModelError: A file was cut in the meantime.
        """
        for name, (file, written) in self._places.items():
            entry = file.entries[written]
            if entry.size:
                dtype = _FLOATS.get(entry.dtype, model[name].dtype)
                values = torch.frombuffer(file.read(written), dtype=dtype)
                model[name].copy_(values.reshape(entry.shape))


@contextmanager
def open_weights(paths: Sequence[Path], *, ignored: AbstractSet[str] = frozenset()) -> Iterator[Weights]:
    """Open the files of a model's weights.

    Raises:
        ModelError: A file is missing, a pickle, truncated, or not safetensors; or a tensor is in two files.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path, ModelError, wanted=path.name)) for path in paths]
        yield Weights(files, ignored)


def _accepted(dtype: torch.dtype) -> list[str]:
    if dtype.is_floating_point:
        return sorted(_FLOATS)
    return [_OTHERS[dtype]] if dtype in _OTHERS else []
