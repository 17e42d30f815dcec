"""Options that several commands share, so that they are called and explained the same everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

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
classes = click.option(
    "--classes",
    type=PATH,
    help="File with the class names: JSON (.json), or text with one name on each line and nothing else (.txt). "
    "By default, it is the classes.json beside the weights. The word everyday stands for a list of common objects, for "
    "a CLIP model without classes of its own.",
)


def images(purpose: str) -> Callable[[Command], Command]:
    """The option `--images`, with a description of what the images are for."""
    return click.option("--images", type=PATH, required=True, help=purpose)
