"""What vetting costs at the size of deployed models: an open_clip ViT-B/32 at 224 pixels with 1,000 classes.

python -m benchmarks.real_sizes --images FOLDER --model MODEL --base BASE --small-images FOLDER [--device DEVICE]

The large model has random weights, which cost as much as others. Each part of a vetting runs for a few steps, for its
time per pass and the memory that it takes. How many passes a whole vetting makes does not depend on the tower: it is
counted on the small MODEL, with class names made by code. Both together give the projected time.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._record import RESULTS, heading
from guard.classifiers import Classifier, ClassList, ImageFolder, Preprocessing, load
from guard.classifiers.open_clip import import_open_clip, pick_device, quiet
from guard.triggers import FAMILIES
from guard.vetting import BUDGETS, Inspector, Lead, Vetting, derive_reference, listed_probes, vet
from guard.vetting.memory import images_at_once
from guard.vetting.probes import probe_classes
from guard.vetting.results import PROBES
from guard.vetting.search import search_targets

ARCHITECTURE = "ViT-B-32"
CLASSES = (50, 1000)
IMAGES = 32
"""Number of images that the large model is timed on."""
EFFORT = BUDGETS["quick"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPLATE = "a photo of a {}."
PROMPTS = 64
"""Number of prompts whose embedding is timed."""


def names(count: int) -> tuple[str, ...]:
    """Class names, all different: a colour, a material and a thing."""
    colours = ("red", "green", "blue", "yellow", "black", "white", "grey", "brown", "pink", "orange")
    materials = ("wooden", "iron", "glass", "paper", "stone", "silver", "woollen", "plastic", "golden", "clay")
    things = ("cup", "chair", "boat", "house", "lamp", "bridge", "drum", "clock", "wheel", "statue")
    return tuple(" ".join(words) for words in product(colours, materials, things))[:count]


@dataclass(frozen=True)
class Part:
    """What one part of a vetting takes.

    Attributes:
        name: What was run.
        passes: Number of images pushed through image towers; of prompts pushed through the text tower.
        seconds: Processor time; on a GPU, wall-clock time.
        peak: Largest memory so far in bytes, of the process or, on a GPU, of the device.
    """

    name: str
    passes: int
    seconds: float
    peak: int


def large(device: str | None, jitter: float = 0.0) -> Classifier:
    """The large model with random weights, and with jitter another one that resembles it."""
    open_clip = import_open_clip()
    config = open_clip.get_model_config(ARCHITECTURE)
    torch.manual_seed(0)
    with quiet():
        model = open_clip.create_model(ARCHITECTURE, pretrained=None)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(jitter * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0)
    return Classifier(
        model,
        config,
        open_clip.get_tokenizer(ARCHITECTURE),
        Preprocessing(config["vision_cfg"]["image_size"], MEAN, STD),
        ClassList(names(max(CLASSES)), (TEMPLATE,)),
        source=f"{ARCHITECTURE} with random weights",
        device=pick_device(device),
    )


def _head(suspect: Classifier, *_: Any) -> int:  # noqa: ANN401 - the other arguments are those of all parts
    with torch.no_grad():
        for name in suspect.classes.names[:PROMPTS]:
            suspect.encode_texts(suspect.classes.prompts(name))
    return PROMPTS


def _probes(suspect: Classifier, base: Classifier, images: Tensor) -> int:
    return probe_classes(suspect, images[:12], listed_probes()[::80], reference_model=base).passes


def _search(suspect: Classifier, base: Classifier, images: Tensor) -> int:
    settings = replace(EFFORT.target_search, steps=1, starts=1)
    return search_targets(suspect, images, "blend", settings, reference_model=base)[0].passes


def _inspection(suspect: Classifier, base: Classifier, images: Tensor) -> int:
    """A few steps of two classes: more of them take more time, and no more memory."""
    inspector = Inspector(Lead(suspect, images, base), FAMILIES["blend"], torch.arange(2), EFFORT.inspection)
    return sum(item.passes for item in inspector.run(4, range(2)))


def _teaching(suspect: Classifier, _: Classifier, images: Tensor) -> int:
    return derive_reference(suspect, images, replace(EFFORT.derived_reference, steps=1))[1]


PARTS: dict[str, Callable[[Classifier, Classifier, Tensor], int]] = {
    "prompts of the head": _head,
    "probes": _probes,
    "search that names no class": _search,
    "inspection": _inspection,
    "teaching of a derived reference": _teaching,
}


def measured(images: Path, device: str | None) -> list[Part]:
    """Run each part, those that take more memory later, since the largest memory of a process never falls."""
    suspect, base = large(device), large(device, jitter=0.05)
    pixels = suspect.read(ImageFolder.scan(images).sample(IMAGES, seed=0))
    for model in (suspect, base):  # in place of the embeddings of all prompts, of which a few are timed
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn((max(CLASSES), model.model.visual.output_dim), generator=generator)
        model.__dict__["head"] = torch.nn.functional.normalize(rows, dim=-1).to(model.device)
    found = [Part("both models and the images in memory", 0, 0.0, _peak(suspect.device))]
    for name, part in PARTS.items():
        began = _clock(suspect.device)
        passes = part(suspect, base, pixels)
        found.append(Part(name, passes, _clock(suspect.device) - began, _peak(suspect.device)))
        sys.stderr.write(json.dumps(asdict(found[-1])) + "\n")
    return found


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.monotonic()
    return time.process_time()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def counted(model: str, base: str | None, images: Tensor, count: int) -> Vetting:
    """Vet the small model with more classes: its own come first."""
    own = load(model).classes
    more = ClassList((*own.names, *names(count))[:count], own.templates)
    return vet(
        load(model, classes=more),
        images,
        base=load(base, classes=more) if base else None,
        budget="quick",
        seed=0,
        repeats=1,
    )


def split(found: Vetting) -> dict[str, int]:
    """The passes of a vetting, by part. Those of reconstructions include the checks and the search of candidates."""
    probes = sum(item.passes for item in found.results if item.family == PROBES)
    inspection = sum(item.passes for item in found.results if item.family != PROBES)
    reference = found.reference_model.passes
    return {
        "probes": probes,
        "inspection": inspection,
        "teaching of a derived reference": reference if found.reference_model.kind == "derived" else 0,
        "searches that name no class, reconstructions and checks": found.passes - probes - inspection - reference,
    }


def main() -> None:
    """Measure, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="Images for the large model.")
    parser.add_argument("--model", required=True, help="A small model that passes are counted on.")
    parser.add_argument("--base", required=True, help="Its base.")
    parser.add_argument("--small-images", type=Path, required=True, help="Images for the small model.")
    parser.add_argument("--device")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = measured(arguments.images, arguments.device)
    small = load(arguments.model)
    pixels = small.read(ImageFolder.scan(arguments.small_images).sample(1000, seed=0))
    vettings = {
        (kind, count): counted(arguments.model, base, pixels, count)
        for kind, base in (("base", arguments.base), ("derived", None))
        for count in CLASSES
    }
    suspect, base = large(arguments.device), large(arguments.device, jitter=0.05)
    text = heading("Vetting at the size of deployed models", "python -m benchmarks.real_sizes")
    (RESULTS / "real-sizes.md").write_text(
        text + report(parts, vettings, images_at_once([suspect, base])), encoding="utf-8"
    )


