"""`guard verify`."""

from pathlib import Path

import click

from guard.cli import gates, options
from guard.cli.console import Console
from guard.errors import UsageError


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
@click.option("--oms-key", type=options.PATH, help="PEM file of the public key that must have signed --oms-signature.")
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
    sarif: Path | None,
    junit: Path | None,
    *,
    as_json: bool,
) -> None:
    """Check that MODEL was examined, by whom and with what result, before it is loaded.

    MODEL is a folder of open_clip, of a Hugging Face CLIPModel, or one that guard export wrote. Its files and those of
    the profile must be the ones that the certificate names. This needs no torch, and writes nothing.

    The exit code is 0 if the model is admitted, 1 if it is refused, and 3 if only its verdict, inconclusive, keeps it
    from being admitted.
    """
    from guard.certificates import CERTIFICATE_FILE, files_of_model, files_of_profile
    from guard.certificates import verify as decide
    from guard.certificates.model_signing import checked

    policies = options.policies(trust, policy, oms_key)
    _, files = files_of_model(model)
    opened = [name.partition("/")[2] for name in files]
    keys = [key for each in policies for key in each.model_signing_keys]
    if bundle is not None and not keys:
        raise UsageError("--oms-signature needs --oms-key, or a policy with model_signing_key")
    signatures = checked(model, bundle, keys, opened)
    files |= files_of_profile(profile)
    admission = decide(profile / CERTIFICATE_FILE, files, policies, str(model), model_signatures=signatures)
    gates.write(sarif, junit, gates.of_admission(admission))
    Console(as_json=as_json).result(admission, str(admission))
    ctx.exit(gates.code_of_admission(admission))
