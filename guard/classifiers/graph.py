"""Untrusted ONNX: every field of a file is looked at before ONNX Runtime sees it.

ONNX Runtime follows the names of files in a model, also in one that is loaded from bytes: it then looks for them below
the working directory. Such names can stand wherever a tensor can: in initialisers, in sparse ones, in attributes of
nodes, in graphs inside of attributes, in functions, in training information. Therefore this module does not look where
tensors usually are. It walks through the encoded bytes, with the field numbers of the package onnx, and refuses what it
does not know: a field without a name there is one that ONNX Runtime might read.

Nothing is copied, and bounds are kept while walking, so that a hostile file costs no memory.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from onnx import ModelProto

_DOMAINS: Final = (b"", b"ai.onnx")
"""The standard operators; others could be anything that a build of ONNX Runtime has."""
_MAX_FIELDS, _MAX_DEPTH = 1_000_000, 32
_MAX_STRUCTURE = 128 * 2**20
"""Bytes that are not numbers of tensors."""
_NEVER = {
    ("TensorProto", "external_data"): "a tensor that is kept in another file",
    ("ModelProto", "functions"): "functions of its own",
    # Loops need no time to load, and for ever to run.
    ("AttributeProto", "g"): "a graph inside of a node",
    ("AttributeProto", "graphs"): "graphs inside of a node",
    ("ModelProto", "training_info"): "training information",
}
"""Fields that an exported classifier does not have, and what they would say."""
_DOMAIN_FIELDS = {("NodeProto", "domain"), ("OperatorSetIdProto", "domain")}
_LOCATION = ("TensorProto", "data_location")
_NUMBERS = ("TensorProto", "raw_data")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_graph(data: bytes) -> None:
    """Make sure that a file is an ONNX model that is whole in itself.

    Args:
        data: The encoded `ModelProto`.

    Raises:
        ValueError: It is no ONNX model, is larger or nested deeper than a classifier is, has fields that are not known
            here, or asks for another file, for operators of another domain, or for functions of its own.
    """
    view = memoryview(data)
    todo = [(0, len(view), ModelProto.DESCRIPTOR, 0)]
    fields = structure = 0
    while todo:
        start, end, message, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} messages")
        known = _fields(message)
        for number, wire, at, after in _walk(view, start, end):
            fields += 1
            name, kind, inner, is_text = known.get(number, ("", -1, None, False))
            if wire != kind and not (wire == _BYTES and inner is None and kind in {_VARINT, _FIXED32, _FIXED64}):
                raise ValueError(f"it has a field that onnx does not know: {number} of {message.name}")
            field = message.name, name
            _check_field(field, wire, view, at, after)
            if is_text:
                _check_text(field, view[at:after])
            structure += 0 if field == _NUMBERS or inner else after - at
            if fields > _MAX_FIELDS or structure > _MAX_STRUCTURE:
                raise ValueError(f"it has more than {_MAX_FIELDS} fields, or {_MAX_STRUCTURE} bytes beside its weights")
            if inner is not None:
                todo.append((at, after, inner, depth + 1))
    if not fields:
        raise ValueError("it is empty")


def _check_field(field: tuple[str, str], wire: int, view: memoryview, at: int, after: int) -> None:
    if field in _NEVER:
        raise ValueError(f"it has {_NEVER[field]}; refused")
    if field == _LOCATION and (wire != _VARINT or any(view[at:after])):
        raise ValueError(f"it has {_NEVER['TensorProto', 'external_data']}; refused")
    if field in _DOMAIN_FIELDS and (domain := bytes(view[at : min(after, at + 40)])) not in _DOMAINS:
        raise ValueError(f"it has operators of the domain {domain.decode(errors='replace')!r}; refused")


def _check_text(field: tuple[str, str], value: memoryview) -> None:
    try:
        str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the field {field[1]} of a {field[0]} is not valid UTF-8") from error


@cache
def _fields(message: Any) -> dict[int, tuple[str, int, Any, bool]]:  # noqa: ANN401 - protobuf's descriptors have no public type
    """Name, wire type, message type if it is one, and whether it is text, of each field of a message, by number."""
    kinds = {
        message.fields[0].TYPE_FLOAT: _FIXED32,
        message.fields[0].TYPE_DOUBLE: _FIXED64,
        message.fields[0].TYPE_STRING: _BYTES,
        message.fields[0].TYPE_BYTES: _BYTES,
        message.fields[0].TYPE_MESSAGE: _BYTES,
    }
    return {
        each.number: (each.name, kinds.get(each.type, _VARINT), each.message_type, each.type == each.TYPE_STRING)
        for each in message.fields
    }


def _walk(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, start and end of the value of each field in a range of bytes."""
    at = start
    while at < end:
        tag, at = _varint(view, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, after = _varint(view, at, end)
        elif wire == _BYTES:
            length, at = _varint(view, at, end)
            after = at + length
        elif wire in {_FIXED32, _FIXED64}:
            after = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError("it is not encoded as protobuf")
        if after > end:
            raise ValueError("it is truncated, or not encoded as protobuf")
        yield number, wire, at, after
        at = after


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """A number of variable length, and the position behind it."""
    value = shift = 0
    while at < end and shift < 64:
        byte = view[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("it is truncated, or not encoded as protobuf")
