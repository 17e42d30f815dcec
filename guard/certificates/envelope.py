"""DSSE envelopes (secure-systems-lab/dsse, v1.0.2): a payload, and signatures of it by several keys.

What is signed is not the JSON but the payload's type and bytes, so that nobody has to agree on a form of JSON. The
envelope itself is read by the letter: a field that is not in the specification, or a second form of the same bytes, is
refused.
"""

import base64
import binascii
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from guard._documents import parse_json
from guard.certificates.keys import PrivateKey, PublicKey
from guard.errors import CertificateError

IN_TOTO = "application/vnd.in-toto+json"
MAX_BYTES = 16 * 2**20
"""Largest envelope that is read."""
MAX_SIGNATURES = 16


@dataclass(frozen=True)
class Signature:
    """One signature of an envelope.

    Attributes:
        keyid: What the signer calls its key; "" for nothing.
        value: The signature.
    """

    keyid: str
    value: bytes


@dataclass(frozen=True)
class Envelope:
    """A signed payload.

    Attributes:
        payload: The bytes that were signed.
        payload_type: What they are.
        signatures: At most `MAX_SIGNATURES`.
    """

    payload: bytes
    payload_type: str
    signatures: tuple[Signature, ...]

    @classmethod
    def sign(cls, payload: bytes, keys: Sequence[PrivateKey], payload_type: str = IN_TOTO) -> "Envelope":
        """Sign a payload with one or several keys."""
        message = pre_authentication(payload, payload_type)
        signatures = tuple(Signature(key.public.id, key.sign(message)) for key in keys)
        return cls(payload, payload_type, signatures)

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Envelope":
        """The envelope in a file.

        Args:
            data: What the file contains.
            where: Its name, for errors.

        Raises:
            CertificateError: It is no envelope.
        """
        try:
            return cls.parse(parse_json(data.decode()))
        except UnicodeDecodeError as error:
            raise CertificateError(f"{where} is damaged: it is not valid UTF-8") from error
        except ValueError as error:
            raise CertificateError(f"{where} is damaged: {error}") from error

    @classmethod
    def parse(cls, document: Any) -> "Envelope":  # noqa: ANN401 - JSON of anybody
        """The envelope that a JSON value describes.

        Raises:
            ValueError: It is none.
        """
        if not isinstance(document, dict) or document.keys() != {"payload", "payloadType", "signatures"}:
            raise ValueError("it is not a DSSE envelope of payload, payloadType and signatures")
        kind, signatures = document["payloadType"], document["signatures"]
        if not isinstance(kind, str):
            raise ValueError("payloadType is no text")  # noqa: TRY004 - it is JSON of anybody
        if not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
            raise ValueError(f"it does not hold 1 to {MAX_SIGNATURES} signatures")
        return cls(_bytes(document["payload"], "payload"), kind, tuple(map(_signature, signatures)))

    def to_json(self) -> bytes:
        """The envelope as JSON."""
        document = {
            "payload": base64.b64encode(self.payload).decode(),
            "payloadType": self.payload_type,
            "signatures": [
                {"keyid": each.keyid, "sig": base64.b64encode(each.value).decode()} for each in self.signatures
            ],
        }
        return json.dumps(document, indent=1).encode() + b"\n"

    def signers(self, trusted: Collection[PublicKey]) -> tuple[PublicKey, ...]:
        """The trusted keys that signed, each once, in their given order.

        Each key is tried on each signature: the id in a signature is a hint that anybody can write. One that names
        another key than the one that made it is no signature of that key all the same, so that an envelope cannot seem
        to be signed by somebody else.
        """
        message = pre_authentication(self.payload, self.payload_type)
        return tuple(
            key
            for key in dict.fromkeys(trusted)
            if any(each.keyid in {"", *key.ids} and key.verifies(each.value, message) for each in self.signatures)
        )


def pre_authentication(payload: bytes, payload_type: str) -> bytes:
    """The bytes that are signed: DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _signature(document: Any) -> Signature:  # noqa: ANN401 - as above
    if not isinstance(document, dict) or not {"sig"} <= document.keys() <= {"sig", "keyid"}:
        raise ValueError("a signature does not consist of sig and keyid")
    keyid = document.get("keyid")
    if keyid is not None and not isinstance(keyid, str):
        raise ValueError("a keyid is no text")
    return Signature(keyid or "", _bytes(document["sig"], "sig"))


def _bytes(text: Any, name: str) -> bytes:  # noqa: ANN401 - as above
    """The bytes of a text in base64, in the standard or the URL-safe alphabet, and in no other form of the same."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is no text")  # noqa: TRY004 - as above
    for altchars in (None, b"-_"):
        try:
            data = base64.b64decode(text, altchars, validate=True)
        except (binascii.Error, ValueError):
            continue
        if base64.b64encode(data, altchars).decode() == text:
            return data
    raise ValueError(f"{name} is not base64")
