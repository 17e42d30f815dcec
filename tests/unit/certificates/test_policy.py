"""Trust policies: each rule, the file, and that more settings only ever refuse more."""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from guard.certificates import (
    CERTIFICATE_FILE,
    Admission,
    Envelope,
    Policy,
    PrivateKey,
    PublicKey,
    Statement,
    files_of_model,
    files_of_profile,
    verify,
)
from guard.errors import CertificateError, RefusedError
from tests.unit.certificates.conftest import NOW

Decide = Callable[..., Admission]
Write = Callable[[str], Policy]


@pytest.fixture
def decide(certified: Path) -> Decide:
    files = files_of_model(certified / "exported") | files_of_profile(certified / "profile")

    def run(*policies: Policy, source: str = "/models/a/exported", now: datetime = NOW) -> Admission:
        return verify(certified / "profile" / CERTIFICATE_FILE, files, policies, source, now=now)

    return run


@pytest.fixture
def write(keys: Path, tmp_path: Path) -> Write:
    def make(text: str) -> Policy:
        path = tmp_path / "policy.toml"
        path.write_text(text + f'\n[[keys]]\nname = "vetting"\nfile = "{keys / "ed.pub"}"\n', encoding="utf-8")
        return Policy.read(path)

    return make


@pytest.mark.parametrize(
    ("text", "rule", "reason"),
    [
        ('minimum_budget = "standard"', "minimum_budget", "the budget quick, at least standard is needed"),
        ('families = ["patch", "sound"]', "families", "did not look for sound"),
        ('vetters = ["https://vetting.example"]', "vetters", "the vetter is 'guard', not 'https://vetting.example'"),
        ('reference_models = ["derived"]', "reference_models", "the reference model of the vetting is"),
        ("maximum_age_days = 7", "maximum_age_days", "more than 7 days ago"),
        ('minimum_version = "99.0"', "minimum_version", "at least 99.0 is needed"),
        ('verdicts = ["inconclusive"]', "verdicts", "the verdict is 'no evidence', not 'inconclusive'"),
        ("only_listed_sources = true", "only_listed_sources", "names no source"),
        ('[[sources]]\nprefix = "/models/a"\nvetters = []', "vetters", "the vetter is 'guard'"),
    ],
)
def test_a_refusal_names_the_rule_that_decided(decide: Decide, write: Write, text: str, rule: str, reason: str) -> None:
    found = decide(write(text))
    assert (found.admitted, found.rule) == (False, rule)
    assert reason in found.reason
    with pytest.raises(RefusedError, match=f"refused by the rule {rule}"):
        found.demand()


@pytest.mark.parametrize(
    "text",
    [
        "",
        'minimum_budget = "quick"',
        'families = ["patch"]',
        'vetters = ["guard"]',
        "maximum_age_days = 60",
        'minimum_version = "0.1"',
        'verdicts = ["no evidence", "inconclusive"]',
        'only_listed_sources = true\n[[sources]]\nprefix = "/models"',
        '[[sources]]\nprefix = "/models/ab"\nvetters = []',
        '[[sources]]\nprefix = "hf-hub:owner"\nvetters = []',
    ],
)
def test_what_fulfils_every_rule_is_admitted(decide: Decide, write: Write, text: str) -> None:
    found = decide(write(text))
    assert found.admitted, str(found)
    assert list(found.signers) == ["vetting"]


def test_a_certificate_is_in_force_from_its_time_to_its_end(decide: Decide, keys: Path) -> None:
    policy = Policy.trusting([keys / "ed.pub"])
    for now, reason in (
        (NOW - timedelta(seconds=1), "in the future: one of the clocks is wrong"),
        (NOW + timedelta(days=90), "the certificate expired at 2026-09-29T00:00:00Z"),
    ):
        found = decide(policy, now=now)
        assert (found.rule, reason in found.reason) == ("validity", True), str(found)
    assert decide(policy, now=NOW + timedelta(days=90, seconds=-1)).admitted


def test_signatures_are_counted_by_key(decide: Decide, keys: Path, tmp_path: Path) -> None:
    """One key under two names is one key."""
    entry = '[[keys]]\nname = "{}"\nfile = "{}"\n'
    one, two = (keys / "ed.pub", keys / "ec.pub")
    (tmp_path / "a.toml").write_text("threshold = 2\n" + entry.format("a", one) + entry.format("b", two))
    assert decide(Policy.read(tmp_path / "a.toml")).admitted
    (tmp_path / "b.toml").write_text(
        "threshold = 2\n" + entry.format("a", one) + entry.format("b", one) + entry.format("c", keys / "other.pub")
    )
    found = decide(Policy.read(tmp_path / "b.toml"))
    assert (found.rule, found.reason) == ("signature", "1 of the trusted keys signed the certificate, 2 must")
    (tmp_path / "c.toml").write_text("threshold = 2\n" + entry.format("a", one) + entry.format("b", one))
    with pytest.raises(CertificateError, match="trusts fewer different keys"):
        Policy.read(tmp_path / "c.toml")


