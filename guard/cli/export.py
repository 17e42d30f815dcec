"""`guard export`."""

from pathlib import Path

import click

from guard.cli import certified, options
from guard.cli.console import Console
from guard.errors import UsageError


@click.command()
@click.argument("model")
@click.option("--out", type=options.PATH, required=True, help="Directory to write the result to.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "hugging-face"]),
    default="onnx",
    show_default=True,
    help="Form of the result: onnx is for guard serve, hugging-face is for the library transformers.",
)
@click.option(
    "--images",
    type=options.PATH,
    help="Folder of at least 256 images, on which the ONNX model must compute the same as MODEL.",
)
@options.classes
@options.prompt_learner
@click.option(
    "--limit", type=click.IntRange(min=256), default=1000, show_default=True, help="Maximum number of images to use."
)
@certified.asked
@options.seed
@options.device
@options.as_json
def export(
    model: str,
    out: Path,
    form: str,
    images: Path | None,
    classes: Path | None,
    prompt_learner: Path | None,
    limit: int,
    seed: int,
    device: str | None,
    certificate: Path | None,
    trust: tuple[Path, ...],
    policy: tuple[Path, ...],
    *,
    as_json: bool,
) -> None:
    """Write MODEL in another form.

    The form onnx is for serving. It consists of the image tower and the head, and is checked against MODEL on real
    images.

    The form hugging-face is a CLIPModel directory for the library transformers, with the same weights under other
    names.
    """
    import guard

    console = Console(as_json=as_json)
    if (trust or policy) and certificate is None:
        raise UsageError("--trust and --policy need the --certificate of the model")
    asked = certificate or Path(), trust, policy
    if form == "hugging-face":
        classifier = certified.load(model, classes, device, console, *asked, prompt_learner)
        from guard.classifiers import save_hugging_face

        save_hugging_face(out, classifier)
        console.result({"classifier": classifier.digest.root}, f"exported: {out}")
        return
    if images is None:
        raise UsageError("--format onnx needs --images for its parity check")
    folder = guard.ImageFolder.scan(images).sample(limit, seed=seed)
    classifier = certified.load(model, classes, device, console, *asked, prompt_learner)
    pixels = classifier.read(folder, console.progress)
    parity = guard.export(classifier, out, pixels)
    console.result(
        parity,
        f"parity on {parity.images} images: embeddings differ by at most {parity.max_difference:.1e}, "
        f"top class equal on {parity.agreement:.0%}\nexported: {out}",
    )
