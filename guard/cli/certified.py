"""What commands that load a model say about its certificate."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from guard.cli import options
from guard.cli.console import Console

if TYPE_CHECKING:
    from guard.classifiers import Classifier, ClassList

Command = TypeVar("Command", bound=Callable[..., Any])


def asked(command: Command) -> Command:
    """The options `--certificate`, `--trust` and `--policy`."""
    option = click.option(
        "--certificate",
        type=options.PATH,
        help="Certificate of the model. If --trust or --policy is given, the command says whether it is accepted.",
    )
    return option(options.trust(command))


def load(
    model: str,
    classes: "Path | ClassList | None",
    device: str | None,
    console: Console,
    certificate: Path,
    trust: tuple[Path, ...],
    policy: tuple[Path, ...],
) -> "Classifier":
    """Load a model, and say whether what was loaded is certified, if somebody is trusted.

    The certificate is a file, or the folder of a profile that holds one.

    Raises:
        ModelError: The model cannot be loaded.
        CertificateError: A key or a policy cannot be used.
    """
    import guard

    if not (trust or policy):
        return guard.load(model, classes=classes, device=device)
    from guard._documents import recording
    from guard.certificates import CERTIFICATE_FILE
    from guard.certificates.loaded import check_loaded

    policies = options.policies(trust, policy)
    file = certificate / CERTIFICATE_FILE if certificate.is_dir() else certificate
    with recording() as opened:
        classifier = guard.load(model, classes=classes, device=device)
    console.say(f"{model}: {check_loaded(model, classifier.digest.root, opened, file, policies)}")
    return classifier
