"""Whether a model that was just loaded is the one that a certificate is about."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from guard.certificates.policy import Policy
from guard.certificates.subjects import MODEL, files_of_model, named
from guard.certificates.verification import Admission, verify
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
    folder = Path(os.path.commonpath([path.parent for path in opened])) if opened else Path(source)
    try:
        beside = {} if "::" in source else files_of_model(folder)[1]
    except CertificateError:
        beside = {}
    admission = verify(certificate, {**beside, **named(opened, folder, MODEL)}, policies, source, now=now)
    if admission.admitted and admission.model != digest:
        reason = "the classifier that was loaded is not the one that was certified (its digest differs)"
        return replace(admission, admitted=False, rule="subject", reason=reason)
    return admission
