"""Bundles of OpenSSF model signing by whoever an authority certified."""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurve,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from guard.certificates import PrivateKey
from guard.certificates.authorities import Authority
from guard.certificates.envelope import IN_TOTO, pre_authentication
from guard.certificates.model_signing import check_bundle, write_bundle
from guard.errors import CertificateError

NOW = datetime(2026, 6, 1, tzinfo=UTC)
HASHES = {"secp256r1": SHA256(), "secp384r1": SHA384(), "secp521r1": SHA512()}
Signed = tuple[x509.Certificate, EllipticCurvePrivateKey]


def certificate(
    name: str,
    issuer: Signed | None,
    *,
    ca: bool,
    depth: int | None = None,
    use: str = "",
    days: int = 30,
    curve: EllipticCurve | None = None,
) -> Signed:
    """A certificate, by an issuer or by itself, and its key."""
    key = generate_private_key(curve or SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    above = subject if issuer is None else issuer[0].subject
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    wanted = use or ("key_cert_sign" if ca else "digital_signature")
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(above)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=30))
        .not_valid_after(NOW + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=depth), critical=True)
        .add_extension(x509.KeyUsage(**{each: each == wanted for each in names}), critical=True)
        .sign(key if issuer is None else issuer[1], SHA256())
    )
    return built, key


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"weights")
    return tmp_path / "model"


def signed_by(model: Path, chain: list[x509.Certificate], key: EllipticCurvePrivateKey) -> Path:
    """A bundle with a chain of certificates."""
    path = model.parent / "model.sig"
    write_bundle(model, path, PrivateKey(generate_private_key(SECP256R1())))
    document = json.loads(path.read_bytes())
    payload = base64.b64decode(document["dsseEnvelope"]["payload"])
    signature = key.sign(pre_authentication(payload, IN_TOTO), ECDSA(HASHES[key.curve.name]))
    document["dsseEnvelope"]["signatures"] = [{"sig": base64.b64encode(signature).decode(), "keyid": ""}]
    raw = [{"rawBytes": base64.b64encode(each.public_bytes(Encoding.DER)).decode()} for each in chain]
    document["verificationMaterial"] = {"x509CertificateChain": {"certificates": raw}, "tlogEntries": []}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def pinned(model: Path, *roots: x509.Certificate) -> Authority:
    path = model.parent / "roots.pem"
    path.write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in roots))
    return Authority.read(path)


def check(model: Path, bundle: Path, authority: Authority, now: datetime = NOW) -> None:
    check_bundle(model, bundle, authority, ["weights"], now=now)


@pytest.mark.parametrize("curve", [SECP256R1(), SECP384R1(), SECP521R1()], ids=lambda each: each.name)
@pytest.mark.parametrize("with_root", [False, True])
def test_a_chain_to_the_pinned_authority_is_accepted(model: Path, curve: EllipticCurve, with_root: bool) -> None:  # noqa: FBT001
    root = certificate("root", None, ca=True)
    middle = certificate("middle", root, ca=True, depth=0)
    leaf = certificate("leaf", middle, ca=False, curve=curve)
    chain = [leaf[0], middle[0], *([root[0]] if with_root else [])]
    bundle = signed_by(model, chain, leaf[1])
    check(model, bundle, pinned(model, certificate("other", None, ca=True)[0], root[0]))
    (model / "weights").write_bytes(b"others")
    with pytest.raises(CertificateError, match="is not the file that"):
        check(model, bundle, pinned(model, root[0]))


def other_root(_: Signed) -> tuple[list[x509.Certificate], EllipticCurvePrivateKey]:
    """Somebody else's authority of the same name."""
    leaf = certificate("leaf", certificate("root", None, ca=True), ca=False)
    return [leaf[0]], leaf[1]


def leaf_as_issuer(root: Signed) -> tuple[list[x509.Certificate], EllipticCurvePrivateKey]:
    """A certificate that may not issue others."""
    middle = certificate("middle", root, ca=False)
    leaf = certificate("leaf", middle, ca=False)
    return [leaf[0], middle[0]], leaf[1]


def too_deep(root: Signed) -> tuple[list[x509.Certificate], EllipticCurvePrivateKey]:
    """An issuer that may have nobody below it but signers."""
    middle = certificate("middle", root, ca=True, depth=0)
    lower = certificate("lower", middle, ca=True)
    leaf = certificate("leaf", lower, ca=False)
    return [leaf[0], lower[0], middle[0]], leaf[1]


def wrong_use(root: Signed) -> tuple[list[x509.Certificate], EllipticCurvePrivateKey]:
    """A certificate that is not for signatures."""
    leaf = certificate("leaf", root, ca=False, use="key_agreement")
    return [leaf[0]], leaf[1]


def expired(root: Signed) -> tuple[list[x509.Certificate], EllipticCurvePrivateKey]:
    """A certificate that is over."""
    leaf = certificate("leaf", root, ca=False, days=-1)
    return [leaf[0]], leaf[1]


def key_of_another(root: Signed) -> tuple[list[x509.Certificate], EllipticCurvePrivateKey]:
    """A signature by another key than the certificate's."""
    return [certificate("leaf", root, ca=False)[0]], generate_private_key(SECP256R1())


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (other_root, "was not issued by the pinned authority"),
        (leaf_as_issuer, "was not issued by the pinned authority"),
        (too_deep, "was not issued by the pinned authority"),
        (wrong_use, "not one for signatures"),
        (expired, "is not valid now"),
        (key_of_another, "was not signed by the key"),
    ],
)
def test_a_chain_that_does_not_hold_is_refused(
    model: Path, attack: Callable[[Signed], tuple[list[x509.Certificate], EllipticCurvePrivateKey]], reason: str
) -> None:
    root = certificate("root", None, ca=True)
    bundle = signed_by(model, *attack(root))
    with pytest.raises(CertificateError, match=reason):
        check(model, bundle, pinned(model, root[0]))


@pytest.mark.parametrize(
    "material",
    [None, {}, {"x509CertificateChain": {"certificates": []}}, {"x509CertificateChain": {"certificates": [{}] * 9}},
     {"x509CertificateChain": {"certificates": [{"rawBytes": "AAAA"}]}}, {"publicKey": {"hint": "x"}}],
)  # fmt: skip
def test_material_without_a_chain_is_refused(model: Path, material: Any) -> None:
    root = certificate("root", None, ca=True)
    leaf = certificate("leaf", root, ca=False)
    bundle = signed_by(model, [leaf[0]], leaf[1])
    document = json.loads(bundle.read_bytes())
    document["verificationMaterial"] = material
    bundle.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CertificateError, match=r"is damaged: its chain|is damaged: it holds no chain"):
        check(model, bundle, pinned(model, root[0]))


def test_a_key_on_another_curve_is_pinned_as_it_is(model: Path) -> None:
    root = certificate("root", None, ca=True, curve=SECP384R1())
    path = model.parent / "key.pub"
    path.write_bytes(root[1].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    check(model, signed_by(model, [root[0]], root[1]), Authority.read(path))
    path.write_bytes(b"nothing")
    with pytest.raises(CertificateError, match="neither a public key nor a certificate"):
        Authority.read(path)
