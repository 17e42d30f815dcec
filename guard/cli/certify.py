"""`guard certify`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import options
from guard.cli.console import Console
from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.certificates import PrivateKey

PASSPHRASE = "GUARD_KEY_PASSPHRASE"  # noqa: S105 - the name of the variable
_PARITY_IMAGES = 512


@click.command()
@click.argument("profile", type=options.PATH)
@click.option("--model", help="The model that was vetted, if it is no longer at the place that the profile names.")
@click.option(
    "--key",
    "keys",
    type=options.PATH,
    multiple=True,
    required=True,
    help="PEM file of a private key, Ed25519 or ECDSA P-256. Give it again for further signatures. The passphrase of "
    f"an encrypted key is taken from {PASSPHRASE}, or asked for.",
)
@click.option(
    "--exported",
    type=options.PATH,
    help="Folder of the ONNX model that guard export wrote, which a sidecar will load. It is compared with the model.",
)
@click.option(
    "--images",
    type=options.PATH,
    help="Folder of images on which the export is compared with the model. By default, noise is used.",
)
@click.option("--vetter", default="guard", show_default=True, help="Who vetted. A trust policy can ask for a name.")
@click.option("--days", type=float, default=90, show_default=True, help="Number of days that the certificate is valid.")
@click.option(
    "--oms-signature",
    type=options.PATH,
    help="Also sign all files of the model's folder in the form of OpenSSF model signing, and write the bundle to this "
    "file. This needs a P-256 key.",
)
@options.device
@options.as_json
def certify(
    profile: Path,
    model: str | None,
    keys: tuple[Path, ...],
    exported: Path | None,
    images: Path | None,
    vetter: str,
    days: float,
    oms_signature: Path | None,
    device: str | None,
    *,
    as_json: bool,
) -> None:
    """Sign what vetting found about the model of PROFILE.

    Everything is loaded and hashed again. The certificate is written into the profile: certificate.json, and
    test-result.json, which says the same in a form that policy engines know. A changed profile needs a new certificate.
    """
    import guard
    from guard.certificates import certify as run
    from guard.certificates.model_signing import write_bundle

    console = Console(as_json=as_json)
    signing = [_private_key(path) for path in keys]
    named = model or guard.Profile.open(profile).document.model.source
    suitable = next((key for key in signing if key.public.algorithm == "ECDSA P-256"), None)
    if oms_signature is not None and suitable is None:
        raise UsageError("--oms-signature needs a --key of the kind ECDSA P-256")
    if oms_signature is not None and not Path(named).is_dir():
        raise UsageError("--oms-signature needs a --model that is a folder")
    folder = None if images is None else guard.ImageFolder.scan(images).sample(_PARITY_IMAGES, seed=0)
    made = run(
        profile,
        named,
        signing,
        exported=exported,
        images=folder,
        vetter=vetter,
        days=days,
        device=device,
        progress=console.say,
    )
    if oms_signature is not None and suitable is not None:
        console.say(f"signing the files of {named}")
        write_bundle(Path(named), oms_signature, suitable)
    predicate = made.statement.predicate
    parity = predicate.parity
    console.result(
        {
            "certificate": str(made.certificate),
            "keyIds": list(made.key_ids),
            "statement": made.statement.model_dump(by_alias=True),
        },
        f"verdict: {predicate.verdict.outcome}\n"
        f"files: {len(made.statement.subject)}, each by name and SHA-256\n"
        + (
            ""
            if parity is None
            else f"export: differs by up to {parity.max_difference:.2g} on {parity.images} images\n"
        )
        + "".join(f"signed by: {key_id}\n" for key_id in made.key_ids)
        + f"valid until: {predicate.expires_at}\ncertificate: {made.certificate}",
    )


def _private_key(path: Path) -> "PrivateKey":
    from guard.certificates import PrivateKey

    passphrase = os.environ.get(PASSPHRASE)
    try:
        return PrivateKey.read(path)
    except UsageError:
        if passphrase is None:
            passphrase = click.prompt(f"passphrase of {path}", hide_input=True, err=True)
        return PrivateKey.read(path, passphrase.encode())