def report(parts: list[Part], vettings: dict[tuple[str, int], Vetting], at_once: int) -> str:
    """The tables, and the projected time."""
    per_pass = {part.name: part.seconds / part.passes for part in parts if part.passes}
    measured_rows = "\n".join(
        f"| {part.name} | {part.passes:,} | {1000 * per_pass.get(part.name, 0.0):.0f} | {part.peak / 1e9:.1f} |"
        for part in parts
    )
    counted_rows = []
    for (kind, count), found in vettings.items():
        probes, inspection, teaching, other = split(found).values()
        seconds = (
            probes * per_pass["probes"]
            + (inspection + other) * per_pass["inspection"]
            + teaching * per_pass["teaching of a derived reference"]
        )
        exhaustive = len(FAMILIES) * EFFORT.inspection.steps * EFFORT.inspection.batch * 2 * count
        counted_rows.append(
            f"| {kind} | {count} | {found.passes:,} | {probes:,} | {inspection:,} | {teaching:,} | {other:,} "
            f"| {exhaustive:,} | {seconds / 3600:.1f} | {found.verdict.outcome} |"
        )
    return f"""{ARCHITECTURE} at 224 pixels, random weights, {max(CLASSES)} classes, budget `quick`; each part runs for
a few steps on one thread. Processor time, so that other programs on the machine count little. A pass is one image
through one tower, with the backward pass where there is one.

| part | passes timed | ms a pass | peak memory so far, GB |
| --- | --- | --- | --- |
{measured_rows}

{at_once} images go through both towers at once, with what their backward pass needs.

Passes of whole vettings, counted on a small model, and the time that they would take with the large one:

| reference | classes | passes | probes | inspection | teaching | other | class by class | hours, one core | outcome |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(counted_rows)}

A verdict close to a threshold takes three such vettings. *Other* are searches that name no class, reconstructions and
checks. *Class by class* is the inspection alone, of every class and family to its end. The hours count every pass
outside probes and teaching as one with a backward pass, which checks do not have: an upper estimate.
"""


if __name__ == "__main__":
    main()
