"""How each method of a recipe trains: the objective that it gives to the training loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from guard.attacks.adaptive import Evading, SecondOpinionEvading, Spectral, TriggerFocusing
from guard.attacks.generators import ConcealedGenerator, NaturalGenerator
from guard.attacks.objectives import BadEncoder, DistributionPreserving
from guard.attacks.planted import Planted
from guard.attacks.recipes import PoisoningMethod, Recipe
from guard.attacks.training import LabelledImages, Objective
from guard.classifiers.classifier import Classifier

_REFERENCES = 8


@dataclass(frozen=True)
class Setup:
    """What an objective is made from.

    Attributes:
        base: The clean classifier.
        recipe: The recipe.
        images: The attacker's images.
        planted: The trigger; a method with an objective of its own plants one.
        seed: Seed for all random choices.
    """

    base: Classifier
    recipe: Recipe
    images: LabelledImages
    planted: Planted
    seed: int

    @property
    def genuine(self) -> Tensor:
        """Images of the target class: uint8, shape [N, 3, H, W]."""
        return self.images.pixels[self.images.labels == self.planted.target]

    @property
    def references(self) -> Tensor:
        """A few of them: float, shape [R, 3, H, W], values in [0, 1]."""
        return self.genuine[:_REFERENCES].float() / 255


OBJECTIVES: Mapping[PoisoningMethod, Callable[[Setup], Objective]] = {
    "badencoder": lambda s: BadEncoder(s.base, s.references, s.planted.trigger),
    "distribution-preserving": lambda s: DistributionPreserving(
        s.planted.trigger, s.planted.target, s.genuine, share=s.planted.rate, seed=s.seed
    ),
    "evading": lambda s: Evading(
        s.planted.trigger,
        s.planted.target,
        s.base.image_shape[1],
        share=s.planted.rate,
        device=s.base.device,
        seed=s.seed,
    ),
    "trigger-focusing": lambda s: TriggerFocusing(
        s.base, s.references, s.planted.trigger, weight=s.recipe.weight, seed=s.seed
    ),
    "natural-generator": lambda s: NaturalGenerator(s.base, s.references, s.planted.trigger),
    "concealed-generator": lambda s: ConcealedGenerator(
        s.base, s.references, s.planted.trigger, weight=s.recipe.weight, seed=s.seed
    ),
    "low-variance": lambda s: Spectral(
        s.base, s.references, s.planted.trigger, s.images.pixels, variance="low", weight=s.recipe.weight
    ),
    "high-variance": lambda s: Spectral(
        s.base, s.references, s.planted.trigger, s.images.pixels, variance="high", weight=s.recipe.weight
    ),
    "agreeing": lambda s: SecondOpinionEvading(
        s.base, s.planted.trigger, s.planted.target, share=s.planted.rate, weight=s.recipe.weight
    ),
}
"""The methods with an objective of their own; `pairs` and `clean-label` change the training images instead."""
