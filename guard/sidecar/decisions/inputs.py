"""What a request claims to hold and what can be read of it, be it images or texts."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.errors import GuardError
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.sidecar.decisions.workers import LargeWorkError

T = TypeVar("T")
Values: TypeAlias = Floats | NDArray[np.int64]
"""Preprocessed images, shape [N, 3, S, S], or token ids of texts, shape [N, L]."""
LARGE_PIXELS = 16_000_000
"""Requests with more pixels to decode are large: not every thread takes them. A camera's picture is still below."""


@dataclass(frozen=True, eq=False)
class Claims:
    """What a request claims to hold, before anything is decoded.

    Attributes:
        index: Number of the input with the images or texts.
        where: How errors name that input.
        noun: What it holds several of, for errors.
        files: The encoded images, or the texts; None if the images are preprocessed, or the texts are token ids.
        work: Pixels that decoding them visits, or what takes as long.
        troubles: Why some cannot be read, by their numbers; completed while they are decoded.
    """

    index: int
    where: str
    noun: str
    files: list[bytes] | None
    work: int
    troubles: dict[int, GuardError]

    @property
    def trouble(self) -> str:
        """Why the first of those that cannot be read cannot be; "" if all can."""
        if not self.troubles:
            return ""
        first = min(self.troubles)
        which = f"{self.noun} {first} of the batch: " if self.files is not None and len(self.files) > 1 else ""
        return f"{self.where}{which}{self.troubles[first]}"

    def in_turn(self, rest: Callable[[], T]) -> T:
        """Do what is left to do, now or, if decoding takes long, when a thread for large work is free."""
        if self.work > LARGE_PIXELS:
            raise LargeWorkError(rest)
        return rest()


@dataclass(frozen=True, eq=False)
class Inputs:
    """The images or texts of a request that can be read.

    Attributes:
        values: Preprocessed images, shape [M, 3, S, S], or token ids of texts, shape [M, L].
        rows: Their numbers in the request, shape [M].
        count: Number of images or texts in the request.
        trouble: Why the first of the others cannot be read; "" if there is none.
        canonical: The request as it is forwarded; None if that is as it was sent.
    """

    values: Values
    rows: NDArray[np.int64]
    count: int
    trouble: str
    canonical: bytes | None = None

    def of(self, rows: NDArray[np.int64]) -> Values:
        """The values of those with these numbers; all of them must be there."""
        return self.values if len(rows) == len(self.rows) else self.values[np.isin(self.rows, rows)]


class Reader(Protocol):
    """Reads the inputs of the requests of one model."""

    def find_input(self, request: ModelInferRequest) -> int:
        """The number of the input that is screened; see `guard.protocol.tensors.find_input`.

        Raises:
            RequestError: The input is missing, or the request can be read in different ways.
        """
        ...

    def claims(self, request: ModelInferRequest) -> Claims:
        """What a request claims to hold, before anything of it is decoded.

        Raises:
            RequestError: The request cannot be read in one way, or what it holds is beyond the limits in sum.
        """
        ...

    def read(
        self,
        request: ModelInferRequest,
        claims: Claims,
        *,
        replaced: bool,
        ambiguous: bool,
        only: Collection[int] | None = None,
    ) -> Inputs:
        """Read the inputs of a request, each by itself.

        Args:
            request: The request.
            claims: What it claims to hold.
            replaced: Whether what is encoded is forwarded as it is read here.
            ambiguous: Whether inputs may be read that other programs read differently.
            only: Numbers of the encoded inputs to decode; None for all.
        """
        ...
