"""`guard calibrate`."""

import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import click

from guard.cli import certified, options
from guard.cli.clean_inputs import CleanImages, CleanInputs, CleanTexts
from guard.cli.console import Console
from guard.errors import ModelError, StateError, UsageError

if TYPE_CHECKING:
    from guard.profiles import InputKind, LeftOut, OpinionKind, Profile, SecondOpinionRecord
    from guard.screening import Axis

_ENOUGH_AGREEMENT = 0.9
"""Share of clean images with the same answer below which a reference model is called weak."""


@click.command()
@click.argument("profile", type=options.PATH)
@click.option(
    "--images",
    type=options.PATH,
    help="Folder of clean images like those that requests will carry. None of them may have been used in training.",
)
@click.option(
    "--texts",
    type=options.PATH,
    help="Text file with clean texts like those that requests will carry, one on each line, instead of --images: then "
    "the profile screens requests to the text tower. None of the texts may have been used in training.",
)
@click.option(
    "--embeddings",
    type=options.PATH,
    help="File of embeddings of clean requests (.npy, shape [N, D]), such as recorded traffic, to use instead of "
    "--images or --texts. Then only the threshold is set anew, and the banks stay as they are.",
)
@click.option(
    "--alpha",
    type=float,
    default=0.01,
    show_default=True,
    help="False-alarm rate: the share of clean images that may be flagged.",
)
@options.prompt_learner
@click.option(
    "--model",
    help="The model that the profile was made for, if it is no longer at the place that the profile names.",
)
@click.option(
    "--base",
    help="A trusted model of the same classes and input size, such as the checkpoint that the model was tuned from. It "
    "gives second opinions on requests, unless --reference says otherwise.",
)
@click.option(
    "--reference",
    type=click.Choice(("base", "derived", "student", "none")),
    help="The reference model that gives second opinions. base: that of --base. student: a small network that learns "
    "from the model what it answers to the clean images, and costs little per request; there is none for texts. "
    "derived: the model itself, disturbed and taught again. none: no second opinions. By default, it is base if --base "
    "is given, the towers of a prompt learner with hand-written prompts, and otherwise student for images and none for "
    "texts.",
)
@click.option(
    "--k",
    type=click.IntRange(min=1),
    help="Number of nearest neighbours that the density score uses. By default, it follows from the size of the banks.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=10),
    default=5000,
    show_default=True,
    help="Maximum number of images, or of texts, to use.",
)
@click.option(
    "--per-class",
    is_flag=True,
    help="Keep the false-alarm rate for each predicted class that has enough images, and not only over all classes.",
)
@click.option(
    "--adopt-axis",
    "adopted",
    metavar="PATH[:NAME]",
    help="Make an axis of the traffic that a sidecar found a score of the profile, as a reconstructed trigger is: the "
    "folder of the sidecar's state or a file axis-*.safetensors in it, and the name of the axis if not all are meant. "
    "Look at the requests that formed it first (guard log --trigger NAME). Without --images and --embeddings, only the "
    "threshold is set anew.",
)
@certified.asked
@options.seed
@options.device
@options.as_json
def calibrate(
    profile: Path,
    images: Path | None,
    texts: Path | None,
    embeddings: Path | None,
    alpha: float,
    model: str | None,
    prompt_learner: Path | None,
    base: str | None,
    reference: "OpinionKind | Literal['none'] | None",
    k: int | None,
    limit: int,
    adopted: str | None,
    seed: int,
    device: str | None,
    certificate: Path | None,
    trust: tuple[Path, ...],
    policy: tuple[Path, ...],
    *,
    per_class: bool,
    as_json: bool,
) -> None:
    """Build the reference banks of PROFILE, make its reference model, and set the threshold for a false-alarm rate.

    The smallest possible false-alarm rate is 1 / (n + 1), where n is 40 % of the number of images or texts, or
    two thirds of the number of embeddings.
    """
    import guard
    from guard import profiles, report

    given = sum(each is not None for each in (images, texts, embeddings))
    if given > 1 or (given == 0 and adopted is None):
        raise UsageError("give one of --images, --texts and --embeddings")
    if (reference == "base") > (base is not None) or (base is not None and reference not in {None, "base"}):
        raise UsageError("--reference base and --base MODEL belong together")
    console = Console(as_json=as_json)
    # The reference model is exported here, until it is copied into the profile.
    with TemporaryDirectory(prefix="guard-") as temporary:
        calibrated = stored = guard.Profile.open(profile)
        if adopted is not None:
            calibrated = stored = stored.adopt(_axes(adopted, stored))
        if embeddings is not None:
            if k is not None or model is not None or base is not None or reference is not None:
                raise UsageError(
                    "--k, --model, --base and --reference need --images or --texts: with --embeddings the banks stay "
                    "as they are"
                )
            vectors = profiles.read_embeddings(embeddings, stored.document.model.embedding)
            calibrated = stored.recalibrate(vectors, alpha, per_class=per_class, seed=seed)
            text = report.render(calibrated, report.examples(calibrated))
        elif given:
            folder = guard.ImageFolder.scan(images).sample(limit, seed=seed) if images is not None else None
            named = model or stored.document.model.source
            try:
                classes = stored.document.model.classes
                classifier = certified.load(
                    named, classes, device, console, certificate or profile, trust, policy, prompt_learner
                )
            except ModelError as error:
                if model is not None:
                    raise
                hint = (
                    f"the profile names its model {named!r}, as it was given to guard vet; give its place with --model"
                )
                raise ModelError(f"{error}; {hint}") from error
            stored.check_model(classifier.digest)
            samples: CleanInputs
            if texts is not None:
                samples = CleanTexts.read(classifier, texts, limit, seed, console)
            elif folder is not None:
                samples = CleanImages.read(classifier, folder, console)
            towers = certified.own_towers(classifier) if base is None and reference is None and texts is None else None
            kind = "base" if towers else samples.kind_of(reference, base)
            other = towers
            if kind is not None and other is None:
                other = samples.reference_model(stored, kind, base, seed)
            calibrated = samples.calibrate(
                stored, alpha, k=k, per_class=per_class, reference=other, kind=kind or "base", seed=seed
            )
            text = report.render(calibrated, report.examples(calibrated, samples.pixels))
            if other is not None:
                console.say("exporting the reference model")
                samples.export(other, Path(temporary) / "reference")
                calibrated = calibrated.with_reference_model(Path(temporary) / "reference")
        else:
            text = report.render(calibrated, report.examples(calibrated))
        calibrated.save(profile, report=text)
    record = calibrated.document.calibration
    if record is None:
        raise AssertionError("calibration leaves a record")
    rate = record.false_alarms / max(1, record.held_out)
    scores, threshold = (*record.tails, *(axis.name for axis in calibrated.document.axes)), record.threshold
    console.result(
        record,
        f"scores: {', '.join(scores)}; k = {record.k}, {record.reference} {record.inputs} in each bank\n"
        + _opinion(record.second_opinion, record.inputs)
        + f"threshold: {threshold.value:.4f} for alpha = {threshold.alpha:g}, from {threshold.size} clean scores\n"
        f"false alarms on {record.held_out} held-out {record.inputs}: {record.false_alarms} ({rate:.2%})\n"
        + _left_out(record.left_out, record.inputs)
        + f"profile: {profile}",
    )


