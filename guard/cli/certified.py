"""What commands that load a model say about its certificate."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from guard.cli import options
from guard.cli.console import Console
from guard.errors import UsageError

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
    prompt_learner: Path | None = None,
) -> "Classifier":
    """Load a model, and say whether what was loaded is certified, if somebody is trusted.

    The certificate is a file, or the folder of a profile that holds one. A prompt learner takes the place of the
    prompts; certificates cover one that lies in the model's folder.

    Raises:
        ModelError: The model cannot be loaded.
        CertificateError: A key or a policy cannot be used.
        UsageError: Somebody is trusted, and the prompt learner is a file of its own.
    """
    import guard
    from guard.classifiers.files import LEARNER_FILE

    if not (trust or policy):
        return with_prompts(guard.load(model, classes=classes, device=device), prompt_learner)
    if prompt_learner is not None:
        raise UsageError(
            f"certificates cover a prompt learner in the folder of the model: put it there as {LEARNER_FILE}, instead "
            "of --prompt-learner"
        )
    from guard._documents import recording
    from guard.certificates import CERTIFICATE_FILE
    from guard.certificates.loaded import check_loaded

    policies = options.policies(trust, policy)
    file = certificate / CERTIFICATE_FILE if certificate.is_dir() else certificate
    with recording() as opened:
        classifier = guard.load(model, classes=classes, device=device)
    console.say(f"{model}: {check_loaded(model, classifier.digest.root, opened, file, policies)}")
    return classifier


def with_prompts(towers: "Classifier", prompt_learner: Path | None) -> "Classifier":
    """The classifier with the prompt learner of a file; as it is without one.

    Raises:
        ModelError: The file holds no prompt learner, or one that does not fit the classifier.
    """
    from guard.classifiers.loading import with_prompt_learner

    return towers if prompt_learner is None else with_prompt_learner(towers, prompt_learner)


def own_towers(classifier: "Classifier") -> "Classifier | None":
    """The towers of a prompt learner with hand-written prompts; else None.

    They came with the learner, so that nobody vouches for them: a backdoor in them is in both.
    """
    from guard.classifiers.prompts import PromptedClassifier

    return classifier.towers if isinstance(classifier, PromptedClassifier) else None
