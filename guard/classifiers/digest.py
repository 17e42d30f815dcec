"""The digest that identifies a classifier.

A CLIP classifier is more than its weights: another tokenizer, another resize or another prompt is another classifier.
Each part has a digest of its own, so that an error message can say which parts differ.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

PARTS = ("architecture", "weights", "preprocessing", "tokenizer", "classes")


def sha256(data: bytes | memoryview) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def canonical(document: object) -> bytes:
    """JSON with sorted keys and no white space: equal documents give equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclass(frozen=True)
class ClassifierDigest:
    """SHA-256 of each part of a classifier.

    Attributes:
        parts: One hexadecimal digest for each of `PARTS`.
    """

    parts: Mapping[str, str]

    @property
    def root(self) -> str:
        """One digest over all parts, which identifies the classifier."""
        return sha256(canonical({part: self.parts[part] for part in PARTS}))

    def differences(self, other: "ClassifierDigest") -> tuple[str, ...]:
        """The parts in which two classifiers differ."""
        return tuple(part for part in PARTS if self.parts[part] != other.parts[part])
