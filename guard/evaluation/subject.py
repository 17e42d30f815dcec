"""One model of a zoo that is evaluated, with everything that several methods share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers import Classifier, ClassList, load
from guard.classifiers.files import CLASSES_FILE
from guard.errors import ZooError
from guard.evaluation.images import ImageSet, Pixels, pixels
from guard.evaluation.zoo import KnownAttack, Truth, Zoo, files_digest
from guard.triggers import Trigger
from guard.vetting import Budget, Vetting, vet


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation.

    Attributes:
        budget: Search budget of vetting.
        vetting_images: Largest number of images that triggers are searched on.
        alphas: False-alarm rates that screening's thresholds are set for.
        seed: Seed for all random choices.
        device: torch device; None for a GPU if there is one.
    """

    budget: Budget = "standard"
    vetting_images: int = 1000
    alphas: tuple[float, ...] = (0.01, 0.001)
    seed: int = 0
    device: str | None = None


@dataclass(frozen=True, eq=False)
class Attack:
    """One of the attacker's triggers, and its effect on the requests.

    Attributes:
        trigger: The trigger.
        target: Class index that it leads to.
        requests: Indices of the requests that the trigger is made for: those of its source classes, by default of all
            other classes; shape [M].
        embeddings: Embeddings of these requests with the trigger, shape [M, D].
        feature: Mean of these embeddings, normalised, shape [D].
        centred: The same after subtracting the mean of these requests without the trigger, shape [D].
    """

    trigger: Trigger
    target: int
    requests: Tensor
    embeddings: Tensor
    feature: Tensor
    centred: Tensor


class Subject:
    """One model of a zoo. Everything is loaded or computed when it is first used.

    Args:
        zoo: The zoo.
        name: Name of the model.
        images: Images of the model.
        settings: Settings of the evaluation.
        searches: Folder of finished searches.
        progress: Called with (what, done, total).
    """

    def __init__(
        self,
        zoo: Zoo,
        name: str,
        images: ImageSet,
        settings: EvaluationSettings,
        *,
        searches: Path,
        progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        self.zoo, self.name, self.settings = zoo, name, settings
        self._images, self._searches, self._progress = images, searches, progress
        self._vettings: dict[bool, Vetting] = {}

    @cached_property
    def classifier(self) -> Classifier:
        """The model; without a class list of its own, as a classifier of everyday things.

        Raises:
            ModelError: The model cannot be loaded.
            ZooError: The truth belongs to another model.
        """
        classifier = _load(self.zoo.model(self.name), self.settings.device)
        if self.truth and self.truth.digest not in {None, classifier.digest.root}:
            raise ZooError(f"truth/{self.name}.json is of another model: its digest is not that of the model")
        return classifier

    @property
    def has_classes(self) -> bool:
        """Whether the model has a class list of its own."""
        return (self.zoo.model(self.name) / CLASSES_FILE).exists()

    @property
    def base(self) -> Classifier | None:
        """The trusted reference model; None if there is none."""
        name = self.zoo.models[self.name].base
        return None if name is None else _load_base(self.zoo.model(name), self.settings.device)

    @cached_property
    def truth(self) -> Truth | None:
        """The truth about the model; None if it is withheld."""
        return self.zoo.truth(self.name)

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 of the files of model, truth and base; a stored result is valid for these."""
        name = self.zoo.models[self.name].base
        base = {} if name is None else {"base": files_digest(self.zoo.model(name))}
        return {**self.zoo.fingerprint(self.name), **base}

    @property
    def pixels(self) -> Pixels:
        """The images at the resolution of the model."""
        return pixels(self._images, self.classifier.preprocessing)

    def vetting(self, *, paired: bool) -> Vetting:
        """Vet the model, with its base as the reference model or without."""
        if paired not in self._vettings:
            self._vettings[paired] = vet(
                self.classifier,
                self.pixels.vetting,
                base=self.base if paired else None,
                budget=self.settings.budget,
                seed=self.settings.seed,
                cache=self._searches,
                progress=lambda what, done, total: self._progress(f"{self.name}: {what}", done, total),
            )
        return self._vettings[paired]

    @cached_property
    def requests(self) -> Tensor:
        """Embeddings of the clean requests, shape [N, D]; ZooError without requests."""
        if self.pixels.requests is None:
            raise ZooError(f"there are no requests for {self.name}")
        return self.classifier.embed(self.pixels.requests)

    @cached_property
    def attacks(self) -> tuple[Attack, ...]:
        """The attacker's triggers on the requests; none where truth or requests are missing.

        Raises:
            ZooError: A trigger is damaged, or its target is not a class of the model.
        """
        if self.truth is None or self.pixels.requests is None:
            return ()
        return tuple(self._attack(known) for known in self.zoo.triggers(self.name, self.truth))

    def _attack(self, known: KnownAttack) -> Attack:
        count, highest = len(self.classifier.classes.names), max((known.target, *known.sources))
        if highest >= count:
            raise ZooError(f"truth/{self.name}.json names the class {highest}; the model has {count} classes")
        labels = self.classifier.predict(self.requests) if self.pixels.labels is None else self.pixels.labels
        reached = torch.isin(labels, torch.tensor(known.sources)) if known.sources else labels != known.target
        if self.pixels.requests is None or not reached.any():
            raise ZooError(
                f"no request for {self.name} is of a class that the trigger is made for; nothing can be measured"
            )
        stamped = self.classifier.embed(known.trigger.stamp(self.pixels.requests[reached]))
        mean = stamped.mean(0)
        return Attack(
            known.trigger,
            known.target,
            reached.nonzero().flatten(),
            stamped,
            normalize(mean, dim=0),
            normalize(mean - self.requests[reached].mean(0), dim=0),
        )


@lru_cache(maxsize=1)
def _load_base(path: Path, device: str | None) -> Classifier:
    """Load a base; many suspects share one, so each process keeps the last."""
    return _load(path, device)


def _load(path: Path, device: str | None) -> Classifier:
    return load(str(path), classes=None if (path / CLASSES_FILE).exists() else ClassList.everyday(), device=device)
