"""`guard verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import gates, options
from guard.cli.console import Console
from guard.cli.vet import EXIT_CODES
from guard.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guard.certificates import Policy
    from guard.vetting import Budget, Verdict

_IMAGES = 2000


@click.command()
@click.argument("model", type=options.PATH)
@click.option(
    "--profile", type=options.PATH, required=True, help="Folder of the model's profile, with its certificate."
)
@options.trust
@click.option(
    "--oms-signature",
    "bundle",
    type=options.PATH,
    help="Signature of the model in the form of OpenSSF model signing, such as model.sig, which is asked for besides "
    "the certificate. It must be by the --oms-key, or by the one that the policy names.",
)
@click.option(
    "--oms-key",
    type=options.PATH,
    help="PEM file of the public key, or of the certificate authority, that must have signed --oms-signature.",
)
@click.option(
    "--vet-on-miss",
    type=click.Choice(["quick", "standard", "thorough"]),
    help="If the profile has no certificate, or is missing, examine MODEL now, with this budget and the --images, and "
    "go by the verdict. Digests that a policy revokes stay refused. This needs torch, and MODEL must not be an export.",
)
@click.option("--images", type=options.PATH, help="Folder of images for --vet-on-miss.")
@click.option("--base", help="Trusted model to compare MODEL with, for --vet-on-miss.")
@gates.outputs
@options.as_json
@click.pass_context
def verify(
    ctx: click.Context,
    model: Path,
    profile: Path,
    trust: tuple[Path, ...],
    policy: tuple[Path, ...],
    bundle: Path | None,
    oms_key: Path | None,
    vet_on_miss: "Budget | None",
    images: Path | None,
    base: str | None,
    sarif: Path | None,
    junit: Path | None,
    *,
    as_json: bool,
) -> None:
    """Check that MODEL was examined, by whom and with what result, before it is loaded.

    MODEL is a folder of open_clip, of a Hugging Face CLIPModel, or one that guard export wrote. Its files and those of
    the profile must be the ones that the certificate names. This needs no torch, unless for --vet-on-miss, and writes
    nothing.

    The exit code is 0 if the model is admitted, 1 if it is refused, and 3 if only its verdict, inconclusive, keeps it
    from being admitted.
    """
    from guard.certificates import CERTIFICATE_FILE, files_of_model, files_of_profile
    from guard.certificates import verify as decide
    from guard.certificates.model_signing import checked

    if (vet_on_miss is None) != (images is None) or (base is not None and vet_on_miss is None):
        raise UsageError("--vet-on-miss needs --images; --images and --base need --vet-on-miss")
    console = Console(as_json=as_json)
    policies = options.policies(trust, policy, oms_key)
    files = files_of_model(model)
    opened = [name.partition("/")[2] for name in files]
    authorities = [authority for each in policies for authority in each.authorities]
    if bundle is not None and not authorities:
        raise UsageError("--oms-signature needs --oms-key, or a policy with model_signing")
    signatures = checked(model, bundle, authorities, opened)
    if vet_on_miss is not None and images is not None and not (profile / CERTIFICATE_FILE).exists():
        verdict = _vet(model, files, policies, vet_on_miss, images, base, console)
        gates.write(sarif, junit, gates.of_verdict(verdict, str(model)))
        reasons = "; ".join(verdict.reasons)
        console.result(verdict, f"not certified; vetted now ({vet_on_miss}): {verdict.outcome}: {reasons}")
        ctx.exit(EXIT_CODES[verdict.outcome])
    files |= files_of_profile(profile)
    admission = decide(profile / CERTIFICATE_FILE, files, policies, str(model), model_signatures=signatures)
    gates.write(sarif, junit, gates.of_admission(admission))
    console.result(admission, str(admission))
    ctx.exit(gates.code_of_admission(admission))


def _vet(
    model: Path,
    files: "Mapping[str, str]",
    policies: "Sequence[Policy]",
    budget: "Budget",
    images: Path,
    base: str | None,
    console: Console,
) -> "Verdict":
    """Examine a model that has no certificate.

    Raises:
        RefusedError: A policy revokes the model or one of its files.
    """
    import guard

    folder = guard.ImageFolder.scan(images).sample(_IMAGES, seed=0)
    classifier = guard.load(str(model))
    for policy in policies:
        for digest in (classifier.digest.root, *files.values()):
            if digest in policy.revoked:
                raise RefusedError(f"{model} is refused by the rule revocation of {policy.name}: {digest} was revoked")
    reference = guard.load(base, classes=classifier.classes) if base else None
    pixels = classifier.read(folder, console.progress)
    return guard.vet(classifier, pixels, base=reference, budget=budget, progress=console.progress).verdict
