"""Revoke by digest: what is written into a trust policy so that a model, or its certificate, is refused from now on."""

import json
from collections.abc import Mapping
from pathlib import Path

from guard._documents import read_bytes
from guard._files import replace_file
from guard.certificates.policy import MAX_POLICY_BYTES, Policy
from guard.errors import CertificateError


def revocation(digests: Mapping[str, str]) -> str:
    """Return the tables that revoke digests, as TOML.

    Args:
        digests: Why each digest is revoked, by digest.
    """
    # Strings of JSON are strings of TOML, as long as they have no characters outside the first plane.
    return "".join(
        f'\n[[revoked]]\ndigest = "{digest}"\nreason = {json.dumps(reason, ensure_ascii=False)}\n'
        for digest, reason in digests.items()
    )


def revoke(policy: Path, digests: Mapping[str, str]) -> tuple[str, ...]:
    """Add digests to the revoked ones of a policy file, whole or not at all; the rest of the file stays as it is.

    Args:
        policy: The TOML file.
        digests: Why each digest is revoked, by digest. Those that the policy revokes already are left out.

    Returns:
        The digests that were added.

    Raises:
        CertificateError: The file is no policy, or would be none with these lines behind it.
    """
    known = Policy.read(policy).revoked
    added = {digest: reason for digest, reason in digests.items() if digest not in known}
    if not added:
        return ()
    text = read_bytes(policy, MAX_POLICY_BYTES, CertificateError)
    proposed = policy.with_name(f".{policy.name}.proposed")
    replace_file(proposed, text.rstrip(b"\n") + b"\n" + revocation(added).encode())
    try:
        if not added.keys() <= Policy.read(proposed).revoked.keys():
            raise CertificateError(f"{policy} does not take further tables [[revoked]]; add them by hand")
        proposed.replace(policy)
    finally:
        proposed.unlink(missing_ok=True)
    return tuple(added)
