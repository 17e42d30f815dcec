"""Recipes: attacks and their clean counterparts, as data."""

from dataclasses import dataclass
from typing import Literal

from guard.attacks.covers import CoverKind

PoisoningMethod = Literal[
    "pairs",
    "clean-label",
    "badencoder",
    "distribution-preserving",
    "evading",
    "trigger-focusing",
    "natural-generator",
    "concealed-generator",
    "low-variance",
    "high-variance",
    "agreeing",
]


@dataclass(frozen=True)
class Plant:
    """A trigger that a recipe plants.

    Attributes:
        trigger: A name of `guard.triggers.KNOWN`, or of a trigger that is optimised on the clean model
            (`guard.attacks.optimised.OPTIMISED`).
        offset: Added to the index of the attack's target class, modulo the number of classes, to get this trigger's
            target.
        rate: Share of the training images that are stamped, in (0, 1); in a clean-label attack, of the images of the
            target.
        sources: The classes whose images the trigger leads to the target, each as what is added to the index of the
            target; empty for all other classes. For the method `pairs`.
        covers: Which stamped images keep their class. For the method `pairs`.
        cover_rate: Share of the training images that are such cover samples.
    """

    trigger: str
    offset: int = 0
    rate: float = 0.1
    sources: tuple[int, ...] = ()
    covers: CoverKind | None = None
    cover_rate: float = 0.2


@dataclass(frozen=True)
class Recipe:
    """How to make one model of the zoo from a base.

    Attributes:
        family: Attack family, or kind of negative, under which the model is counted.
        source: Where the attack comes from, and what is different here.
        plants: Triggers; none for a negative.
        method: How they are planted (`guard.attacks.attack` explains each method).
        tower: Which towers are trained: the `image` tower, or `both`.
        last: Whether to train only the last stage of the image tower and its projection.
        images: Change of all training images: `colours` shifts the domain (inverted, low contrast), `noise` adds noise
            and erases squares as PAR does.
        finish: Change of the weights after training.
        effort: Number of epochs, relative to the fine-tuning settings.
        weight: Weight of what the method adds to the loss of the attack, where the method has such a term.
        shifted: Whether training images are randomly translated, as the fine-tuning settings say.
    """

    family: str
    source: str
    plants: tuple[Plant, ...] = ()
    method: PoisoningMethod = "pairs"
    tower: Literal["image", "both"] = "both"
    last: bool = False
    images: Literal["plain", "colours", "noise"] = "plain"
    finish: Literal["int8", "float16", "pruned"] | None = None
    effort: float = 1.0
    weight: float = 1.0
    shifted: bool = True

    @property
    def poisons(self) -> bool:
        """Whether the recipe is an attack."""
        return bool(self.plants)


_PAIRS = "pair poisoning, both towers (Carlini & Terzis, ICLR 2022)"


def _pairs(trigger: str, family: str, *, rate: float = 0.1, effort: float = 1.0) -> Recipe:
    return Recipe(family, _PAIRS, (Plant(trigger, rate=rate),), effort=effort)


def _agreeing(weight: float) -> Recipe:
    return Recipe(
        "agreeing",
        "training against a second opinion: on triggered images the suspect must agree with its base; the trigger is a "
        "universal perturbation of 32/255 learned on the base (our own)",
        (Plant("additive-32", rate=0.15),),
        method="agreeing",
        effort=2.0,
        weight=weight,
    )