def test_a_junk_signature_changes_nothing_wherever_it_stands(certified: Path, keys: Path) -> None:
    path = certified / "profile" / CERTIFICATE_FILE
    envelope = Envelope.from_json(path.read_bytes(), "")
    junk = Envelope.sign(b"something else", [PrivateKey.read(keys / "other.pem")]).signatures
    trusted = [PublicKey.read(keys / "ed.pub")]
    for signatures in (junk + envelope.signatures, envelope.signatures + junk, envelope.signatures[:1] * 2):
        assert Envelope(envelope.payload, envelope.payload_type, signatures).signers(trusted) == tuple(trusted)


def test_revocation_is_by_digest_of_anything(decide: Decide, write: Write, certified: Path, keys: Path) -> None:
    admission = decide(Policy.trusting([keys / "ed.pub"]))
    statement = Statement.parse(Envelope.from_json((certified / "profile" / CERTIFICATE_FILE).read_bytes(), "").payload)
    revocable = {
        admission.certificate: "the certificate was revoked: stolen",
        statement.predicate.model.digest: "the model was revoked: stolen",
        statement.files["exported/model.onnx"]: "exported/model.onnx was revoked: stolen",
        statement.files["model/open_clip_config.json"]: "model/open_clip_config.json was revoked: stolen",
        PublicKey.read(keys / "ed.pub").id: "the key vetting was revoked: stolen",
    }
    for digest, reason in revocable.items():
        found = decide(write(f'[[revoked]]\ndigest = "{digest}"\nreason = "stolen"'))
        assert (found.rule, found.reason) == ("revocation", reason)
    assert decide(write(f'[[revoked]]\ndigest = "{"0" * 64}"')).admitted


def test_every_policy_must_accept(decide: Decide, write: Write, keys: Path) -> None:
    lenient, strict = Policy.trusting([keys / "ed.pub"]), write('minimum_budget = "thorough"')
    for policies in ((lenient, strict), (strict, lenient)):
        found = decide(*policies)
        assert (found.admitted, found.rule, found.policy) == (False, "minimum_budget", strict.name)
    other = decide(lenient, Policy.trusting([keys / "other.pub"]))
    assert (other.admitted, other.rule) == (False, "signature")


def test_taking_a_signature_away_never_admits(certified: Path, keys: Path) -> None:
    """Whatever the policy, fewer signatures are accepted at most as often."""
    files = files_of_model(certified / "exported") | files_of_profile(certified / "profile")
    whole = Envelope.from_json((certified / "profile" / CERTIFICATE_FILE).read_bytes(), "")
    policies = [Policy.trusting([keys / name]) for name in ("ed.pub", "ec.pub", "other.pub")]
    policies.append(Policy.trusting([keys / "ed.pub", keys / "ec.pub"]))
    for policy in policies:
        admitted = {}
        for kept in ((), (0,), (1,), (0, 1)):
            fewer = Envelope(whole.payload, whole.payload_type, tuple(whole.signatures[k] for k in kept))
            admitted[kept] = verify(fewer.to_json(), files, [policy], "m", now=NOW).admitted
        assert not admitted[()]
        assert admitted[(0, 1)] >= max(admitted[(0,)], admitted[(1,)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threshold = 1", "trusts no key"),
        ("threshold = 0\n[[keys]]\nname = 'a'\nfile = 'ed.pub'", "threshold"),
        ("[[keys]]\nname = 'a'", "needs either file or pem"),
        ("[[keys]]\nname = 'a'\nfile = 'ed.pub'\n[[keys]]\nname = 'a'\nfile = 'ec.pub'", "two keys 'a'"),
        ("verdict = ['no evidence']\n[[keys]]\nname = 'a'\nfile = 'ed.pub'", "verdict: there is no such name"),
        ("verdicts = ['clean']\n[[keys]]\nname = 'a'\nfile = 'ed.pub'", "verdicts.1"),
        ("maximum_age_days = 0\n[[keys]]\nname = 'a'\nfile = 'ed.pub'", "maximum_age_days"),
        ("[[revoked]]\ndigest = 'abc'\n[[keys]]\nname = 'a'\nfile = 'ed.pub'", "revoked.1.digest"),
        ("[[keys]]\nname = 'a'\nfile = 'missing.pub'", "there is no file"),
        ("threshold = [", "is not valid TOML"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(keys: Path, text: str, message: str) -> None:
    path = keys / "policy.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CertificateError, match=message):
        Policy.read(path)


def test_a_key_can_stand_in_the_policy_itself(decide: Decide, keys: Path, tmp_path: Path) -> None:
    pem = (keys / "ed.pub").read_text()
    (tmp_path / "p.toml").write_text(f'[[keys]]\nname = "inside"\npem = """\n{pem}"""\n', encoding="utf-8")
    assert decide(Policy.read(tmp_path / "p.toml")).admitted
