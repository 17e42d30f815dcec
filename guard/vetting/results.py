"""What vetting finds: measurements with their null and p-value, reconstructed triggers, and the verdict.

Imports without torch, so that those who only read results need not load it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from guard.vetting.budgets import Effort

if TYPE_CHECKING:
    from torch import Tensor

    from guard.triggers import InvertibleTrigger

Conclusion = Literal["backdoored", "no evidence", "inconclusive"]
"""What a verdict can conclude about a model; never that it is clean."""
PROBES = "probes"
"""Stands for a trigger family in the results of probes (`guard.vetting.probes`), which are not searched for."""
ReferenceKind = Literal["base", "towers", "derived", "classes"]
"""`base`: a trusted model. `towers`: the towers of a trusted model, with prompts that were tuned anew on the answers of
a prompt learner. `derived`: a model that was made from the suspect. `classes`: there is no reference model, and only
the classes are compared with each other."""


BEYOND: Mapping[ReferenceKind, str] = MappingProxyType(
    {
        "base": ", beyond what it does on the base model",
        "towers": ", beyond what it does with prompts that were tuned anew",
        "derived": ", beyond what it does on the derived reference",
        "classes": "",
    }
)
"""What descriptions of a statistic add, by the kind of the reference model."""


NOISE_LIKE = 0.85
"""Median singular value of a difference of weights, relative to that of noise of the same size, from which it counts as
noise. Independent noise has 1, and of 85 models of the zoo `small` of seed 90, attacked or not, none has more than
0.67."""
NOTABLE = 0.02
"""Size of a difference, relative to the base's weights, below which it is no subject: rounding to 8 bits makes one of
about 0.01, which looks like noise too."""


@dataclass(frozen=True)
class Difference:
    """How the weight matrices of two image towers differ (`guard.vetting.difference`).

    Attributes:
        size: Norm of the difference relative to that of the base's weights, over all matrices; at least 0.
        flatness: Median singular value of a matrix's difference, with rows and columns of one length, relative to what
            independent noise of the same size would have, averaged over the matrices with the weight of their squared
            norms; about 1 for noise. 0 where nothing differs.
    """

    size: float
    flatness: float

    @property
    def is_noise(self) -> bool:
        """Whether the difference is notable and looks like independent noise."""
        return self.size >= NOTABLE and self.flatness >= NOISE_LIKE

    @property
    def looks(self) -> str:
        """What it looks like, in words that follow "the weights differ by …,"."""
        return "as if by noise" if self.is_noise else "not as if by noise"


@dataclass(frozen=True)
class ReferenceModel:
    """The model that a suspect was compared with, and how similar the two are.

    Attributes:
        kind: Where the reference model came from.
        digest: Root digest of a base model; None for a derived reference, or without a reference model.
        agreement: Share of held-out images on which it gives the same answer as the suspect, in [0, 1]; None without a
            reference model. Where the two hardly agree they are simply two different models, and their differences
            say little about a backdoor.
        passes: Number of images pushed through image towers to make the reference model and to measure the agreement.
        difference: How the image tower's weights differ from those of a base model; None without a base, or where it
            is of another architecture.
    """

    kind: ReferenceKind
    digest: str | None
    agreement: float | None
    passes: int
    difference: Difference | None = None


@dataclass(frozen=True)
class ClassStatistic:
    """What a trigger of one family and of limited strength, or a probe, can do for one candidate class.

    Attributes:
        target: Class index.
        name: Class name.
        statistic: Mean lead of the class under its trigger, in units of the median margin of the classifier's own
            answers, less half of its lead without a trigger; with a reference model, less what the trigger achieves on
            that model. Larger is more suspicious. 0 without a score and a p-value where hardly any image was of another
            class, so that nothing was measured. Under probes, the log-odds of the largest gain
            (`guard.vetting.probes`).
        success: Share of images of other classes that the trigger moves to the class on the suspect and not on the
            reference model, in [0, 1]. Under probes, the largest gain, at least 0.
        steps: Optimiser steps that were spent on the class; a class that is far behind gets fewer.
        score: (statistic − mean of the other classes) / their moderated prediction error; None without a null.
        p_value: One-sided, uncorrected p-value: how often an ordinary class would lie this far above the others.
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
    """The statistics of one trigger family over all candidate classes.

    Attributes:
        method: Name and version of the method.
        family: Trigger family that was searched.
        radius: Largest norm that a trigger was allowed.
        norm_unit: Unit of the radius.
        statistic: Description of the statistic.
        null: Description of the null that it is compared with.
        reference_model: Kind of the model that the suspect was compared with.
        classes: One entry per candidate class.
        target: Index of the class with the smallest p-value; None where no class has one.
        p_value: Its p-value, corrected for the number of classes (Bonferroni); 1 where no class has one.
        seed: Seed that reproduces the search.
        passes: Number of images pushed through image towers, including that of the reference model.
        seconds: Wall-clock time.
        corrected_for: Number of classes that p-values are corrected for, which may be more than were compared; None, as
            in results of guard 0.2, for those that have a p-value.
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
    corrected_for: int | None = None


def leading(classes: Sequence[ClassStatistic], count: int) -> tuple[int | None, float]:
    """Return the class with the smallest p-value, and that p-value, corrected for a number of classes (Bonferroni).

    Returns:
        None and 1 where no class has a p-value.
    """
    found = [(entry.p_value, entry.target) for entry in classes if entry.p_value is not None]
    if not found:
        return None, 1.0
    p_value, target = min(found)
    return target, min(1.0, p_value * count)


SOME_COUNT = 2.0
"""How many times stronger a trigger counts that was searched for the images of some classes only. With a base such
patches need 0.73 radii or more on 12 clean models of the zoo `small` of seed 110, for two classes each, and 0.13 to
0.32 on three models with a source-specific attack (TaCT), of seeds 90, 100 and 110; without a base, 0.23 and 0.30 on
one of these for the attacker's class, and 0.45 or more for others."""


