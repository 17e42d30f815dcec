"""Options that several commands share, so that they read alike everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
seed = click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
device = click.option("--device", help="torch device, such as cpu or cuda:1; default: a GPU if there is one.")
budget = click.option(
    "--budget",
    type=click.Choice(["quick", "standard", "thorough"]),
    default="standard",
    show_default=True,
    help="How hard to search.",
)
classes = click.option(
    "--classes",
    type=PATH,
    help="Class list, instead of the classes.json beside the weights; 'everyday': common things, if it is none.",
)


def images(purpose: str) -> Callable[[Command], Command]:
    """`--images DIR`, and what the images are for."""
    return click.option("--images", type=PATH, required=True, help=purpose)
