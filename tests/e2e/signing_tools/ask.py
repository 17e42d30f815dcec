"""What other tools say of what guard signed, and what they sign themselves; run by their own Python.

ask.py dsse ENVELOPE PUBLIC_KEY         verify a DSSE envelope with securesystemslib, and the statement with in-toto's
ask.py sign PAYLOAD PRIVATE_KEY OUT     sign a payload with securesystemslib
"""

import copy
import json
import sys
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from google.protobuf.json_format import Parse
from in_toto_attestation.v1.statement import Statement  # type: ignore[import-not-found]
from in_toto_attestation.v1.statement_pb2 import Statement as Message  # type: ignore[import-not-found]
from securesystemslib.dsse import Envelope  # type: ignore[import-not-found]
from securesystemslib.exceptions import VerificationError  # type: ignore[import-not-found]
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[import-not-found]

TYPE = "application/vnd.in-toto+json"


def main() -> None:
    """Do what is asked; the exit code tells."""
    action, *paths = sys.argv[1:]
    if action == "dsse":
        document = json.loads(Path(paths[0]).read_text("utf-8"))
        envelope = Envelope.from_dict(copy.deepcopy(document))
        key = SSlibKey.from_crypto(load_pem_public_key(Path(paths[1]).read_bytes()))
        keyids = [each["keyid"] for each in document["signatures"]]
        known = [SSlibKey(keyid, key.keytype, key.scheme, key.keyval) for keyid in keyids]
        found = 0
        for each in known:
            try:
                found += len(envelope.verify([each], 1))
            except VerificationError:
                continue
        Statement.copy_from_pb(Parse(envelope.payload, Message())).validate()
        sys.exit(found != 1)
    private = load_pem_private_key(Path(paths[1]).read_bytes(), None)
    envelope = Envelope(Path(paths[0]).read_bytes(), TYPE, {})
    envelope.sign(CryptoSigner(private))
    Path(paths[2]).write_text(json.dumps(envelope.to_dict()), "utf-8")


main()
