"""`guard vet`."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import options
from guard.cli.console import Console

if TYPE_CHECKING:
    from guard.profiles import Profile

EXIT_CODES = {"no evidence": 0, "backdoored": 1, "inconclusive": 3}


@click.command()
@click.argument("model")
@options.images("Folder of images to search on, at any depth, no labels needed; best of the deployment's own kind.")
@options.classes
@click.option("--base", help="A trusted model to compare with, such as the checkpoint that this one was tuned from.")
@click.option(
    "--vocabulary",
    type=options.PATH,
    help="Texts, one on each line, that may name what a trigger leads to, besides the class names.",
)
@click.option(
    "--out", type=options.PATH, default=Path("profile"), show_default=True, help="Where to write the profile."
)
@options.budget
@click.option("--limit", type=click.IntRange(min=64), default=2000, show_default=True, help="Most images to use.")
@click.option(
    "--cache",
    type=options.PATH,
    help="Keep finished searches here, to go on after an interruption and to reuse those of a base; "
    "default: beside the profile, until it is written.",
)
@options.seed
@options.device
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
    budget: str,
    limit: int,
    cache: Path | None,
    seed: int,
    device: str | None,
    *,
    as_json: bool,
) -> None:
    """Examine MODEL for backdoors and write its profile.

    MODEL is hf-hub:OWNER/NAME[@REVISION], ARCH::weights.safetensors, or a directory: open_clip's, or a CLIPModel of
    Hugging Face.

    Exits with 0 for no evidence (of the attack families tested), 1 for backdoored, 3 for inconclusive.
    """
    import guard
    from guard import profiles, report

    console = Console(as_json=as_json)
    profiles.check_place(out)
    texts = profiles.read_vocabulary(vocabulary) if vocabulary else ()
    folder = guard.ImageFolder.scan(images).sample(limit, seed=seed)
    classifier = guard.load(model, classes=classes, device=device)
    reference = guard.load(base, classes=classes, device=device) if base else None
    pixels = classifier.read(folder, console.progress)
    searches = cache or out.with_name(f".{out.name}.searches")
    vetting = guard.vet(
        classifier,
        pixels,
        base=reference,
        budget=budget,  # type: ignore[arg-type]  # click has checked the choice
        seed=seed,
        cache=searches,
        progress=console.progress,
    )
    profile = guard.Profile.build(classifier, vetting, vocabulary=texts)
    profile.save(out, report=report.render(profile, report.examples(profile, pixels)))
    if cache is None:
        shutil.rmtree(searches, ignore_errors=True)
    document = profile.document.vetting
    console.say(f"{document.passes} image passes in {document.seconds:.0f} s on {document.device}")
    console.result(profile.document, summary(profile, out))
    ctx.exit(EXIT_CODES[vetting.verdict.outcome])


def summary(profile: "Profile", out: Path) -> str:
    """The verdict in words, for people."""
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
