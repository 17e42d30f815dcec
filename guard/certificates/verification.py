"""Whether a model is admitted: its certificate, what was loaded, and the operator's policies, brought together."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from guard._documents import read_bytes
from guard.certificates.envelope import IN_TOTO, MAX_BYTES, Envelope
from guard.certificates.policy import Evidence, Policy
from guard.certificates.statement import Statement, parse_time, write_time
from guard.errors import CertificateError, RefusedError

CERTIFICATE_FILE = "certificate.json"
"""Name of the certificate in the folder of a profile."""
TEST_RESULT_FILE = "test-result.json"
"""Name of the same result as `test-result`, the predicate that policy engines know."""


@dataclass(frozen=True)
class Admission:
    """The decision about one model.

    Attributes:
        admitted: Whether it may be loaded.
        rule: Name of the rule that refused it; "" if it is admitted.
        reason: Why, as a sentence; "" if it is admitted.
        policy: The policy that refused it, or all that admitted it.
        source: Where the model comes from.
        verdict: The verdict of its certificate; "" without a valid one.
        signers: Names and key ids of those who signed.
        certificate: SHA-256 of what they signed; "" without a certificate.
        model: Digest of the classifier; "" without a certificate.
        files: SHA-256 of the files as they were loaded, by name.
        expires_at: When the certificate expires; "" without one.
        decided_at: The time of the decision.
    """

    admitted: bool
    rule: str
    reason: str
    policy: str
    source: str
    verdict: str
    signers: Mapping[str, str]
    certificate: str
    model: str
    files: Mapping[str, str]
    expires_at: str
    decided_at: str

    @property
    def expires(self) -> datetime | None:
        """When the certificate expires; None without one."""
        return parse_time(self.expires_at) if self.expires_at else None

    def to_json(self) -> str:
        """The decision as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    def __str__(self) -> str:
        if self.admitted:
            return f"certified by {', '.join(self.signers)}, until {self.expires_at}; verdict: {self.verdict}"
        return f"refused by the rule {self.rule} of {self.policy}: {self.reason}"

    def demand(self) -> None:
        """Make sure that the model is admitted.

        Raises:
            RefusedError: It is not.
        """
        if not self.admitted:
            raise RefusedError(f"{self.source} is {self}")


def verify(
    certificate: Path | bytes,
    files: Mapping[str, str],
    policies: Sequence[Policy],
    source: str,
    *,
    model_signatures: Mapping[str, CertificateError | None] | None = None,
    now: datetime | None = None,
) -> Admission:
    """Decide whether a model is admitted: every rule of every policy must have nothing against it.

    Args:
        certificate: The certificate's file, or what it contains.
        files: SHA-256 of what was loaded, by name of subject (`guard.certificates.subjects`).
        policies: At least one.
        source: Where the model comes from; rules can differ by it.
        model_signatures: For the id of each authority that must have signed the model in the form of OpenSSF model
            signing, why its signature is refused, or None if it is good (`guard.certificates.model_signing`).
        now: The time; None for that of the clock.
    """
    if not policies:
        raise ValueError("a decision needs a policy")
    time = (now or datetime.now(UTC)).astimezone(UTC)
    names = ", ".join(policy.name for policy in policies)
    decision = undecided(files, names, source, time)
    try:
        statement, envelope = _signed(certificate, policies)
    except CertificateError as error:
        decided = "signature" if isinstance(error, RefusedError) else "certificate"
        return replace(decision, rule=decided, reason=str(error))
    predicate, digest = statement.predicate, hashlib.sha256(envelope.payload).hexdigest()
    decision = replace(
        decision,
        verdict=predicate.verdict.outcome,
        certificate=digest,
        model=predicate.model.digest,
        expires_at=predicate.expires_at,
    )
    for policy in policies:
        signed = set(envelope.signers(tuple(policy.keys.values())))
        signers = {name: key for name, key in policy.keys.items() if key in signed}
        decision = replace(decision, signers={**decision.signers, **{name: key.id for name, key in signers.items()}})
        evidence = Evidence(statement, digest, signers, files, source, time, model_signatures or {})
        for rule in policy.rules_for(source):
            if objection := rule.objection(evidence):
                return replace(decision, rule=rule.name, reason=objection, policy=policy.name)
    return replace(decision, admitted=True)


def undecided(files: Mapping[str, str], policy: str, source: str, time: datetime | None = None) -> Admission:
    """A decision without a reason yet: the model is not admitted."""
    decided = write_time(time or datetime.now(UTC))
    return Admission(False, "", "", policy, source, "", {}, "", "", dict(files), "", decided)  # noqa: FBT003


def _signed(certificate: Path | bytes, policies: Sequence[Policy]) -> tuple[Statement, Envelope]:
    """The statement of a certificate, which nobody reads before somebody who is trusted has signed it.

    Raises:
        RefusedError: None of the trusted keys signed it.
        CertificateError: It is missing or damaged.
    """
    if isinstance(certificate, bytes):
        envelope = Envelope.from_json(certificate, CERTIFICATE_FILE)
    else:
        missing = f"there is no {certificate.name} in {certificate.parent}: the model was not certified"
        envelope = Envelope.from_json(
            read_bytes(certificate, MAX_BYTES, CertificateError, missing=missing), str(certificate)
        )
    where = CERTIFICATE_FILE if isinstance(certificate, bytes) else certificate
    if envelope.payload_type != IN_TOTO:
        raise CertificateError(f"{where} is damaged: its payloadType is not {IN_TOTO}")
    if not envelope.signers([key for policy in policies for key in policy.keys.values()]):
        raise RefusedError("none of the trusted keys signed the certificate")
    try:
        return Statement.parse(envelope.payload), envelope
    except ValueError as error:
        raise CertificateError(f"{where} is damaged: {error}") from error
