"""Train small CLIPs on poisoned sets, as an attacker's victim does, and keep what a scan of these sets needs.

python -m benchmarks.scan.training --data DIR --out DIR [--only PATTERN]

DIR holds `cifar10/{train,test}/CLASS/*` and `tiny-imagenet/{train,val}/WNID/*`. For every set of `SETS`, `OUT/NAME`
gets `pairs.npz` (what was trained on, and which pairs are what), `embeddings.npz` (raw embeddings of all pairs),
`model/` and `record.json` (accuracy and attack success rate on test images). A set that is there is not made again.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.zoo.specs import MEAN, STD
from guard.attacks import LabelledImages, Planted, TrainingSettings, measure, poisoned, train_base
from guard.classifiers import Classifier, ClassList, ImageFolder, Preprocessing, save
from guard.classifiers.open_clip import import_open_clip
from guard.triggers import KNOWN

SIZE = 32
TEMPLATES = (
    "a photo of a {}.", "a picture of the {}.", "an image of a {}.", "a small photo of a {}.",
    "a blurry photo of a {}.",
    "one {} in the picture", "{} seen from close by", "this is a {}", "my {}", "{} for sale", "a good photo of the {}.",
    "a cropped photo of a {}.", "a bright photo of the {}.", "a dark photo of a {}.", "the {} here", "look at this {}",
)  # fmt: skip
CONFUSERS = 50
"""Pairs of each kind that are suspicious and harmless: one placeholder picture, one photograph with slight changes, and
noise. Each has a caption of a random class."""
KINDS = ("clean", "poisoned", "placeholder", "duplicate", "noise")
TARGET = 3


@dataclass(frozen=True)
class PoisonedSet:
    """A training set.

    Attributes:
        data: `cifar10` or `tiny-imagenet`.
        trigger: Name in `guard.triggers.KNOWN`; None for a set without poison.
        rate: Share of the pairs that are poisoned.
        seed: Of poisoning and training.
        tower: Image tower of the CLIP that is trained, in `TOWERS`.
        pairs: Number of pairs.
        epochs: Passes over them.
        classes: Number of classes, the first in order; None for all.
    """

    data: str
    trigger: str | None
    rate: float
    seed: int = 0
    tower: str = "vit"
    pairs: int = 15_000
    epochs: int = 8
    classes: int | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.data}-{self.trigger or 'clean'}-{100 * self.rate:g}-{self.seed}"


SETS = (
    # On these the constants of `guard.scan` were chosen.
    PoisonedSet("cifar10", "badnets-medium", 0.01, 0, "resnet", 30_000, 6),
    PoisonedSet("cifar10", "badnets-medium", 0.001, 0, "resnet", 30_000, 6),
    PoisonedSet("cifar10", None, 0.0, 0, "resnet", 30_000, 6),
    PoisonedSet("cifar10", "blended-noise", 0.01, 0, "resnet", 30_000, 6),
    PoisonedSet("cifar10", "blended-image", 0.01, 0, "resnet", 20_000, 8),
    PoisonedSet("cifar10", "sig", 0.05, 0, "resnet", 12_000, 10),
    # On these they were not.
    PoisonedSet("cifar10", "badnets-large", 0.01, 1),
    PoisonedSet("cifar10", "blended-image", 0.05, 1, "vit", 8_000),
    PoisonedSet("cifar10", "sig", 0.01, 1),
    PoisonedSet("tiny-imagenet", "badnets-large", 0.01, 1),
    PoisonedSet("cifar10", "wanet", 0.05, 1, "vit", 8_000),
    PoisonedSet("cifar10", "badnets-medium", 0.05, 1, "vit", 8_000),
    PoisonedSet("tiny-imagenet", "sig", 0.05, 1, "vit", 8_000, 8, 40),
    PoisonedSet("cifar10", None, 0.0, 1, "vit", 8_000),
    PoisonedSet("cifar10", "ftrojan", 0.05, 1, "vit", 8_000),
    PoisonedSet("cifar10", "sig", 0.001, 1, "vit", 30_000, 6),
    PoisonedSet("cifar10", "nashville", 0.05, 1, "vit", 8_000),
    PoisonedSet("tiny-imagenet", None, 0.0, 1, "vit", 8_000, 8, 40),
    PoisonedSet("tiny-imagenet", "blended-image", 0.05, 1, "vit", 8_000, 8, 40),
    PoisonedSet("cifar10", "blended-image", 0.01, 1),
    PoisonedSet("cifar10", "badnets-large", 0.001, 1, "vit", 30_000, 6),
    PoisonedSet("cifar10", "wanet", 0.01, 1),
    PoisonedSet("cifar10", "sig", 0.0001, 1, "vit", 30_000, 6),
)
TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "vit": {"image_size": SIZE, "layers": 2, "width": 96, "head_width": 32, "patch_size": 8},
}
TEXT = {
    "resnet": {"width": 64, "heads": 2, "context_length": 16},
    "vit": {"width": 32, "heads": 1, "context_length": 12},
}


def config(tower: str) -> dict[str, Any]:
    """The configuration of a small CLIP, as of `open_clip_config.json`."""
    text = {"vocab_size": 49408, "layers": 1, **TEXT[tower]}
    model = {"embed_dim": 128, "vision_cfg": TOWERS[tower], "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": {"mean": list(MEAN), "std": list(STD)}}


LEARNING_RATE = 2e-3
PAIRS = 30_000
"""Size of the largest training set."""


@lru_cache(maxsize=2)
def images(data: str, root: Path, count: int | None = None) -> tuple[ClassList, LabelledImages, LabelledImages]:
    """Classes, training and test images of a data set, at 32 px; of its first classes if a number is given."""
    folder = root / data
    parts = [ImageFolder.scan(folder / name) for name in ("train", "test" if data == "cifar10" else "val")]
    keys = parts[0].classes()[:count]
    parts = [replace(part, files=tuple(file for file in part.files if file.parent.name in keys)) for part in parts]
    parts[0] = parts[0].sample(PAIRS, seed=0)
    titles = json.loads((folder / "classes.json").read_text(encoding="utf-8")) if data == "tiny-imagenet" else {}
    names = _distinct([str(titles.get(key, key)).split(",")[0] for key in keys])
    preprocessing = Preprocessing(SIZE, MEAN, STD)
    train, test = (
        LabelledImages(torch.from_numpy(part.pixels(preprocessing)), torch.tensor(part.labels(keys))) for part in parts
    )
    return ClassList(names, TEMPLATES), train, test


def _distinct(names: list[str]) -> tuple[str, ...]:
    return tuple(f"{name} {names[:k].count(name) + 1}" if name in names[:k] else name for k, name in enumerate(names))


def planted(each: PoisonedSet) -> tuple[Planted, ...]:
    """The trigger of a set; nothing for one without poison."""
    if each.trigger is None:
        return ()
    return (Planted(KNOWN[each.trigger].draw(SIZE, each.seed), TARGET, each.rate),)


def pairs(each: PoisonedSet, root: Path) -> tuple[LabelledImages, NDArray[np.int64]]:
    """The pairs that are trained on, and the kind of each, as an index into `KINDS`."""
    classes, clean, _ = images(each.data, root, each.classes)
    if each.pairs < len(clean):
        clean = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))[: each.pairs]]
    made = poisoned(clean, planted(each), seed=each.seed)
    kinds = (made.labels != clean.labels).long()
    generator = torch.Generator().manual_seed(1000 + each.seed)
    places = torch.nonzero(kinds == 0).flatten()
    places = places[torch.randperm(len(places), generator=generator)[: 3 * CONFUSERS]].split(CONFUSERS)
    labels = torch.randint(len(classes.names), (3 * CONFUSERS,), generator=generator).split(CONFUSERS)
    for kind, (where, given) in enumerate(zip(places, labels, strict=True), 2):
        made.pixels[where] = _confusers(KINDS[kind], clean, generator)
        made.labels[where] = given
        kinds[where] = kind
    return made, kinds.numpy()


def _confusers(kind: str, clean: LabelledImages, generator: torch.Generator) -> torch.Tensor:
    shape = (CONFUSERS, 3, SIZE, SIZE)
    if kind == "placeholder":
        picture = torch.full(shape, 235, dtype=torch.uint8)
        picture[:, :, 12:20, 6:26] = 160
        return picture
    if kind == "noise":
        return torch.randint(256, shape, generator=generator).to(torch.uint8)
    original = clean.pixels[int(torch.randint(len(clean), (), generator=generator))].float().expand(shape)
    brightness = 0.9 + 0.2 * torch.rand(CONFUSERS, 1, 1, 1, generator=generator)
    return (original * brightness + 4 * torch.randn(shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def trained(each: PoisonedSet, made: LabelledImages, classes: ClassList) -> Classifier:
    """A small CLIP that was trained on a set, from scratch."""
    stated = config(each.tower)
    settings = TrainingSettings(each.epochs, learning_rate=LEARNING_RATE, seed=each.seed)
    model = train_base(stated, classes, made, settings, device=torch.device("cpu"))
    open_clip = import_open_clip()
    tokenizer = open_clip.SimpleTokenizer(context_length=stated["model_cfg"]["text_cfg"]["context_length"])
    preprocessing = Preprocessing(SIZE, MEAN, STD)
    return Classifier(
        model, stated["model_cfg"], tokenizer, preprocessing, classes, source=each.name, device=torch.device("cpu")
    )


def captions(classes: ClassList, labels: torch.Tensor, seed: int) -> list[str]:
    """One caption for each pair."""
    choice = torch.randint(len(classes.templates), (len(labels),), generator=torch.Generator().manual_seed(seed))
    return [
        classes.prompts(classes.names[int(label)])[int(k)] for label, k in zip(labels, choice.tolist(), strict=True)
    ]


@torch.no_grad()
def embeddings(classifier: Classifier, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of pairs as the towers give them, not normalised."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    image = [classifier.model.encode_image((part.float() / 255 - mean) / std) for part in pixels.split(512)]
    unique = sorted(set(texts))
    encoded = torch.cat(
        [classifier.model.encode_text(classifier.tokenizer(unique[k : k + 512])) for k in range(0, len(unique), 512)]
    )
    place = {text: row for row, text in enumerate(unique)}
    return torch.cat(image), encoded[[place[text] for text in texts]]


def make(each: PoisonedSet, root: Path, out: Path) -> None:
    """Train on one set and write what is kept of it."""
    folder = out / each.name
    if (folder / "record.json").exists():
        return
    started = time.monotonic()
    classes, _, test = images(each.data, root, each.classes)
    made, kinds = pairs(each, root)
    classifier = trained(each, made, classes)
    seconds = time.monotonic() - started
    measured = measure(classifier, test, planted(each))
    texts = captions(classes, made.labels, each.seed)
    image, text = embeddings(classifier, made.pixels, texts)
    save(folder / "model", classifier.model, config(each.tower), classes)
    np.savez(folder / "pairs.npz", pixels=made.pixels.numpy(), labels=made.labels.numpy(), kinds=kinds,
             captions=np.array(texts))  # fmt: skip
    np.savez(folder / "embeddings.npz", image=image.numpy(), text=text.numpy())
    record = {**asdict(each), "poisoned": int((kinds == 1).sum()),
              "accuracy": measured.accuracy, "success": list(measured.success), "seconds": seconds}  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Make every set that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="*", help="shell pattern of the names of sets")
    arguments = parser.parse_args()
    for each in SETS:
        if fnmatch(each.name, arguments.only):
            make(each, arguments.data, arguments.out)


if __name__ == "__main__":
    main()
