"""Whether a model may be served: its certificate, and the operator's trust policies, asked again while it is served."""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from guard._documents import read_bytes
from guard.certificates import CERTIFICATE_FILE, Admission, verify
from guard.certificates.envelope import MAX_BYTES
from guard.certificates.policy import read_policies
from guard.certificates.verification import undecided
from guard.errors import CertificateError
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)
audit = logging.getLogger("guard.admission")


def _now() -> datetime:
    return datetime.now(UTC)


class Certification:
    """The decision about one model, for what was loaded.

    The certificate stays the one that lay beside the profile when that was read. Time passes, and keys and digests are
    revoked, so that policies are read again with each decision.

    Args:
        settings: Settings of the sidecar, with at least one policy.
        model: Settings of the model.
        files: SHA-256 of what was loaded, by name of subject.
        clock: Tells the time.

    Attributes:
        admission: The last decision.
    """

    def __init__(
        self,
        settings: Settings,
        model: ModelSettings,
        files: Mapping[str, str],
        clock: Callable[[], datetime] = _now,
    ) -> None:
        if model.profile is None:
            raise ValueError("the settings name no profile")
        self._settings, self._model, self.files, self._clock = settings, model, files, clock
        self._certificate: Path | bytes = model.profile / CERTIFICATE_FILE
        with suppress(CertificateError):  # `verify` says what is wrong with it
            self._certificate = read_bytes(self._certificate, MAX_BYTES, CertificateError)
        self._warned = False
        self.admission = self._decide()
        self._tell()

    def renew(self) -> bool:
        """Decide again.

        Returns:
            Whether the decision is another one than before.
        """
        before, self.admission = self.admission, self._decide()
        changed = (before.admitted, before.rule) != (self.admission.admitted, self.admission.rule)
        if changed:
            self._tell()
        self._warn()
        return changed

    def _decide(self) -> Admission:
        source = str(self._model.model or self._model.profile)
        try:
            policies = read_policies(self._settings.policy, self._settings.trust)
        except CertificateError as error:
            return replace(undecided(self.files, "", source, self._clock()), rule="policy", reason=str(error))
        return verify(self._certificate, self.files, policies, source, now=self._clock())

    def _tell(self) -> None:
        audit.info("%s", self.admission.to_json())
        if self.admission.admitted:
            log.info("the model %s is %s", self._model.label, self.admission)
        else:
            log.warning("the model %s is %s", self._model.label, self.admission)
        self._warn()

    def _warn(self) -> None:
        expires = self.admission.expires
        soon = timedelta(days=self._settings.certificate_warning_days)
        if self.admission.admitted and expires is not None and not self._warned and expires - self._clock() < soon:
            self._warned = True
            log.warning(
                "the certificate of the model %s expires at %s; certify it again",
                self._model.label,
                self.admission.expires_at,
            )
