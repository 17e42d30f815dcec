"""How much work vetting does. Imports without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

Budget = Literal["quick", "standard", "thorough"]
"""Names of the budgets."""


@dataclass(frozen=True)
class InspectionSettings:
    """How much work an inspection does (`guard.vetting.inspection`).

    Many steps of few images find more than few steps of many, at the same number of passes: on a fine-tuned
    EfficientNet-Lite0 a white square of 10 × 10 of 32 × 32 pixels leads by 2.4 after 128 steps of 8 images, and by
    −0.55 after 32 of 32 (`benchmarks/results/steps-and-batches-pretrained-60.md`).

    Attributes:
        steps: Optimiser steps per class and family.
        batch: Images in each step, shared by all classes.
        learning_rate: Learning rate of Adam on the unconstrained parameters; its betas are (0.5, 0.9).
        average: Number of last batches over which the lead is averaged.
        seed: Seed for the start of the search and for the batches.
    """

    steps: int = 128
    batch: int = 8
    learning_rate: float = 0.4
    average: int = 16
    seed: int = 0


@dataclass(frozen=True)
class TargetSearchSettings:
    """How much work the search that names no class does (`guard.vetting.search`).

    Attributes:
        steps: Optimiser steps of each start.
        batch: Images in each step.
        starts: Starts in each family, one after the other.
        learning_rate: Learning rate of Adam on the unconstrained parameters; its betas are (0.5, 0.9).
        seed: Seed for the first start and its batches; the next starts count up from it.
    """

    steps: int = 64
    batch: int = 8
    starts: int = 2
    learning_rate: float = 0.4
    seed: int = 0


@dataclass(frozen=True)
class SearchSettings:
    """How much work the search for the smallest trigger does (`guard.vetting.inversion`).

    The weight of the norm in the loss follows success, as in Neural Cleanse (S&P 2019): after `patience` steps in a
    row in which a class reaches `success` on its batch the weight is multiplied by `factor`, and after as many failures
    it is divided by it. With a fixed weight, or with too few steps, every class is reached by a trigger of about the
    same size, and no class is singled out.

    Attributes:
        steps: Largest number of optimiser steps per class.
        batch: Images in each step, shared by all classes.
        learning_rate: Learning rate of Adam on the unconstrained parameters; its betas are (0.5, 0.9).
        success: Share of the eligible images of a batch that must go to the target.
        patience: Number of successes or failures in a row after which the weight of the norm changes.
        factor: Factor by which the weight changes.
        weight: Initial weight of the norm: loss, in units of `Lead.distance`, per unit of norm relative to the norm at
            the start.
        stall: Number of steps without an improvement of the smallest norm by 1 %, in spite of several successes, after
            which a class is finished.
        margin: How clearly the target must win before an image stops contributing to the loss, in units of
            `Lead.distance`: 1 is as clearly as the classifier's own answers win.
        seed: Seed for the start of the search and for the batches.
    """

    steps: int = 200
    batch: int = 48
    learning_rate: float = 0.4
    success: float = 0.9
    patience: int = 2
    factor: float = 1.5
    weight: float = 0.2
    stall: int = 60
    margin: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class DerivedReferenceSettings:
    """How a derived reference is made (`guard.vetting.reference`).

    Attributes:
        noise: Standard deviation of the noise that is added to each weight matrix, relative to that of the matrix.
        steps: Optimiser steps of the recovery.
        batch: Images in each step.
        learning_rate: Learning rate of AdamW; it falls linearly over the second half of the steps.
        seed: Seed for the noise and for the batches.
    """

    noise: float = 0.5
    steps: int = 200
    batch: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Effort:
    """How much work goes into each part of a vetting.

    Attributes:
        inspection: Inspection of all classes and families.
        reconstruction: Reconstruction of triggers for the classes that stand out.
        derived_reference: Construction of a reference model where there is no base model.
        target_search: Search for candidates among many classes.
    """

    inspection: InspectionSettings
    reconstruction: SearchSettings
    derived_reference: DerivedReferenceSettings = field(default_factory=DerivedReferenceSettings)
    target_search: TargetSearchSettings = field(default_factory=TargetSearchSettings)

    def seeded(self, seed: int) -> "Effort":
        """Return the same effort with another seed."""
        return Effort(
            replace(self.inspection, seed=seed),
            replace(self.reconstruction, seed=seed),
            replace(self.derived_reference, seed=seed),
            replace(self.target_search, seed=seed),
        )


BUDGETS: dict[Budget, Effort] = {
    "quick": Effort(InspectionSettings(steps=64), SearchSettings(steps=100, batch=32, stall=30)),
    "standard": Effort(InspectionSettings(), SearchSettings(steps=160, batch=48, stall=50)),
    "thorough": Effort(
        InspectionSettings(steps=256, batch=16),
        SearchSettings(steps=400, batch=96, stall=100),
        target_search=TargetSearchSettings(steps=128, starts=4),
    ),
}
"""The effort behind each budget that `guard vet --budget` accepts."""


def name_of(used: Mapping[str, Mapping[str, float]]) -> Budget | None:
    """The budget with these settings, whatever their seeds; None if there is none.

    Args:
        used: The settings of each part of an `Effort`, by name.
    """

    def plain(parts: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        return {part: {key: value for key, value in each.items() if key != "seed"} for part, each in parts.items()}

    return next((name for name, effort in BUDGETS.items() if plain(asdict(effort)) == plain(used)), None)
