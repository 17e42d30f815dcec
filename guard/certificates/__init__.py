"""Certificates: which model was examined, how, and with what result, signed; and the policies that ask for it.

Verifying needs no torch.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.certificates.envelope import Envelope
from guard.certificates.keys import PrivateKey, PublicKey
from guard.certificates.policy import Policy
from guard.certificates.statement import PREDICATE_TYPE, Statement
from guard.certificates.subjects import files_of_model, files_of_profile, profile_files
from guard.certificates.verification import CERTIFICATE_FILE, TEST_RESULT_FILE, Admission, verify

if TYPE_CHECKING:
    from guard.certificates.certifying import Certified, certify

__all__ = [
    "CERTIFICATE_FILE",
    "PREDICATE_TYPE",
    "TEST_RESULT_FILE",
    "Admission",
    "Certified",
    "Envelope",
    "Policy",
    "PrivateKey",
    "PublicKey",
    "Statement",
    "certify",
    "files_of_model",
    "files_of_profile",
    "profile_files",
    "verify",
]

__getattr__ = lazy(__name__, {"Certified": "certifying", "certify": "certifying"})
