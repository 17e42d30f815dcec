"""Whether a model that was just loaded is the one that a certificate is about."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from guard.certificates.policy import Policy
from guard.certificates.subjects import files_of_loaded
from guard.certificates.verification import Admission, undecided, verify
from guard.errors import CertificateError


def check_loaded(
    source: str,
    digest: str,
    opened: Mapping[Path, str],
    certificate: Path,
    policies: Sequence[Policy],
    *,
    now: datetime | None = None,
) -> Admission:
    """Decide about a model, by the files that it was loaded from and by what they made.

    Args:
        source: The model, as `guard.load` takes it.
        digest: Root digest of the classifier.
        opened: SHA-256 of the files that were opened to load it (`guard._documents.recording`).
        certificate: The certificate's file.
        policies: At least one.
        now: The time; None for that of the clock.
    """
    try:
        files = files_of_loaded(source, opened)
    except CertificateError as error:
        return replace(undecided({}, "", source, now), rule="subject", reason=str(error))
    admission = verify(certificate, files, policies, source, now=now)
    if admission.admitted and admission.model != digest:
        reason = "the classifier that was loaded is not the one that was certified (its digest differs)"
        return replace(admission, admitted=False, rule="subject", reason=reason)
    return admission
