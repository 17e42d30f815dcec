"""OpenSSF model signing, specification v1.0: who vouches for the bytes of a model.

A bundle lists every file of a folder with its digest. It says "these bytes", where a certificate of guard says
"examined". It is written beside a certificate for those whose tools know it, and can be demanded besides one. Keys are
ECDSA; Sigstore's identities and logs, which need a network, are not read.

guard refuses what the specification or its reference implementation allow, where it would leave a file unsigned that
guard opens: lists of ignored files that hide one, empty models, names that occur twice or that are not plain, and
digests that are not what the stated method makes.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from guard._documents import parse_json, read_text
from guard._files import replace_file
from guard.certificates.authorities import Authority, verifies
from guard.certificates.envelope import IN_TOTO, MAX_BYTES, Envelope, pre_authentication
from guard.certificates.keys import PrivateKey, PublicKey
from guard.certificates.statement import STATEMENT_TYPE
from guard.certificates.subjects import MAX_FILES, check_names, hash_files
from guard.classifiers.digest import canonical
from guard.errors import CertificateError, UsageError

PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_IGNORED = (".git", ".gitattributes", ".github", ".gitignore")
"""What the reference implementation leaves out by default; guard opens nothing of these names."""
_HEX = frozenset("0123456789abcdef")


def write_bundle(folder: Path, file: Path, key: PrivateKey) -> None:
    """Sign all files of a folder.

    Args:
        folder: The folder of the model.
        file: The bundle to write; it is not among the files that are signed.
        key: An ECDSA P-256 key.

    Raises:
        UsageError: The key is of another kind, or the folder holds no file.
        CertificateError: A file cannot be read, is a link, or has a name that is not plain.
    """
    if key.public.algorithm != "ECDSA P-256":
        raise UsageError("a signature in the form of OpenSSF model signing needs an ECDSA P-256 key")
    inside = _inside(folder, file)
    files = hash_files(folder, "", _names(folder, {*_IGNORED, *inside}))
    if not files:
        raise UsageError(f"{folder} holds no file that could be signed")
    resources = [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in sorted(files.items())]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": folder.resolve().name, "digest": {"sha256": _root(resources)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [*inside, *_IGNORED],
            },
            "resources": resources,
        },
    }
    payload = canonical(statement)
    bundle = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _hint(key.public)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": IN_TOTO,
            "signatures": [
                {"sig": base64.b64encode(key.sign(pre_authentication(payload, IN_TOTO))).decode(), "keyid": ""}
            ],
        },
    }
    replace_file(file, json.dumps(bundle, indent=1).encode() + b"\n")


def checked(
    folder: Path, file: Path | None, authorities: Iterable[Authority], opened: Iterable[str]
) -> dict[str, CertificateError | None]:
    """Whether each of some authorities signed a folder: by id, why not, or None; empty without a bundle."""
    found: dict[str, CertificateError | None] = {}
    for authority in authorities if file is not None else ():
        try:
            check_bundle(folder, file, authority, opened)  # type: ignore[arg-type] # without a file there is none
        except CertificateError as error:
            found[authority.id] = error
        else:
            found[authority.id] = None
    return found


def check_bundle(
    folder: Path, file: Path, authority: Authority, opened: Iterable[str], *, now: datetime | None = None
) -> None:
    """Make sure that an authority signed a folder as it is now.

    Args:
        folder: The folder of the model.
        file: The bundle.
        authority: Who must have signed it.
        opened: Names of the files of the folder that guard opens, each of which must be signed.
        now: The time, at which a chain of certificates must be in force; None for that of the clock.

    Raises:
        CertificateError: The bundle is damaged or of somebody else; a file was changed, added, removed or renamed;
            or it leaves out what guard opens.
    """
    try:
        envelope, material = _contents(parse_json(read_text(file, MAX_BYTES, CertificateError)))
        key = authority.signing_key(material, now or datetime.now(UTC))
        message = pre_authentication(envelope.payload, envelope.payload_type)
        # A bundle names keys in ways of its signer; the key that is pinned decides.
        if not any(verifies(key, each.value, message) for each in envelope.signatures):
            raise CertificateError(f"{file} was not signed by the key that is pinned")
        signed, ignored = _manifest(envelope.payload)
        ignored = _acceptable(ignored, _inside(folder, file))
    except ValueError as error:
        raise CertificateError(f"{file} is damaged: {error}") from error
    found = hash_files(folder, "", _names(folder, {*ignored, *_inside(folder, file)}))
    for name in sorted({*signed, *found, *opened}):
        if name not in signed:
            raise CertificateError(f"{folder / name} is not among the files that {file} signs")
        if name not in found:
            raise CertificateError(f"{folder / name} is missing; {file} signs it")
        if signed[name] != found[name]:
            raise CertificateError(f"{folder / name} is not the file that {file} signs (its SHA-256 differs)")


def _contents(bundle: Any) -> tuple[Envelope, object]:  # noqa: ANN401 - JSON of anybody
    """The envelope of a bundle, and what it says about its key."""
    if not isinstance(bundle, Mapping) or not isinstance(inner := bundle.get("dsseEnvelope"), Mapping):
        raise ValueError("it is not a Sigstore bundle with a DSSE envelope")  # noqa: TRY004 - JSON of anybody
    if bundle.get("mediaType") != _MEDIA_TYPE:
        raise ValueError(f"its mediaType is not {_MEDIA_TYPE}")
    envelope = Envelope.parse(dict(inner))
    if envelope.payload_type != IN_TOTO:
        raise ValueError(f"its payloadType is not {IN_TOTO}")
    return envelope, bundle.get("verificationMaterial")


def _manifest(payload: bytes) -> tuple[dict[str, str], list[str]]:
    """SHA-256 by name of file, and the paths that are not signed."""
    try:
        document = parse_json(payload.decode())
    except UnicodeDecodeError as error:
        raise ValueError("its payload is not valid UTF-8") from error
    for name, expected in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if not isinstance(document, Mapping) or document.get(name) != expected:
            raise ValueError(f"its {name} is not {expected}")
    try:
        (subject,) = document["subject"]
        root, predicate = subject["digest"]["sha256"], document["predicate"]
        serialization, resources = predicate["serialization"], predicate["resources"]
        method = serialization["method"], serialization["hash_type"], serialization.get("allow_symlinks", False)
        ignored = serialization.get("ignore_paths", [])
        listed = [(each["name"], each["algorithm"], each["digest"]) for each in resources]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("it is not a statement of model signing v1.0") from error
    if method != ("files", "sha256", False):
        raise ValueError(f"it was made by {method}; guard takes files, sha256 and no links")
    if not 1 <= len(listed) <= MAX_FILES:
        raise ValueError(f"it lists {len(listed)} files")
    texts = (*ignored, *(name for name, _, _ in listed)) if isinstance(ignored, list) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name is no text")
    if any(algorithm != "sha256" or not _is_digest(digest) for _, algorithm, digest in listed):
        raise ValueError("a digest is not a SHA-256 in lower case")
    names = [name for name, _, _ in listed]
    check_names(names)
    if names != sorted(names) or root != _root(resources):
        raise ValueError("its files are not in order, or their digests do not make that of its subject")
    return {name: digest for name, _, digest in listed}, ignored


def _acceptable(ignored: Iterable[str], own: Iterable[str]) -> list[str]:
    """The ignored paths, each of which must be one that guard ignores too.

    Raises:
        ValueError: One could hide a file.
    """
    allowed = {*_IGNORED, *own}
    for path in ignored:
        if path not in allowed:
            raise ValueError(f"it leaves {path[:80]!r} unsigned")
    return list(ignored)


def _names(folder: Path, ignored: Iterable[str]) -> list[str]:
    """Names of all files below a folder but the ignored ones.

    Raises:
        CertificateError: One is a link or no file, or there are too many.
    """
    left_out, found = set(ignored), []
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if (below / name).as_posix() not in left_out]
        for name in (*folders, *files):
            path = (below / name).as_posix()
            if (folder / path).is_symlink():
                raise CertificateError(f"{folder / path} is a link; a signed model must not have any")
            if name in files and path not in left_out:
                found.append(path)
        if len(found) > MAX_FILES:
            raise CertificateError(f"{folder} has more than {MAX_FILES} files")
    return sorted(found)


def _inside(folder: Path, file: Path) -> list[str]:
    """The name of a file below a folder, if it lies there."""
    whole, place = folder.resolve(), file.resolve()
    return [place.relative_to(whole).as_posix()] if place.is_relative_to(whole) else []


def _root(resources: Iterable[Mapping[str, str]]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= _HEX


def _hint(key: PublicKey) -> str:
    return hashlib.sha256(key.to_pem()).hexdigest()
