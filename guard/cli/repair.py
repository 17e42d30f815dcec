"""`guard repair`."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli import certified, options
from guard.cli.console import Console
from guard.cli.labelled import folders_if_named
from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.classifiers import Classifier
    from guard.profiles import Profile
    from guard.repair import Images, Method

_NAMES = ("guided", "realign", "perturb-recover", "subtract", "switch")
_LABELLED = {"realign", "perturb-recover"}
"""Methods that need labels (`perturb-recover` labels or captions)."""
EXIT_CODES = {"repaired": 0, "nothing to repair": 0, "not repaired": 1, "undecided": 3}


@click.command()
@click.argument("model")
@click.option(
    "--method",
    type=click.Choice(_NAMES),
    default="guided",
    show_default=True,
    help="How to repair. perturb-recover and switch use no reconstructed trigger; realign needs labelled images, and "
    "perturb-recover labelled images or --pairs; switch needs --base, and does not train. A prompt learner is repaired "
    "by realign.",
)
@click.option("--profile", type=options.PATH, required=True, help="Profile that guard vet wrote for MODEL.")
@options.images(
    "Folder of clean images, at least 160. With one sub-folder for each class, named like the class, they are labelled."
)
@click.option(
    "--pairs",
    type=options.PATH,
    help="CSV file with the columns image (a path below --images) and caption. These pairs are used instead of labels.",
)
@click.option(
    "--vetting-images",
    type=options.PATH,
    help="Folder of at least 64 images for the new vetting. By default, it takes those of --images that are not "
    "trained on: two fifths.",
)
@options.classes
@options.prompt_learner
@click.option(
    "--base",
    help="Trusted model that MODEL was fine-tuned from, or that the towers of a prompt learner were taken from. "
    "Without it a CoOp or CoCoOp prompt learner is undecided at best.",
)
@click.option(
    "--out", type=options.PATH, default=Path("repaired"), show_default=True, help="Folder to write the result to."
)
@click.option(
    "--revoke",
    type=options.PATH,
    help="Trust policy (TOML) to which the digests of the old model and of its certificate are added as revoked.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Number of optimiser steps, instead of the method's own.")
@click.option("--batch", type=click.IntRange(min=2), help="Number of images in each step, instead of the method's own.")
@click.option(
    "--forward-batch",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Maximum number of images in one forward pass. Larger batches are taken apart, which gives the same gradient.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Peak learning rate, instead of the method's own.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How often the method may be applied. Another round uses the triggers that the new vetting found.",
)
@click.option("--anyway", is_flag=True, help="Work on MODEL although its verdict is no evidence.")
@options.probes
@click.option(
    "--budget",
    type=click.Choice(["quick", "standard", "thorough"]),
    help="Effort of the new vetting.  [default: that of the vetting in the profile]",
)
@click.option(
    "--limit", type=click.IntRange(min=160), default=20_000, show_default=True, help="Maximum number of images to use."
)
@options.seed
@options.device
@options.as_json
@click.pass_context
def repair(
    ctx: click.Context,
    model: str,
    method: str,
    profile: Path,
    images: Path,
    pairs: Path | None,
    vetting_images: Path | None,
    classes: Path | None,
    prompt_learner: Path | None,
    base: str | None,
    out: Path,
    revoke: Path | None,
    steps: int | None,
    batch: int | None,
    forward_batch: int,
    learning_rate: float | None,
    rounds: int,
    probes: Path | None,
    budget: str | None,
    limit: int,
    seed: int,
    device: str | None,
    *,
    anyway: bool,
    as_json: bool,
) -> None:
    """Remove the backdoor of MODEL, vet the result, and write it with a profile of its own.

    OUT gets the new model, its profile with a report that compares before and after, the record repair.json, and
    revoked.toml, which makes a trust policy refuse the old model. A killed command continues where it stopped when it
    is given again.

    The exit code is 0 if the model is repaired (the new verdict is no evidence) or if there was nothing to repair, 1 if
    it is not repaired, and 3 if the new verdict is inconclusive.
    """
    import guard
    from guard import repair as room
    from guard.certificates import Policy
    from guard.certificates.revocation import revoke as revoke_in
    from guard.vetting.budgets import name_of

    console = Console(as_json=as_json)
    store = options.beside(out, "training")
    room.check_place(out)
    if revoke is not None:
        Policy.read(revoke)  # what is wrong with it is said before the work
    known = guard.Profile.open(profile)
    suspect = certified.with_prompts(guard.load(model, classes=classes, device=device), prompt_learner)
    known.check_model(suspect.digest)
    tried = (*guard.vetting.listed_probes(), *(guard.vetting.read_probes(probes) if probes else ()))
    _check_probes(known, {probe.name for probe in tried})
    trusted = guard.load(base, classes=classes, device=device) if base else None
    given = _read(images, pairs, suspect, limit, seed, console, needed=method in _LABELLED)
    other = None
    if vetting_images is not None:
        other = suspect.read(guard.ImageFolder.scan(vetting_images).sample(limit, seed=seed), console.progress)
    found = known.load_triggers()
    triggers = [room.TargetedTrigger(each.id, found[each.id], each.target) for each in known.document.triggers]
    repaired = room.repair(
        suspect,
        _method(method, steps, batch, forward_batch, learning_rate),
        given,
        verdict=known.document.vetting.verdict,
        triggers=triggers,
        base=trusted,
        vetting_images=other,
        budget=budget or name_of(known.document.vetting.effort) or "standard",  # type: ignore[arg-type]  # a choice
        probes=tried,
        text_tower=known.document.text is not None,
        rounds=rounds,
        anyway=anyway,
        seed=seed,
        store=store,
        progress=console.progress,
    )
    revoked = room.revoked_digests(known, profile, repaired.repair)
    room.write(out, repaired, suspect, known, given.pixels, revoked)
    shutil.rmtree(store, ignore_errors=True)
    result = repaired.repair
    if revoke is not None and revoked:
        for digest in revoke_in(revoke, revoked):
            console.say(f"{revoke} now revokes {digest}")
    console.result(result, room.summary(result, out))
    ctx.exit(EXIT_CODES[result.outcome])


def _method(
    name: str, steps: int | None, batch: int | None, forward_batch: int, learning_rate: float | None
) -> "Method":
    """The method with the settings that were given."""
    from guard.repair import METHODS

    method: Any = METHODS[name]()
    changes = {"steps": steps, "batch": batch, "learning_rate": learning_rate}
    given = {key: value for key, value in changes.items() if value is not None}
    if not hasattr(method, "tuning"):
        if given:
            raise UsageError(f"the method {name} does not train; it takes no --{next(iter(given)).replace('_', '-')}")
        return method  # type: ignore[no-any-return]
    # What a method tunes prompts with it takes from the command line as well.
    courses = {name: getattr(method, name) for name in ("tuning", "new_prompts") if hasattr(method, name)}
    changed = {name: replace(course, forward_batch=forward_batch, **given) for name, course in courses.items()}
    return replace(method, **changed)  # type: ignore[no-any-return]


def _check_probes(profile: "Profile", tried: set[str]) -> None:
    """Make sure that the new vetting tries the probes that speak against the model."""
    for check in profile.document.vetting.checks:
        if check.probe is not None and check.probe not in tried:
            raise UsageError(
                f"the vetting in the profile tried the probe {check.probe!r}, which is not in guard's list; give the "
                "file that it is in with --probes"
            )


def _read(
    root: Path,
    pairs: Path | None,
    suspect: "Classifier",
    limit: int,
    seed: int,
    console: Console,
    *,
    needed: bool,
) -> "Images":
    """The images, with labels or captions if there are any.

    Raises:
        UsageError: The method needs labels, and only some sub-folders are named like classes.
    """
    import torch

    from guard.classifiers import ImageFolder
    from guard.repair import Images, read_pairs

    if pairs is not None:
        everything, captions = read_pairs(pairs, root)
        chosen = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))[:limit].tolist()
        folder = ImageFolder(root, tuple(everything.files[k] for k in chosen))
        return Images(suspect.read(folder, console.progress), captions=tuple(captions[k] for k in chosen))
    everything = ImageFolder.scan(root)
    names, why = None, f"no sub-folder of {root} is named like a class"
    try:
        names = folders_if_named(everything, suspect)  # before some are drawn: a rare class may have none among them
    except UsageError as error:
        if needed:
            raise
        why = str(error)
    folder = everything.sample(limit, seed=seed)
    labels = None if names is None else torch.tensor(folder.labels(names), dtype=torch.long)
    if labels is None:
        console.say(f"the images have no labels: {why}")
    return Images(suspect.read(folder, console.progress), labels)
