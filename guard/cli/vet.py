"""`guard vet`."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import certified, gates, options
from guard.cli.console import Console

if TYPE_CHECKING:
    from guard.profiles import Profile

EXIT_CODES = {"no evidence": 0, "backdoored": 1, "inconclusive": 3}


@click.command()
@click.argument("model")
@options.images(
    "Folder of images, at any depth and without labels, on which triggers are searched for. Images like those of the "
    "deployment give the best result."
)
@options.classes
@click.option(
    "--base",
    help="Trusted model to compare MODEL with, such as the checkpoint that MODEL was fine-tuned from.",
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
@click.option(
    "--probes",
    type=options.PATH,
    help="TOML file with further fixed changes of images to try, in the form of guard/vetting/probes.toml.",
)
@options.budget
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
    images: Path,
    classes: Path | None,
    base: str | None,
    vocabulary: Path | None,
    out: Path,
    probes: Path | None,
    budget: str,
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
    profiles.check_place(out)
    more = guard.vetting.read_probes(probes) if probes else ()
    texts = profiles.read_vocabulary(vocabulary) if vocabulary else ()
    folder = guard.ImageFolder.scan(images).sample(limit, seed=seed)
    classifier = certified.load(model, classes, device, console, certificate or out, trust, policy)
    reference = guard.load(base, classes=classes, device=device) if base else None
    pixels = classifier.read(folder, console.progress)
    searches = cache or out.with_name(f".{out.name}.searches")
    vetting = guard.vet(
        classifier,
        pixels,
        base=reference,
        budget=budget,  # type: ignore[arg-type]  # click has checked the choice
        seed=seed,
        probes=(*guard.vetting.listed_probes(), *more),
        cache=searches,
        progress=console.progress,
    )
    profile = guard.Profile.build(classifier, vetting, vocabulary=texts)
    profile.save(out, report=report.render(profile, report.examples(profile, pixels)))
    if cache is None:
        shutil.rmtree(searches, ignore_errors=True)
    document = profile.document.vetting
    console.say(f"{document.passes} image passes in {document.seconds:.0f} s on {document.device}")
    gates.write(sarif, junit, gates.of_verdict(vetting.verdict, model))
    console.result(profile.document, summary(profile, out))
    ctx.exit(EXIT_CODES[vetting.verdict.outcome])


def summary(profile: "Profile", out: Path) -> str:
    """The verdict as text."""
    from guard.profiles import REPORT_FILE

    vetting = profile.document.vetting
    verdict, reference_model = vetting.verdict, vetting.reference_model
    target = "" if verdict.target is None else f", target class {profile.class_name(verdict.target)!r}"
    lines = [f"verdict: {verdict.outcome}{target}"]
    lines += [f"  {reason}" for reason in verdict.reasons]
    lines.append(
        f"  p = {verdict.p_value:.2g}, combined over families (Cauchy) and corrected for classes; "
        f"counts below {verdict.significance:g}"
    )
    for trigger in profile.document.triggers:
        near = ", ".join(f"{item.text!r} {item.cosine:.2f}" for item in trigger.nearest[:3])
        lines.append(f"  {trigger.id}: nearest texts {near}")
    lines.append(f"  tested for: {', '.join(verdict.families)} triggers; a backdoor of another kind would not be seen")
    if reference_model.kind == "classes":
        lines.append("  compared with nothing but the other classes; --base makes this sharper")
    else:
        name = "the base" if reference_model.kind == "base" else "a reference model made from the model itself"
        agreement = f", which answers as the model does on {reference_model.agreement:.0%} of images"
        advice = "" if reference_model.kind == "base" else "; --base makes this sharper"
        lines.append(f"  compared with {name}{agreement}{advice}")
    return "\n".join([*lines, f"profile: {out}", f"report: {out / REPORT_FILE}"])
