"""What vetting found: what a method measured, the null it is compared with, and its p-value. Imports without torch."""

from dataclasses import dataclass
from typing import Literal

ReferenceKind = Literal["base", "derived", "classes"]
"""`base`: a trusted model; `derived`: one made from the suspect; `classes`: none, only the classes are compared."""


@dataclass(frozen=True)
class ReferenceModel:
    """What a suspect was compared with, and how near it is to the suspect.

    Attributes:
        kind: Where it came from.
        digest: Root digest of a base; None for a reference model that was made on the spot, or for none.
        agreement: Share of held-out images on which it answers as the suspect does, in [0, 1]; None without a reference
            model. A reference model that hardly agrees is another model, and how it differs says little about a
            backdoor.
        passes: Images pushed through image towers to make it.
    """

    kind: ReferenceKind
    digest: str | None
    agreement: float | None
    passes: int


@dataclass(frozen=True)
class ClassStatistic:
    """What a trigger of one family and limited strength can do for one candidate class.

    Attributes:
        target: Class index.
        name: Class name.
        statistic: Mean lead of the class under its trigger, in units of the median margin of the classifier's own
            answers, less half of what it is without a trigger; against a reference model, less what the trigger brings
            it there. Larger is more suspicious.
        success: Share of images, of other classes, that the trigger moves to the class on the suspect and not on the
            reference model, in [0, 1].
        steps: Optimiser steps that were spent on it; a class that is far behind gets fewer.
        score: (statistic − mean of the other classes) / their moderated prediction error; None without a null.
        p_value: One-sided, uncorrected: how often an ordinary class would lie this far above the others.
    """

    target: int
    name: str
    statistic: float
    success: float
    steps: int
    score: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class FamilyResult:
    """One family's statistic over all candidate classes.

    Attributes:
        method: Name and version of the method.
        family: Trigger family that was searched.
        radius: Norm that the triggers were limited to.
        norm_unit: Unit of the radius.
        statistic: What is compared, in words.
        null: What it is compared with, in words.
        reference_model: What the suspect was compared with.
        classes: One entry per candidate class.
        target: The class with the smallest p-value; None where no class has one.
        p_value: Its p-value, corrected for the number of classes (Bonferroni); 1 where no class has one.
        seed: Reproduces the search.
        passes: Images pushed through image towers, the reference model's included.
        seconds: Wall-clock time.
    """

    method: str
    family: str
    radius: float
    norm_unit: str
    statistic: str
    null: str
    reference_model: ReferenceKind
    classes: tuple[ClassStatistic, ...]
    target: int | None
    p_value: float
    seed: int
    passes: int
    seconds: float


@dataclass(frozen=True)
class Check:
    """A reconstruction of the smallest trigger for a class that stands out, tried on held-out images.

    Attributes:
        family: Of the trigger.
        target: Class index.
        name: Class name.
        norm: Of the trigger, in the family's unit.
        radius: Norm that inspection limited triggers of the family to.
        norm_unit: Unit of both.
        reached: Whether the success rate was reached while the norm was being minimised.
        success: Share of held-out images, of other classes, that it moves to the class, in [0, 1].
        reference_success: The same on the reference model; None without one.
        reference_model: What the suspect was compared with.
    """

    family: str
    target: int
    name: str
    norm: float
    radius: float
    norm_unit: str
    reached: bool
    success: float
    reference_success: float | None
    reference_model: ReferenceKind

    @property
    def strength(self) -> float:
        """The norm relative to the radius: how much of a trigger it takes."""
        return self.norm / self.radius
