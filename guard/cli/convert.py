"""`guard convert`."""

from pathlib import Path

import click

from guard.cli import options
from guard.cli.console import Console


@click.command()
@click.argument("checkpoint", type=options.PATH)
@click.option(
    "--out",
    type=options.PATH,
    default=Path("learner.safetensors"),
    show_default=True,
    help="Safetensors file to write.",
)
@options.as_json
def convert(checkpoint: Path, out: Path, *, as_json: bool) -> None:
    """Convert CHECKPOINT, a prompt learner of the public code of CoOp or CoCoOp, into safetensors.

    CHECKPOINT is a pickle, such as prompt_learner/model.pth.tar-50. Nothing in it is run: only the tensors of a prompt
    learner are read, and whatever else it holds is refused or left out.
    """
    from guard.classifiers.prompts import convert_prompt_learner, save_prompt_learner

    learner = convert_prompt_learner(checkpoint)
    save_prompt_learner(out, learner)
    shapes = {name: list(tensor.shape) for name, tensor in learner.tensors.items()}
    lines = [f"  {name}: {' × '.join(map(str, shape))}" for name, shape in shapes.items()]
    text = "\n".join([f"{learner.kind} prompt learner", *lines, f"written to {out}"])
    Console(as_json=as_json).result({"kind": learner.kind, "tensors": shapes}, text)
