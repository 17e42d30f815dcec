"""Attacks on certificates: each is refused, by the right rule, and without a traceback.

Many are accepted by the reference implementation of OpenSSF model signing.
"""

import base64
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from guard._documents import open_regular, recording
from guard.certificates import (
    CERTIFICATE_FILE,
    Admission,
    Envelope,
    Policy,
    PrivateKey,
    files_of_model,
    files_of_profile,
    verify,
)
from guard.certificates.authorities import Authority
from guard.certificates.envelope import IN_TOTO, pre_authentication
from guard.certificates.model_signing import check_bundle, write_bundle
from guard.errors import CertificateError
from guard.profiles import Profile
from tests.unit.certificates.conftest import NOW, certified, certified_once, keys, write_key

__all__ = ["certified", "certified_once", "keys"]


def decide(folder: Path, keys: Path, part: str = "model") -> Admission:
    """What an init container would say."""
    try:
        files = files_of_model(folder / part) | files_of_profile(folder / "profile")
    except CertificateError as error:
        return verify(b"", {}, [Policy.trusting([keys / "ed.pub"])], str(error), now=NOW)
    certificate = folder / "profile" / CERTIFICATE_FILE
    return verify(certificate, files, [Policy.trusting([keys / "ed.pub"])], str(folder), now=NOW)


def swap_classes(folder: Path) -> None:
    path = folder / "model" / "classes.json"
    document = json.loads(path.read_text())
    document["classes"] = document["classes"][1:] + document["classes"][:1]
    path.write_text(json.dumps(document))


def swap_preprocessing(folder: Path) -> None:
    path = folder / "model" / "open_clip_config.json"
    path.write_text(path.read_text().replace('"mean"', '"std_"').replace('"std"', '"mean"').replace('"std_"', '"std"'))


def add_tokenizer(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").write_text("{}")


def pickle_weights(folder: Path) -> None:
    (folder / "model" / "open_clip_model.safetensors").write_bytes(pickle.dumps({"weights": 1}))


def rename_weights(folder: Path) -> None:
    path = folder / "model" / "open_clip_model.safetensors"
    path.rename(path.with_name("Open_clip_model.safetensors"))


def remove_classes(folder: Path) -> None:
    (folder / "model" / "classes.json").unlink()


def add_by_case(folder: Path) -> None:
    (folder / "model" / "Classes.json").write_text("{}")


def add_not_utf8(folder: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder / "model") + b"/tokenizer\xff.json"))).write_text("{}")


def change_a_weight(folder: Path) -> None:
    with (folder / "model" / "open_clip_model.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def change_profile(folder: Path) -> None:
    path = folder / "profile" / "profile.json"
    path.write_text(path.read_text().replace('"alpha": 0.', '"alpha": 0.0'))


def remove_banks(folder: Path) -> None:
    (folder / "profile" / "reference.safetensors").unlink()


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (swap_classes, "model/classes.json is not the file"),
        (swap_preprocessing, "model/open_clip_config.json is not the file"),
        (add_tokenizer, "model/tokenizer.json is not a file of the certificate"),
        (pickle_weights, "model/open_clip_model.safetensors is not the file"),
        (rename_weights, "model/Open_clip_model.safetensors is not a file of the certificate"),
        (remove_classes, "model/classes.json is missing"),
        (add_by_case, "model/Classes.json is not a file of the certificate"),
        (change_a_weight, "model/open_clip_model.safetensors is not the file"),
        (change_profile, "profile/profile.json is not the file"),
        (remove_banks, "profile/reference.safetensors is missing"),
    ],
)
def test_a_changed_file_is_refused_by_name(
    certified: Path, keys: Path, attack: Callable[[Path], None], reason: str
) -> None:
    assert decide(certified, keys).admitted
    attack(certified)
    found = decide(certified, keys)
    assert (found.admitted, found.rule) == (False, "subject")
    assert reason in found.reason


def test_a_name_that_is_not_utf8_is_refused(certified: Path, keys: Path) -> None:
    add_not_utf8(certified)
    found = decide(certified, keys)
    assert not found.admitted
    assert "is not a plain relative name" in found.source


