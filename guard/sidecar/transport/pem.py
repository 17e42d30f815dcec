"""PEM files as gRPC's BoringSSL reads them, which takes fewer forms, keys and signatures than the OpenSSL of Python.

OpenSSL says whether a key belongs to a certificate; this module says whether gRPC can use the two, and why not.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_BLOCK = re.compile(
    rb"^-----BEGIN ([A-Z0-9 ]+)-----[ \t\r]*\n(.*?)^-----END \1-----[ \t\r]*$", re.DOTALL | re.MULTILINE
)
_CERTIFICATES = frozenset({"CERTIFICATE", "X509 CERTIFICATE"})
_KEYS = frozenset({"PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"})
_PASSED_OVER = frozenset({"EC PARAMETERS", "DH PARAMETERS"})
_BOM = b"\xef\xbb\xbf"

_OID, _SEQUENCE, _VERSION = 0x06, 0x30, 0xA0
_RSA, _EC = "1.2.840.113549.1.1.1", "1.2.840.10045.2.1"
_ED25519 = "1.3.101.112"
_CURVES = {
    "1.2.840.10045.3.1.7": "P-256",
    "1.3.132.0.34": "P-384",
    "1.3.132.0.35": "P-521",
    "1.3.132.0.33": "P-224",
}
_OWN = frozenset({"RSA", "P-256", "P-384"})
"""Keys that both ends of gRPC shake hands with: P-521 and Ed25519 are read, and then no handshake succeeds."""
_OF_AUTHORITIES = frozenset({"RSA", "P-256", "P-384", "P-521", "P-224", "Ed25519"})
"""Keys whose signatures on certificates BoringSSL can check."""
_RSA_BITS = range(1024, 8193)
_SIGNATURES = frozenset(
    {
        *(f"1.2.840.113549.1.1.{number}" for number in (5, 14, 11, 12, 13)),  # RSA with SHA-1, -224, -256, -384, -512
        *(f"1.2.840.10045.4.{number}" for number in ("1", "3.1", "3.2", "3.3", "3.4")),  # ECDSA with the same
        _ED25519,
    }
)
_PSS = "1.2.840.113549.1.1.10"
_PSS_PARAMETERS = frozenset(
    bytes.fromhex(
        f"a00f300d060960864801650304020{digest}0500a11c301a06092a864886f70d010108300d060960864801650304020{digest}0500"
        f"a2030201{salt}"
    )
    for digest, salt in (("1", "20"), ("2", "30"), ("3", "40"))
)
"""SHA-256, -384 and -512, each with a salt as long as the digest: the only forms of RSA-PSS that BoringSSL takes."""


@dataclass(frozen=True)
class Block:
    """One block of a PEM file.

    Attributes:
        label: Its kind, such as `CERTIFICATE`.
        data: What it contains: DER.
    """

    label: str
    data: bytes

    def to_pem(self) -> bytes:
        """The block in the form that every reader takes."""
        text = base64.encodebytes(self.data).replace(b"\n", b"")
        lines = b"\n".join(text[start : start + 64] for start in range(0, len(text), 64))
        return b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (label := self.label.encode(), lines, label)


def certificate_chain(data: bytes) -> bytes:
    """The certificates of a file, the owner's first, as the PEM that gRPC is given.

    Raises:
        ValueError: gRPC cannot use them; the message says why.
    """
    chain = _of_kind(data, _CERTIFICATES, "certificate")
    for block in chain:
        kind, trouble = _describe(block.data)
        if block is chain[0] and kind not in _OWN:
            raise ValueError(f"its key is {kind}, which gRPC cannot use; take RSA, or ECDSA on P-256 or P-384")
        if trouble:
            raise ValueError(trouble)
    return b"".join(Block("CERTIFICATE", block.data).to_pem() for block in chain)


def private_key(data: bytes) -> bytes:
    """The private key of a file, as the PEM that gRPC is given; its certificate tells what kind of key it is.

    Raises:
        ValueError: There is none, or its form is one that gRPC does not read.
    """
    return _of_kind(data, _KEYS, "private key")[0].to_pem()


def authorities(data: bytes, *, leave_out: bool = False) -> bytes:
    """The certificates of authorities in a file, as the PEM that gRPC is given.

    Args:
        data: The file.
        leave_out: Whether those that gRPC cannot use are left out, as long as there are others.

    Raises:
        ValueError: gRPC cannot use one of them, or none; the message says why.
    """
    usable = []
    for number, block in enumerate(_of_kind(data, _CERTIFICATES, "certificate"), start=1):
        kind, _ = _describe(block.data)
        if kind in _OF_AUTHORITIES:
            usable.append(block)
        elif not leave_out:
            raise ValueError(f"the key of certificate {number} is {kind}, whose signatures gRPC cannot check")
    if not usable:
        raise ValueError("none of its certificates has a key whose signatures gRPC can check")
    return b"".join(Block("CERTIFICATE", block.data).to_pem() for block in usable)


def _of_kind(data: bytes, labels: frozenset[str], name: str) -> list[Block]:
    found = [block for block in _blocks(data) if block.label in labels]
    if not found:
        raise ValueError(f"it contains no {name}")
    return found


def _blocks(data: bytes) -> Iterator[Block]:
    """The blocks of a file; text between them is passed over, as every reader does.

    Raises:
        ValueError: The file has a form that gRPC does not read, or reads otherwise than other programs.
    """
    if data.startswith(_BOM):
        raise ValueError("it begins with a byte-order mark, behind which gRPC finds nothing; save it without one")
    ends = 0
    for match in _BLOCK.finditer(data):
        ends += 1
        label, text = match[1].decode("ascii"), match[2]
        if label not in _CERTIFICATES | _KEYS | _PASSED_OVER:
            raise ValueError(f"it contains a block {label!r}, which gRPC does not read")
        if b":" in text:
            raise ValueError(f"a block {label!r} has headers, as encrypted keys have, which gRPC does not read")
        try:
            yield Block(label, base64.b64decode(b"".join(text.split()), validate=True))
        except binascii.Error as error:
            raise ValueError(f"a block {label!r} is not valid base64") from error
    if ends != data.count(b"-----BEGIN "):
        raise ValueError("a block does not begin at the start of a line, or has no end")


def _describe(certificate: bytes) -> tuple[str, str]:
    """The kind of a certificate's key, and why gRPC cannot check who signed the certificate, or "".

    Raises:
        ValueError: It is not a certificate in DER.
    """
    try:
        body, algorithm, _ = _children(_only(certificate))
        _, _, issuer, _, subject, keys, *_ = (field for field in _children(body[1]) if field[0] != _VERSION)
        algorithm_and_parameters, key = _children(keys[1])
        identifier, *parameters = _children(algorithm_and_parameters[1])
        kind = _kind(_dotted(identifier), parameters, key)
        # Nobody checks the signature of a certificate that signed itself.
        return kind, "" if issuer == subject else _unchecked(_children(algorithm[1]))
    except (IndexError, ValueError) as error:
        raise ValueError("it contains a certificate that is damaged") from error


def _unchecked(algorithm: list[tuple[int, bytes]]) -> str:
    """Why gRPC cannot check a signature of this algorithm; "" if it can."""
    name = _dotted(algorithm[0])
    if name == _PSS:
        good = len(algorithm) == 2 and algorithm[1][1] in _PSS_PARAMETERS
        return "" if good else "it is signed with a form of RSA-PSS that gRPC cannot check"
    return "" if name in _SIGNATURES else f"it is signed with the algorithm {name}, which gRPC cannot check"


def _kind(algorithm: str, parameters: list[tuple[int, bytes]], key: tuple[int, bytes]) -> str:
    """What people call a key of this algorithm."""
    if algorithm == _RSA:
        number = _children(_only(key[1][1:]))[0][1]
        bits = int.from_bytes(number).bit_length()
        return "RSA" if bits in _RSA_BITS else f"RSA of {bits} bits"
    if algorithm == _EC:
        if not parameters or parameters[0][0] != _OID:
            return "ECDSA on a curve that is given by its parameters and not by its name"
        curve = _dotted(parameters[0])
        return _CURVES.get(curve, f"ECDSA on the curve {curve}")
    return "Ed25519" if algorithm == _ED25519 else f"of the algorithm {algorithm}"


def _only(data: bytes) -> bytes:
    """The content of the only value in DER."""
    ((tag, content),) = _children(data)
    if tag != _SEQUENCE:
        raise ValueError
    return content


def _children(data: bytes) -> list[tuple[int, bytes]]:
    """The values in DER, as tags and contents.

    Raises:
        ValueError: A value is cut off, or its length is not written in the shortest form.
        IndexError: The data ends within a head.
    """
    found, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(data[at : at + size]), at + size
            if not 1 <= size <= 4 or length < max(0x80, 1 << 8 * (size - 1)):
                raise ValueError
        if at + length > len(data):
            raise ValueError
        found.append((tag, data[at : at + length]))
        at += length
    return found


def _dotted(value: tuple[int, bytes]) -> str:
    """An object identifier as people write it."""
    tag, content = value
    if tag != _OID or not content or content[-1] & 0x80:
        raise ValueError
    numbers = list(_base_128(content))
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, (first, numbers[0] - 40 * first, *numbers[1:])))


def _base_128(content: Iterable[int]) -> Iterator[int]:
    number = 0
    for byte in content:
        number = number << 7 | byte & 0x7F
        if not byte & 0x80:
            yield number
            number = 0
