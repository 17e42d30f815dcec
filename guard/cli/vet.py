"""`guard vet`."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import certified, gates, options
from guard.cli.console import Console
from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.profiles import Profile
    from guard.vetting import TextVetting

EXIT_CODES = {"no evidence": 0, "backdoored": 1, "inconclusive": 3}


@click.command()
@click.argument("model")
@click.option(
    "--tower",
    type=click.Choice(["image", "text", "both"]),
    default="image",
    show_default=True,
    help="Which tower to examine. The text tower matters where class names or queries come from users.",
)
@options.images(
    "Folder of images, at any depth and without labels, on which triggers are searched for. Images like those of the "
    "deployment give the best result. The text tower alone needs none.",
    required=False,
)
@click.option(
    "--prompts",
    type=options.PATH,
    help="Text file with one ordinary prompt on each line, at least 96, on which triggers of the text tower are "
    "searched for. By default, they are made from guard's own list of words.",
)
@options.classes
@options.prompt_learner
@click.option(
    "--base",
    help="Trusted model to compare MODEL with, such as the checkpoint that MODEL was fine-tuned from, or that the "
    "towers of a prompt learner were taken from. Without it nobody vouches for the towers of a CoOp or CoCoOp prompt "
    "learner, and its verdict is inconclusive instead of no evidence.",
)
@click.option(
    "--vocabulary",
    type=options.PATH,
    help="Text file with one text on each line. These texts are compared with the target of a trigger, in addition to "
    "the class names.",
)
@click.option(
    "--out", type=options.PATH, default=Path("profile"), show_default=True, help="Folder to write the profile to."
)
@options.probes
@options.budget
@click.option(
    "--repeat",
    type=click.IntRange(1, 100),
    help="Number of vettings of the image tower, each with the next seed, whose evidence is combined.  [default: 1, "
    "and up to 2 more while the verdict is close to a threshold]",
)
@click.option(
    "--limit", type=click.IntRange(min=64), default=2000, show_default=True, help="Maximum number of images to use."
)
@click.option(
    "--cache",
    type=options.PATH,
    help="Folder that keeps finished searches, so that an interrupted command can continue and searches on the same "
    "base model are reused. By default, they are kept beside the profile until it is written.",
)
@options.seed
@options.device
@certified.asked
@gates.outputs
@options.as_json
@click.pass_context
def vet(
    ctx: click.Context,
    model: str,
    tower: str,
    images: Path | None,
    prompts: Path | None,
    classes: Path | None,
    prompt_learner: Path | None,
    base: str | None,
    vocabulary: Path | None,
    out: Path,
    probes: Path | None,
    budget: str,
    repeat: int | None,
    limit: int,
    cache: Path | None,
    seed: int,
    device: str | None,
    certificate: Path | None,
    trust: tuple[Path, ...],
    policy: tuple[Path, ...],
    sarif: Path | None,
    junit: Path | None,
    *,
    as_json: bool,
) -> None:
    """Examine MODEL for backdoors and write its profile.

    MODEL is hf-hub:OWNER/NAME[@REVISION], ARCH::weights.safetensors, or a directory of open_clip or of a Hugging Face
    CLIPModel.

    The exit code is 0 for no evidence of a backdoor (of the attack families tested), 1 for backdoored and 3 for
    inconclusive.
    """
    import guard
    from guard import profiles, report

    console = Console(as_json=as_json)
    searches = cache or options.beside(out, "searches")
    profiles.check_place(out)
    if tower != "text" and images is None:
        raise UsageError("the image tower is examined on images; give --images DIR, or --tower text")
    if tower == "image" and prompts is not None:
        raise UsageError("--prompts are for the text tower; give --tower text or --tower both too")
    if tower != "image" and prompt_learner is not None:
        raise UsageError(
            "a prompt learner changes nothing in the text tower; give --tower image, or no --prompt-learner"
        )
    more = guard.vetting.read_probes(probes) if probes else ()
    texts = profiles.read_vocabulary(vocabulary) if vocabulary else ()
    ordinary = guard.vetting.read_prompts(prompts) if prompts else ()
    folder = guard.ImageFolder.scan(images).sample(limit, seed=seed) if images and tower != "text" else None
    classifier = certified.load(model, classes, device, console, certificate or out, trust, policy, prompt_learner)
    reference = guard.load(base, classes=classes, device=device) if base else None
    image_vetting = text_vetting = pixels = None
    if tower != "image":
        text_vetting = guard.vet_text(
            classifier,
            ordinary,
            base=reference,
            budget=budget,  # type: ignore[arg-type]  # click has checked the choice
            seed=seed,
            captions=texts,
            cache=searches,
            progress=console.progress,
        )
        console.say(f"{text_vetting.passes} prompt passes in {text_vetting.seconds:.0f} s on {text_vetting.device}")
    if folder is not None:
        pixels = classifier.read(folder, console.progress)
        image_vetting = guard.vet(
            classifier,
            pixels,
            base=reference,
            budget=budget,  # type: ignore[arg-type]  # click has checked the choice
            seed=seed,
            repeats=repeat,
            probes=(*guard.vetting.listed_probes(), *more),
            cache=searches,
            progress=console.progress,
        )
        console.say(f"{image_vetting.passes} image passes in {image_vetting.seconds:.0f} s on {image_vetting.device}")
    profile = guard.Profile.build(classifier, image_vetting, text=text_vetting, vocabulary=texts)
    profile.save(out, report=report.render(profile, report.examples(profile, pixels)))
    if cache is None:
        shutil.rmtree(searches, ignore_errors=True)
    verdict = profile.document.vetting.verdict
    gates.write(sarif, junit, gates.of_verdict(verdict, model))
    console.result(profile.document, summary(profile, out))
    ctx.exit(EXIT_CODES[verdict.outcome])


def summary(profile: "Profile", out: Path) -> str:
    """The verdict as text."""
    from guard.profiles import REPORT_FILE

    vetting = profile.document.vetting
    verdict, reference_model = vetting.verdict, vetting.reference_model
    target = "" if verdict.target is None else f", target class {profile.class_name(verdict.target)!r}"
    lines = [f"verdict: {verdict.outcome}{target}"]
    lines += [f"  {reason}" for reason in verdict.reasons]
    corrected = " and corrected for classes" if vetting.results else ""
    lines.append(
        f"  p = {verdict.p_value:.2g}, combined over families (Cauchy){corrected}; "
        f"counts below {verdict.significance:g}"
    )
    for trigger in profile.document.triggers:
        near = ", ".join(f"{item.text!r} {item.cosine:.2f}" for item in trigger.nearest[:3])
        lines.append(f"  {trigger.id}: nearest texts {near}")
    if profile.document.text is not None:
        lines += text_summary(profile.document.text)
    lines.append(f"  tested for: {', '.join(verdict.families)} triggers; a backdoor of another kind would not be seen")
    if reference_model.kind == "classes":
        lines.append("  compared with nothing but the other classes; --base makes this sharper")
    else:
        names = {"base": "the base", "towers": "prompts tuned anew on the towers of the base"}
        name = names.get(reference_model.kind, "a reference model made from the model itself")
        agreement = ""
        if vetting.results:
            agreement = f", which answers as the model does on {reference_model.agreement:.0%} of images"
        advice = "" if reference_model.kind in names else "; --base makes this sharper"
        lines.append(f"  compared with {name}{agreement}{advice}")
        if (differs := reference_model.difference) is not None:
            lines.append(f"  the weights differ from those of the base by {differs.size:.0%}, {differs.looks}")
    return "\n".join([*lines, f"profile: {out}", f"report: {out / REPORT_FILE}"])


def text_summary(text: "TextVetting") -> list[str]:
    """What was found in the text tower, as lines."""
    trigger = text.trigger
    captions = ", ".join(repr(item.text) for item in trigger.captions[:3])
    return [
        f"  text tower: {text.verdict.outcome} (p = {text.verdict.p_value:.2g})",
        f"  strongest {trigger.kind}: {trigger.text!r}; {trigger.success:.0%} of prompts mean the same with it",
        f"  ({trigger.reference_success:.0%} on the reference model), nearest to {captions}",
    ]
