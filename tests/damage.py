"""Messages and files that were damaged on purpose."""

import io

import numpy as np
from PIL import Image


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((np.arange(20 * 24 * 3) % 251).astype(np.uint8).reshape(20, 24, 3)).save(buffer, kind)
    return buffer.getvalue()


FILES = [encoded(kind) for kind in ("PNG", "JPEG", "WEBP")]


def damaged(data: bytes, changes: list[tuple[str, int, int]], *, near: int) -> bytes:
    """Data with some changes, most of them within its first bytes: there is the structure.

    Args:
        data: Whole.
        changes: What is done, where, and a value: `set` a byte, `flip` a bit, `cut` or `repeat` bytes, `end` there.
        near: How many bytes are the first.
    """
    changed = bytearray(data)
    for index, (kind, position, value) in enumerate(changes):
        if not changed:
            break
        at = position % (len(changed) if index % 2 else min(near, len(changed)))
        if kind == "set":
            changed[at] = value
        elif kind == "flip":
            changed[at] ^= 1 << value
        elif kind == "cut":
            del changed[at : at + value]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + value]
        else:
            del changed[max(at, 1) :]
    return bytes(changed)
