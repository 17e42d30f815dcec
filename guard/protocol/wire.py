"""Bounds on serialised messages, looked at before they are parsed.

Parsing turns two bytes of an empty input into an object of a hundred, and a byte of a number into eight: 4 MiB that way
freeze an event loop for seconds. So the fields of a message are counted first. The walk looks only into messages that
hold other messages, and skips what is long (pixels, files), so that an ordinary request takes some microseconds.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from guard.errors import RequestError

_VARINT, _LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}
"""Kinds of fields with as many bytes."""
_GROUPS = (3, 4)
"""Begin and end of a group, which the protocol does not use: the fields in it count as if they stood outside."""
_MAX_DIMENSIONS = 32
"""numpy has at most 64, ONNX Runtime and Triton fewer in practice."""
_MAX_TEXT = 2**17
"""The longest name, version or id in bytes."""


@dataclass(frozen=True)
class Limits:
    """The most that one message may hold.

    Attributes:
        tensors: Inputs, listed outputs and raw contents, each.
        parameters: Parameters of the request and of its tensors, together.
        elements: Elements of all BYTES tensors together.
        text: Bytes of the value of a parameter, and of an error message.
        parsed: Bytes of typed contents after parsing, beyond twice the length of the message.
    """

    tensors: int = 256
    parameters: int = 1024
    elements: int = 2**16
    text: int = 2**16
    parsed: int = 2**24

    @property
    def fields(self) -> int:
        """Fields of any kind, those that nobody knows among them."""
        return 16 * self.tensors + 4 * self.parameters + self.elements


REPLY_LIMITS: Final = Limits()
"""Of replies: servers may answer with as many labels as they like."""


@dataclass(frozen=True)
class _Field:
    """A field that is looked at.

    Attributes:
        name: For error messages.
        limit: The attribute of `Limits` with the most such fields of a message; None if only `Limits.fields` bounds it.
        inside: The fields of the message that it holds; None if it holds none.
        longest: The most bytes of its contents; None if only the message bounds it.
        growth: Bytes that a byte of its contents may take when it is parsed.
        dimensions: Whether its numbers are dimensions of a tensor.
    """

    name: str
    limit: str | None = None
    inside: "Mapping[int, _Field] | None" = None
    longest: int | None = None
    growth: int = 0
    dimensions: bool = False


_LENGTH_OF_ELEMENT = struct.Struct("<I")
_NAME = _Field("name", longest=_MAX_TEXT)
_DATATYPE = _Field("datatype", longest=_MAX_TEXT)
_VALUE = _Field("parameter's value", inside={3: _Field("text of a parameter", "text")})
_PARAMETERS = _Field("parameters", "parameters", {1: _NAME, 2: _VALUE})
_CONTENTS = _Field(
    "contents",
    inside={
        **{number: _Field("contents", growth=growth) for number, growth in enumerate((1, 4, 8, 4, 8, 1, 1), 1)},
        8: _Field("elements", "elements"),
    },
)
_TENSOR = {1: _NAME, 2: _DATATYPE, 3: _Field("dimensions", dimensions=True), 4: _PARAMETERS, 5: _CONTENTS}
_HEAD = {1: _NAME, 2: _NAME, 3: _NAME, 4: _PARAMETERS}
_RAW = _Field("raw contents", "tensors")
_OUTPUTS = _Field("outputs", "tensors", _TENSOR)
_INPUTS = _Field("inputs", "tensors", _TENSOR)
REQUEST: Mapping[int, _Field] = {
    **_HEAD,
    5: _INPUTS,
    6: _Field("listed outputs", "tensors", {1: _NAME, 2: _PARAMETERS}),
    7: _RAW,
}
"""Fields of a ModelInferRequest."""
REPLY: Mapping[int, _Field] = {**_HEAD, 5: _OUTPUTS, 6: _RAW}
"""Fields of a ModelInferResponse."""
STREAM_REPLY: Mapping[int, _Field] = {
    **REPLY,
    1: _Field("error message", "text"),
    2: _Field("reply in the envelope", inside=REPLY),
}
"""Fields of the replies of a stream in both dialects, which may be read in either."""
MODEL_CONTROL: Mapping[int, _Field] = {1: _NAME, 2: _NAME, 3: _PARAMETERS}
"""Fields of a RepositoryModelLoadRequest."""


@dataclass
class _Walk:
    """The walk through one message.

    Attributes:
        data: The message.
        limits: The most that it may hold.
        counts: Fields with a limit of their own, by name.
        fields: All fields so far.
        parsed: Bytes that the typed contents so far take when they are parsed.
        raw: Beginnings and ends of the raw contents.
        of_bytes: Numbers of the tensors whose datatype is BYTES.
    """

    data: bytes
    limits: Limits
    counts: dict[str, int] = field(default_factory=dict)
    fields: int = 0
    parsed: int = 0
    raw: list[tuple[int, int]] = field(default_factory=list)
    of_bytes: set[int] = field(default_factory=set)


def check_message(data: bytes, fields: Mapping[int, _Field], limits: Limits) -> None:
    """Make sure that a serialised message can be parsed at a bounded cost.

    A message that is not well-formed ends the walk where the parser would end too, and is left to the parser.

    Args:
        data: The message.
        fields: The fields of its type: `REQUEST`, `REPLY`, `STREAM_REPLY` or `MODEL_CONTROL`.
        limits: The most that it may hold.

    Raises:
        RequestError: The message holds more.
    """
    walk = _Walk(data, limits)
    _look_into(walk, 0, len(data), fields)
    _check_elements(walk)


def _look_into(walk: _Walk, position: int, end: int, known: Mapping[int, _Field]) -> None:
    """Count the fields of the message in `data[position:end]`."""
    data, dimensions, most = walk.data, 0, walk.limits.fields
    while position < end:
        walk.fields += 1
        if walk.fields > most:
            raise RequestError(f"the message has more than {most} fields")
        tag = data[position]
        position += 1
        if tag > 127:
            tag, position = _varint(data, position - 1, end)
        found, kind, start = known.get(tag >> 3), tag & 7, position
        if kind == _LENGTH:
            if position >= end:
                return
            length = data[position]
            position += 1
            if length > 127:
                length, position = _varint(data, position - 1, end)
            start, position = position, position + length
        elif kind == _VARINT:
            _, position = _varint(data, position, end)
        elif kind in _FIXED:
            position += _FIXED[kind]
        elif kind not in _GROUPS:
            return
        if position > end:
            return
        if found is None:
            continue
        if found.dimensions:
            dimensions += 1 if kind != _LENGTH else _count_varints(data, start, position)
            if dimensions > _MAX_DIMENSIONS:
                raise RequestError(f"a tensor has more than {_MAX_DIMENSIONS} dimensions")
        elif kind == _LENGTH:
            _count(walk, found, start, position)
            if found.inside is not None:
                _look_into(walk, start, position, found.inside)


def _count(walk: _Walk, found: _Field, start: int, end: int) -> None:
    """Count a field with contents of some length."""
    length, limit = end - start, found.limit
    if limit == "text":
        if length > walk.limits.text:
            raise RequestError(f"the {found.name} has more than {walk.limits.text} bytes")
    elif limit is not None:
        number = walk.counts[found.name] = walk.counts.get(found.name, 0) + 1
        most = getattr(walk.limits, limit)
        if number > most:
            raise RequestError(f"the message has more than {most} {found.name}")
        if found is _RAW:
            walk.raw.append((start, end))
    if found is _DATATYPE and walk.data[start:end] == b"BYTES":
        walk.of_bytes.add(walk.counts.get(_INPUTS.name, 0) + walk.counts.get(_OUTPUTS.name, 0) - 1)
    if found.longest is not None and length > found.longest:
        raise RequestError(f"a {found.name} has more than {found.longest} bytes")
    if found.growth:
        walk.parsed += found.growth * length
        if walk.parsed > walk.limits.parsed + 2 * len(walk.data):
            raise RequestError("the typed contents take several times their length when they are read; send raw ones")


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """A number and the position behind it, which is behind `end` if it is cut off or too long."""
    value = 0
    for index in range(min(10, end - position)):
        byte = data[position + index]
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, position + index + 1
    return 0, end + 1


def _count_varints(data: bytes, start: int, end: int) -> int:
    if end - start > 10 * _MAX_DIMENSIONS:
        return _MAX_DIMENSIONS + 1
    return sum(byte < 128 for byte in data[start:end])


def _check_elements(walk: _Walk) -> None:
    """Count the elements of raw BYTES tensors: each is preceded by its length in four bytes, little-endian."""
    data, most, count = walk.data, walk.limits.elements, walk.counts.get("elements", 0)
    for index, (start, end) in enumerate(walk.raw):
        position = start if index in walk.of_bytes else end
        while position + 4 <= end:
            position += 4 + _LENGTH_OF_ELEMENT.unpack_from(data, position)[0]
            count += 1
            if count > most:
                raise RequestError(f"the message has more than {most} elements")
