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
    "--tower",
    type=click.Choice(["image", "text"]),
    default="image",
    show_default=True,
    help="Which tower the ONNX model has: image with the head of a classifier, or text with its tokenizer, for "
    "requests that carry texts.",
)
@click.option(
    "--images",
    type=options.PATH,
    help="Folder of at least 256 images, on which the ONNX model must compute the same as MODEL.",
)
@click.option(
    "--texts",
    type=options.PATH,
    help="Text file with at least 256 different texts, one on each line, for the same comparison of a text tower.",
)
@options.classes
@options.prompt_learner
@click.option(
    "--limit",
    type=click.IntRange(min=256),
    default=1000,
    show_default=True,
    help="Maximum number of images, or of texts, to use.",
)
@certified.asked
@options.seed
@options.device
@options.as_json
def export(
    model: str,
    out: Path,
    form: str,
    tower: str,
    images: Path | None,
    texts: Path | None,
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

    The form onnx is for serving. It consists of the image tower and the head, or of the text tower and its tokenizer,
    and is checked against MODEL on real images or texts.

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
    if (images, texts)[tower == "text"] is None or (images, texts)[tower == "image"] is not None:
        needed = "--texts" if tower == "text" else "--images"
        raise UsageError(f"--format onnx of the {tower} tower needs {needed} alone for its parity check")
    if texts is not None:
        if prompt_learner is not None:
            raise UsageError("a prompt learner changes nothing in the text tower; give no --prompt-learner")
        from guard.classifiers import export_text
        from guard.vetting import read_prompts

        read = read_prompts(texts)[:limit]
        parity = export_text(certified.load(model, classes, device, console, *asked), out, read)
    elif images is not None:
        folder = guard.ImageFolder.scan(images).sample(limit, seed=seed)
        classifier = certified.load(model, classes, device, console, *asked, prompt_learner)
        parity = guard.export(classifier, out, classifier.read(folder, console.progress))
    console.result(
        parity,
        f"parity on {parity.images} {tower}s: embeddings differ by at most {parity.max_difference:.1e}, "
        f"top class equal on {parity.agreement:.0%}\nexported: {out}",
    )
