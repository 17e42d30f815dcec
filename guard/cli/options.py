"""Options that several commands share, so that they are called and explained the same everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.certificates import Policy

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def beside(out: Path, what: str) -> Path:
    """The hidden folder beside a result that keeps work which is not finished.

    Raises:
        UsageError: The result has no name of its own.
    """
    if out.name in {"", ".."}:
        raise UsageError(f"{out} is no name for a folder to write; give one, such as {out / 'result'}")
    return out.with_name(f".{out.name}.{what}")


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed for all random choices.")
device = click.option(
    "--device",
    help="The torch device to compute on, such as cpu or cuda:1. By default, a GPU is used if there is one.",
)
budget = click.option(
    "--budget",
    type=click.Choice(["quick", "standard", "thorough"]),
    default="standard",
    show_default=True,
    help="Effort of the search for triggers. A larger budget makes more optimisation steps and takes longer.",
)
probes = click.option(
    "--probes",
    type=PATH,
    help="TOML file with further fixed changes of images to try, in the form of guard/vetting/probes.toml.",
)
classes = click.option(
    "--classes",
    type=PATH,
    help="File with the class names: JSON (.json), or text with one name on each line and nothing else (.txt). "
    "By default, it is the classes.json beside the weights. The word everyday stands for a list of common objects, for "
    "a CLIP model without classes of its own.",
)


prompt_learner = click.option(
    "--prompt-learner",
    type=PATH,
    help="Safetensors file of a prompt learner (CoOp, CoCoOp or a visual prompt) that takes the place of MODEL's "
    "prompts. The command guard convert makes it of a checkpoint. One that lies in MODEL's folder as "
    "prompt_learner.safetensors is taken anyway, and certificates cover it.",
)


def engine(command: Command) -> Command:
    """The options `--jobs` and `--ray`: where the work is done."""
    for option in (
        click.option(
            "--ray",
            metavar="ADDRESS",
            help="Work on the Ray cluster at this address, or with auto on the one that this machine belongs to, "
            "instead of in processes of this machine. All its machines must see the same files under the same paths.",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Number of processes that work at the same time.",
        ),
    ):
        command = option(command)
    return command


def trust(command: Command) -> Command:
    """The options `--trust` and `--policy`."""
    for option in (
        click.option(
            "--policy",
            type=PATH,
            multiple=True,
            help="TOML file of a trust policy (docs/certificates.md). Of several, each must accept the model.",
        ),
        click.option(
            "--trust",
            type=PATH,
            multiple=True,
            help="PEM file of a public key. A certificate that one of these keys signed is accepted if its verdict is "
            '"no evidence".',
        ),
    ):
        command = option(command)
    return command


def policies(
    trust: tuple[Path, ...], policy: tuple[Path, ...], model_signing: Path | None = None
) -> "tuple[Policy, ...]":
    """The policies that these options ask for.

    Raises:
        UsageError: They ask for none.
        CertificateError: A key or a policy cannot be used.
    """
    from guard.certificates.policy import read_policies

    if model_signing is not None and not trust:
        raise UsageError("--oms-key needs --trust; a policy names such a key itself")
    if not (trust or policy):
        raise UsageError("say whom to trust: give --trust KEY.pub or --policy FILE")
    return read_policies(policy, trust, model_signing=model_signing)


def images(purpose: str, *, required: bool = True) -> Callable[[Command], Command]:
    """The option `--images`, with a description of what the images are for."""
    return click.option("--images", type=PATH, required=required, help=purpose)