def test_the_certificate_of_another_model_is_refused(certified: Path, keys: Path) -> None:
    change_a_weight(certified)
    assert not decide(certified, keys).admitted
    assert decide(certified, keys, "exported").admitted


def signed(document: Any, keys: Path, name: str = "ed") -> bytes:
    payload = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Envelope.sign(payload, [PrivateKey.read(keys / f"{name}.pem")]).to_json()


def payload(folder: Path) -> dict[str, Any]:
    envelope = json.loads((folder / "profile" / CERTIFICATE_FILE).read_bytes())
    document: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return document


def renamed_subject(name: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["subject"].append({"name": name, "digest": {"sha256": "0" * 64}})

    return change


def changed(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed_subject("../secret.txt"), "is not a plain relative name"),
        (renamed_subject("/etc/passwd"), "is not a plain relative name"),
        (renamed_subject("model/./classes.json"), "is not a plain relative name"),
        (renamed_subject("model\\classes.json"), "is not a plain relative name"),
        (renamed_subject("model/cafe\u0301.json"), "is not a plain relative name"),
        (renamed_subject("model/CLASSES.json"), "is listed beside"),
        (renamed_subject("model/classes.json"), "is listed beside"),
        (changed("subject", to=[]), "subject"),
        (changed("_type", to="https://in-toto.io/Statement/v0.1"), "its _type is not"),
        (changed("predicateType", to="https://in-toto.io/attestation/test-result/v0.1"), "its predicateType is not"),
        (changed("predicate", "verdict", "outcome", to="clean"), "predicate.verdict.outcome"),
        (changed("predicate", "expiresAt", to="2099-01-01"), "predicate.expiresAt"),
        (changed("predicate", "expiresAt", to=4102444800), "predicate.expiresAt"),
        (changed("predicate", "verdict", "pValue", to=-1), "predicate.verdict.pValue"),
    ],
)
def test_a_statement_that_means_two_things_is_refused_although_a_trusted_key_signed_it(
    certified: Path, keys: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    document = payload(certified)
    change(document)
    (certified / "profile" / CERTIFICATE_FILE).write_bytes(signed(document, keys))
    found = decide(certified, keys)
    assert (found.admitted, found.rule) == (False, "certificate")
    assert reason in found.reason


def test_a_better_verdict_needs_the_key(certified: Path, keys: Path) -> None:
    document = payload(certified)
    document["predicate"]["scope"]["budget"] = "thorough"
    for name in ("other", "ec"):
        (certified / "profile" / CERTIFICATE_FILE).write_bytes(signed(document, keys, name))
        found = decide(certified, keys)
        assert (found.rule, found.reason) == ("signature", "none of the trusted keys signed the certificate")


def envelopes(folder: Path) -> dict[str, bytes]:
    """Envelopes that are not as the specification says, around a payload that a trusted key signed."""
    good = json.loads((folder / "profile" / CERTIFICATE_FILE).read_bytes())
    text = json.dumps(good)
    (first, *_), body = good["signatures"], good["payload"]
    return {
        "a name twice": text.replace('"payload":', '"payload": "e30=", "payload":').encode(),
        "a list": b"[]",
        "nothing": b"",
        "half": text[: len(text) // 2].encode(),
        "no signature": json.dumps({**good, "signatures": []}).encode(),
        "many signatures": json.dumps({**good, "signatures": [first] * 17}).encode(),
        "an unknown field": json.dumps({**good, "more": 1}).encode(),
        "a signature that is no text": json.dumps({**good, "signatures": [{"sig": 1}]}).encode(),
        "a second form of base64": json.dumps({**good, "payload": body + "\n"}).encode(),
        "base64 with other last bits": json.dumps(
            {**good, "signatures": [{**first, "sig": first["sig"][:-3] + chr(ord(first["sig"][-3]) + 1) + "=="}]}
        ).encode(),
        "another payload type": json.dumps({**good, "payloadType": "application/json"}).encode(),
        "the key id of somebody else": json.dumps({**good, "signatures": [{**first, "keyid": "0" * 64}]}).encode(),
        "deep nesting": b'{"payload":' + b"[" * 100_000,
        "a number of many digits": b'{"payload":' + b"9" * 100_000 + b"}",
        "not UTF-8": b"\xff" + text.encode(),
    }


def test_an_envelope_that_is_not_by_the_letter_is_refused(certified: Path, keys: Path) -> None:
    for what, data in envelopes(certified).items():
        (certified / "profile" / CERTIFICATE_FILE).write_bytes(data)
        found = decide(certified, keys)
        assert not found.admitted, what
        assert found.rule in {"certificate", "signature"}, what


def test_a_key_id_may_be_missing(certified: Path, keys: Path) -> None:
    path = certified / "profile" / CERTIFICATE_FILE
    good = json.loads(path.read_bytes())
    for keyid in ({}, {"keyid": ""}, {"keyid": None}):
        signatures = [{"sig": each["sig"], **keyid} for each in good["signatures"]]
        path.write_bytes(json.dumps({**good, "signatures": signatures}).encode())
        assert decide(certified, keys).admitted


@pytest.mark.parametrize("kind", ["fifo", "folder", "huge"])
def test_a_certificate_that_is_no_plain_file_is_refused(certified: Path, keys: Path, kind: str) -> None:
    path = certified / "profile" / CERTIFICATE_FILE
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    found = decide(certified, keys)
    assert (found.admitted, found.rule) == (False, "certificate")


def test_what_is_recorded_is_what_was_read_whatever_the_name_leads_to_later(tmp_path: Path) -> None:
    """A link that is swapped between check and use: the digest is of what was used."""
    good, evil, name = tmp_path / "good", tmp_path / "evil", tmp_path / "model.onnx"
    good.write_bytes(b"good")
    evil.write_bytes(b"evil")
    name.symlink_to(good)
    with recording() as opened, open_regular(name, 100, CertificateError) as (file, _):
        name.unlink()
        name.symlink_to(evil)
        used = file.read()
    assert used == b"good"
    with recording() as again, open_regular(name, 100, CertificateError):
        pass
    assert opened[name] != again[name]


def written_in_place(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"evil")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def hard_link_swapped(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"evil")


@pytest.mark.parametrize("attack", [written_in_place, hard_link_swapped])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, attack: Callable[[Path], None]) -> None:
    path = tmp_path / "model.onnx"
    (tmp_path / "first").write_bytes(b"good")
    os.link(tmp_path / "first", path)

    def use() -> None:
        with recording(), open_regular(path, 100, CertificateError):
            attack(path)

    with pytest.raises(CertificateError, match="changed while it was read"):
        use()


def test_a_bank_that_is_rewritten_after_the_check_changes_nothing(certified: Path) -> None:
    with recording() as opened:
        profile = Profile.open(certified / "profile")
    assert profile.reference is not None
    before = profile.reference.banks.reference.copy()
    path = certified / "profile" / "reference.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert (profile.reference.banks.reference == before).all()
    assert not profile.reference.banks.reference.flags.writeable
    assert path in opened


# OpenSSF model signing


@pytest.fixture
def bundle(certified: Path, keys: Path) -> Path:
    write_bundle(certified / "model", certified / "model.sig", PrivateKey.read(keys / "ec.pem"))
    return certified / "model.sig"


def check(folder: Path, keys: Path, key: str = "ec") -> None:
    opened = [name.partition("/")[2] for name in files_of_model(folder / "model")]
    check_bundle(folder / "model", folder / "model.sig", Authority.read(keys / f"{key}.pub"), opened)


def resign(bundle: Path, keys: Path, change: Callable[[dict[str, Any]], None], *, root: bool = True) -> None:
    """Change what a bundle says and sign it again with the trusted key, as a careless signer would."""
    import hashlib

    document = json.loads(bundle.read_bytes())
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    change(statement)
    if root:
        digests = b"".join(bytes.fromhex(each["digest"]) for each in statement["predicate"]["resources"])
        statement["subject"][0]["digest"]["sha256"] = hashlib.sha256(digests).hexdigest()
    data = json.dumps(statement).encode()
    signature = PrivateKey.read(keys / "ec.pem").sign(pre_authentication(data, IN_TOTO))
    document["dsseEnvelope"]["payload"] = base64.b64encode(data).decode()
    document["dsseEnvelope"]["signatures"] = [{"sig": base64.b64encode(signature).decode(), "keyid": ""}]
    bundle.write_text(json.dumps(document))


def ignoring(*paths: str) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        statement["predicate"]["serialization"]["ignore_paths"] += paths
        statement["predicate"]["resources"] = [
            each for each in statement["predicate"]["resources"] if each["name"] not in paths and "." not in paths
        ]

    return change


def resource(**values: str) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        statement["predicate"]["resources"][0].update(values)

    return change


def duplicate(statement: dict[str, Any]) -> None:
    first = statement["predicate"]["resources"][0]
    statement["predicate"]["resources"].insert(0, {**first, "digest": "0" * 64})


def unsorted(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"].reverse()


def two_subjects(statement: dict[str, Any]) -> None:
    statement["subject"].append(statement["subject"][0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (ignoring("."), "leaves '.' unsigned|lists 0 files"),
        (ignoring("classes.json"), "leaves 'classes.json' unsigned"),
        (duplicate, "is listed beside"),
        (resource(name="../secret.txt"), "is not a plain relative name"),
        (resource(name="./classes.json"), "is not a plain relative name"),
        (resource(algorithm="sha512"), "a digest is not a SHA-256"),
        (resource(digest="A" * 64), "a digest is not a SHA-256 in lower case"),
        (unsorted, "not in order"),
        (two_subjects, "not a statement of model signing"),
        (changed("predicate", "serialization", "hash_type", to="blake3"), "was made by"),
        (changed("predicate", "serialization", "allow_symlinks", to=True), "was made by"),
        (changed("predicate", "serialization", "ignore_paths", to="x"), "a name is no text"),
        (changed("predicateType", to="https://model_signing/Digests/v0.1"), "its predicateType is not"),
    ],
)
def test_a_bundle_that_leaves_a_gap_is_refused_although_the_right_key_signed_it(
    certified: Path, keys: Path, bundle: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    check(certified, keys)
    resign(bundle, keys, change)
    with pytest.raises(CertificateError, match=reason):
        check(certified, keys)


def test_a_root_digest_alone_is_not_believed(certified: Path, keys: Path, bundle: Path) -> None:
    resign(bundle, keys, resource(digest="0" * 64), root=False)
    with pytest.raises(CertificateError, match="do not make that of its subject"):
        check(certified, keys)


def add_unsigned(folder: Path) -> None:
    (folder / "model" / "more.json").write_text("{}")


def link_of_equal_content(folder: Path) -> None:
    path = folder / "model" / "classes.json"
    path.rename(folder / "elsewhere.json")
    path.symlink_to(folder / "elsewhere.json")


def hidden(folder: Path) -> None:
    (folder / "model" / ".cache").mkdir()
    (folder / "model" / ".cache" / "x").write_text("")


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (change_a_weight, "is not the file that"),
        (remove_classes, "is missing"),
        (rename_weights, "is not among the files"),
        (add_unsigned, "more.json is not among the files"),
        (hidden, "is not among the files"),
        (link_of_equal_content, "is a link"),
    ],
)
def test_a_folder_that_changed_after_it_was_signed_is_refused(
    certified: Path, keys: Path, bundle: Path, attack: Callable[[Path], None], reason: str
) -> None:
    attack(certified)
    with pytest.raises(CertificateError, match=reason):
        check(certified, keys)
    assert bundle.exists()


def test_a_bundle_of_another_key_is_refused(certified: Path, keys: Path, bundle: Path) -> None:
    write_key(keys / "stranger.pem", generate_private_key(SECP256R1()))
    with pytest.raises(CertificateError, match="was not signed by the key"):
        check(certified, keys, "stranger")
    with pytest.raises(CertificateError, match="is not an ECDSA key"):
        check(certified, keys, "ed")
    bundle.write_text(bundle.read_text().replace('"mediaType"', '"mediaType": "x", "mediaType"'))
    with pytest.raises(CertificateError, match="occurs twice"):
        check(certified, keys)