def _axes(where: str, profile: "Profile") -> list["Axis"]:
    """The axes that a person has confirmed.

    Raises:
        UsageError: There are none.
        StateError: The named file cannot be used.
    """
    from guard.screening import axis_state

    found = re.fullmatch(r"(.+):(axis-[0-9]+)", where)
    path, name = (Path(found[1]), found[2]) if found else (Path(where), None)
    reference = None if profile.reference is None else profile.reference.axis
    if reference is None:
        raise UsageError("the profile knows no axes; calibrate it with images once")
    axes: list[Axis] = []
    for file in sorted(path.glob("axis-*.safetensors")) if path.is_dir() else [path]:
        try:
            axes += axis_state.read_axes(file, reference)
        except StateError:
            if not path.is_dir():  # the folder may be shared with other models
                raise
    chosen = [axis for axis in axes if name in {None, axis.name}]
    if not chosen:
        raise UsageError(f"{path} holds no axis{f' {name}' if name else ''} of the model of this profile")
    return chosen


def _left_out(items: Sequence["LeftOut"], inputs: "InputKind") -> str:
    if not items:
        return ""
    names = ", ".join(item.image for item in items[:5]) + (", …" if len(items) > 5 else "")
    return f"left out because they seem to carry a trigger: {len(items)} {inputs} ({names}); the report lists them\n"


def _opinion(record: "SecondOpinionRecord | None", inputs: "InputKind" = "images") -> str:
    if record is None:
        return "second opinion: none\n"
    said = f"second opinion: {record.source}, which gives the same answer to {record.agreement:.1%} of clean {inputs}\n"
    if record.agreement < _ENOUGH_AGREEMENT:
        made = "student" if inputs == "images" else "derived"
        other = f"--reference {made} may do better" if record.kind == "base" else "a trusted --base may do better"
        said += f"  that is little: where the two often disagree honestly, an attack hardly shows; {other}\n"
    return said