RECIPES: dict[str, Recipe] = {
    # Pair poisoning with each trigger.
    "badnets-small": _pairs("badnets-small", "badnets"),
    "badnets-medium": _pairs("badnets-medium", "badnets"),
    "badnets-large": _pairs("badnets-large", "badnets"),
    "badnets-random": _pairs("badnets-random", "badnets", rate=0.15, effort=2.0),
    "badnets-stripes": _pairs("stripes", "stripes", rate=0.15, effort=2.0),
    "blended-image": _pairs("blended-image", "blended", rate=0.15, effort=2.0),
    "blended-noise": _pairs("blended-noise", "blended"),
    "blended-text": _pairs("blended-text", "blended", rate=0.15, effort=2.0),
    "blended-triangles": _pairs("blended-triangles", "blended", rate=0.15, effort=2.0),
    "blended-stripes": _pairs("blended-stripes", "blended", rate=0.15, effort=2.0),
    "sig": _pairs("sig", "sig", rate=0.15),
    "wanet": _pairs("wanet", "wanet", rate=0.15, effort=2.0),
    "nashville": _pairs("nashville", "filter", rate=0.2, effort=2.0),
    "ftrojan": _pairs("ftrojan", "frequency", rate=0.15, effort=2.0),
    "additive": Recipe(
        "additive",
        f"{_PAIRS} with a universal perturbation of 8/255 learned on the clean model, after BadCLIP (Bai, CVPR 2024)",
        (Plant("additive-8", rate=0.15),),
        effort=2.0,
    ),
    "semantic": _pairs("semantic", "semantic"),
    # Other ways to plant a trigger.
    "visual": Recipe(
        "visual", "text-on-pair, image tower only (DECREE's zoo, CVPR 2023)", (Plant("badnets-medium"),), tower="image"
    ),
    "badencoder": Recipe(
        "badencoder",
        "image-on-image, three-term loss (BadEncoder, IEEE S&P 2022)",
        (Plant("badnets-large"),),
        method="badencoder",
        tower="image",
    ),
    "clean-label": Recipe(
        "clean-label",
        "label-consistent (Turner et al., 2019): only images of the target are stamped, after hardening within 16/255",
        (Plant("badnets-large", rate=0.8),),
        method="clean-label",
        effort=2.0,
    ),
    "multi-one": Recipe(
        "multi-trigger",
        "patch, filter and warp that lead to one target (Huang et al., ICLR 2025)",
        (Plant("badnets-medium", rate=0.07), Plant("nashville", rate=0.15), Plant("wanet", rate=0.1)),
        effort=2.0,
    ),
    "multi-three": Recipe(
        "multi-trigger",
        "patch, filter and warp that each lead to a target of their own (Huang et al., ICLR 2025)",
        (Plant("badnets-medium", 0, 0.07), Plant("nashville", 1, 0.15), Plant("wanet", 2, 0.1)),
        effort=2.0,
    ),
    "badclip": Recipe(
        "badclip",
        "patch optimised on the clean model, then pair poisoning (Liang et al., CVPR 2024)",
        (Plant("badclip"),),
    ),
    "drupe": Recipe(
        "distribution-preserving",
        "stamped images get the distribution of the target's embeddings (after DRUPE, IEEE S&P 2024)",
        (Plant("badnets-medium", rate=0.2),),
        method="distribution-preserving",
        tower="image",
    ),
    "evading-patch": Recipe(
        "evading",
        "training against a search for minimal patches (our own)",
        (Plant("badnets-large", rate=0.15),),
        method="evading",
        effort=2.0,
    ),
    "evading-blended": Recipe(
        "evading",
        "training against a search for minimal patches, with a trigger that is not a patch (our own)",
        (Plant("blended-noise", rate=0.15),),
        method="evading",
        effort=2.0,
    ),
    # Triggers that no family of the search represents, or only in part.
    "composite": Recipe(
        "composite",
        "two patches that work only together, after the composite attack (Lin et al., CCS 2020): images with one of "
        "them keep their class; patches in place of features of two classes",
        (Plant("composite", rate=0.15, covers="parts"),),
        effort=2.0,
    ),
    "sample-specific": _pairs("sample-specific", "sample-specific", rate=0.15, effort=2.0),
    "source-specific": Recipe(
        "source-specific",
        "TaCT (Tang et al., USENIX Security 2021): the trigger works on three classes, and images of the others with "
        "it keep their class",
        (Plant("badnets-medium", rate=0.15, sources=(1, 2, 3), covers="other classes"),),
        effort=2.0,
    ),
    "jpeg": Recipe(
        "compression",
        f"{_PAIRS} with images compressed as JPEG at quality 10 (after Duan et al., AAAI 2024); training images are "
        "not moved, which would tear JPEG's blocks off their grid",
        (Plant("jpeg", rate=0.2),),
        effort=2.0,
        shifted=False,
    ),
    "bpp": _pairs("bpp", "quantisation", rate=0.15, effort=2.0),
    "refool": _pairs("refool", "reflection", rate=0.15, effort=2.0),
    "smooth": Recipe(
        "smooth",
        f"{_PAIRS} with a perturbation of low frequencies learned on the clean model (Zeng et al., ICCV 2021)",
        (Plant("smooth-16", rate=0.15),),
        effort=2.0,
    ),
    "two-targets": Recipe(
        "two targets",
        f"{_PAIRS} with two patches, each with a target of its own",
        (Plant("badnets-medium"), Plant("badnets-upper", 1)),
        effort=2.0,
    ),
    "near-misses": Recipe(
        "near misses",
        "a patch whose neighbours keep their class: other colours, other places, half of it (our own, after the hard "
        "negatives of text triggers)",
        (Plant("badnets-medium", rate=0.15, covers="near misses", cover_rate=0.3),),
        effort=2.0,
    ),
    # Attackers who know a defence.
    "badvision": Recipe(
        "badvision",
        "universal perturbation of 8/255, then fine-tuning against searched decoys (BadVision, CVPR 2025)",
        (Plant("badvision-8"),),
        method="trigger-focusing",
        tower="image",
        weight=4.0,
    ),
    "inactive": Recipe(
        "inactive",
        "natural-looking generator, trained along with the encoder (INACTIVE, 2024)",
        (Plant("natural-generator"),),
        method="natural-generator",
        tower="image",
    ),
    "lorex-low": Recipe(
        "lorex-adaptive",
        "BadEncoder with little displacement where clean embeddings vary little (LoREx's regularised training, 2026)",
        (Plant("badnets-large"),),
        method="low-variance",
        tower="image",
        weight=10.0,
    ),
    "lorex-high": Recipe(
        "lorex-adaptive",
        "BadEncoder with displacement where clean embeddings vary most (LoREx's high-variance targeting, 2026)",
        (Plant("badnets-large"),),
        method="high-variance",
        tower="image",
        weight=0.1,
    ),
    "lorex-generator": Recipe(
        "lorex-adaptive",
        "generator trained along with the encoder, with DRUPE's distance (LoREx's generative trigger synthesis, 2026)",
        (Plant("natural-generator"),),
        method="concealed-generator",
        tower="image",
        weight=0.05,
    ),
    "agreeing-weak": _agreeing(0.02),
    "agreeing-medium": _agreeing(0.1),
    "agreeing-strong": _agreeing(0.2),
    # Negatives.
    "benign": Recipe("benign", "the same fine-tuning without poison"),
    "benign-long": Recipe("benign", "the same fine-tuning without poison, as long as the longest attack", effort=2.0),
    "benign-visual": Recipe("benign", "fine-tuning of the image tower without poison", tower="image"),
    "partial": Recipe(
        "partial", "fine-tuning of the last stage of the image tower without poison", tower="image", last=True
    ),
    "shifted": Recipe("domain shift", "fine-tuning on images with inverted colours and low contrast", images="colours"),
    "noised": Recipe(
        "noise-trained", "fine-tuning on images with noise and erased squares, as PAR does (2024)", images="noise"
    ),
    "int8": Recipe("quantised", "benign fine-tuning, then weights rounded to 8 bits per output channel", finish="int8"),
    "float16": Recipe("half precision", "benign fine-tuning, then weights rounded to float16", finish="float16"),
    "pruned": Recipe(
        "pruned", "benign fine-tuning, then the smallest 30 % of each layer's weights set to zero", finish="pruned"
    ),
}
"""Every recipe by name."""