@dataclass(frozen=True)
class Check:
    """The smallest trigger that was found for a class that stands out, measured on held-out images.

    Attributes:
        family: Family of the trigger.
        target: Class index.
        name: Class name.
        norm: Norm of the trigger, in the family's unit.
        radius: Largest norm that the inspection allowed triggers of the family.
        norm_unit: Unit of both.
        reached: Whether the required success rate was reached while the norm was being minimised.
        success: Share of held-out images of other classes that the trigger moves to the class, in [0, 1].
        reference_success: The same share on the reference model; None without one.
        reference_model: Kind of the model that the suspect was compared with.
        probe: Name of the probe, where one was tried instead of a trigger that was searched for; it has no norm, and
            `norm` and `radius` are 1.
        sources: Names of the classes whose images the trigger was searched for and measured on, where it need not work
            on others; empty for all classes.
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
    probe: str | None = None
    sources: tuple[str, ...] = ()

    @property
    def strength(self) -> float:
        """How large a trigger the class needs: the norm relative to the radius.

        A trigger for the images of some classes counts `SOME_COUNT` times: fewer images are easier to move.
        """
        return self.norm / self.norm_of(1.0)

    def norm_of(self, strength: float) -> float:
        """Return the norm with which a trigger of this kind has a strength, in the unit of the norm."""
        return strength * self.radius / (SOME_COUNT if self.sources else 1.0)


@dataclass(frozen=True)
class Verdict:
    """What vetting concludes about a model.

    Attributes:
        outcome: `backdoored`, `no evidence` (for the families tested, and only those), or `inconclusive`.
        target: Index of the class that the backdoor leads to; None unless `backdoored`.
        p_value: The smallest corrected p-value.
        families: Trigger families that were tested.
        significance: Largest p-value that counts as evidence.
        reasons: Sentences for people, the most important first.
    """

    outcome: Conclusion
    target: int | None
    p_value: float
    families: tuple[str, ...]
    significance: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class ReconstructedTrigger:
    """A reconstructed trigger for a class that stands out, strengthened for screening.

    Attributes:
        id: Name of the trigger in profiles, metrics and replies: family and class index.
        target: Index of the class that it leads to.
        trigger: The transformation.
        norm: Its norm, in the family's unit; larger than the minimal norm of the check.
        success: Share of held-out images of other classes that it moves to the class, in [0, 1]; of those for which it
            was searched.
        p_value: p-value of the class, combined over families and corrected for the number of classes.
        feature: The target feature: mean embedding of the held-out images under the trigger, of length 1; shape [D].
    """

    id: str
    target: int
    trigger: "InvertibleTrigger"
    norm: float
    success: float
    p_value: float
    feature: "Tensor"


@dataclass(frozen=True, eq=False)
class FoundTarget:
    """What one start of the search that names no class ended at (`guard.vetting.search`).

    Attributes:
        family: Family of the trigger.
        target: The class that gains most under it beyond the reference model; None where there is none to compare.
        gain: Its gain, as that of a probe (`guard.vetting.probes`), in [−1, 1].
        concentration: Mean pairwise cosine of the last batch's embeddings on the suspect, less that on the reference
            model.
        feature: The mean embedding under the trigger, of length 1; shape [D].
        passes: Number of images pushed through image towers.
    """

    family: str
    target: int | None
    gain: float
    concentration: float
    feature: "Tensor"
    passes: int


@dataclass(frozen=True)
class Vetting:
    """The result of examining one classifier.

    Attributes:
        verdict: The conclusion.
        results: One entry per trigger family.
        checks: The smallest triggers of the classes that stand out, measured on held-out images.
        triggers: Triggers that passed their check, strongest evidence first.
        effort: How much work was done.
        images: Number of images that were searched on, and number of images that were held out for the checks.
        reference_model: The model that the classifier was compared with.
        device: Device on which it ran.
        seconds: Wall-clock time.
        passes: Number of images pushed through image towers, including that of the reference model.
        unnamed: What the search that names no class ended at, start by start; none where all classes were inspected.
    """

    verdict: Verdict
    results: tuple[FamilyResult, ...]
    checks: tuple[Check, ...]
    triggers: tuple[ReconstructedTrigger, ...]
    effort: Effort
    images: tuple[int, int]
    reference_model: ReferenceModel
    device: str
    seconds: float
    passes: int
    unnamed: tuple[FoundTarget, ...] = ()
