"""The clean inputs that `guard calibrate` is given, images or texts, and the reference model that goes with them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from guard.cli.console import Console
from guard.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from guard.classifiers import Classifier, ImageFolder
    from guard.profiles import OpinionKind, Profile

_PARITY = 512
"""Inputs on which the exported reference model is compared with what it was exported from."""


class CleanInputs(Protocol):
    """What a profile is calibrated with."""

    @property
    def pixels(self) -> "Tensor | None":
        """Images for the report; None if there are none."""
        ...

    def kind_of(self, wanted: "OpinionKind | Literal['none'] | None", base: str | None) -> "OpinionKind | None":
        """The kind of reference model to use; None for none."""
        ...

    def reference_model(self, profile: "Profile", kind: "OpinionKind", base: str | None, seed: int) -> "Classifier":
        """Load or make the reference model; one that is made learns from the inputs of the banks alone."""
        ...

    def calibrate(self, profile: "Profile", alpha: float, **rules: Any) -> "Profile":  # noqa: ANN401 - handed through
        """The calibrated profile."""
        ...

    def export(self, reference: "Classifier", folder: Path) -> None:
        """Export the reference model, after a comparison on some of the inputs."""
        ...


@dataclass(frozen=True, eq=False)
class CleanImages:
    """Images."""

    classifier: "Classifier"
    pixels: "Tensor"
    names: Sequence[str]
    console: Console

    @classmethod
    def read(cls, classifier: "Classifier", folder: "ImageFolder", console: Console) -> "CleanImages":
        """Read the images of a folder."""
        names = [str(file.relative_to(folder.root)) for file in folder.files]
        return cls(classifier, classifier.read(folder, console.progress), names, console)

    def kind_of(self, wanted: "OpinionKind | Literal['none'] | None", base: str | None) -> "OpinionKind | None":
        """See `CleanInputs`."""
        from guard.classifiers.exporting import MIN_PARITY_IMAGES

        if wanted == "none":
            return None
        if wanted is None and base is None and len(self.pixels) < MIN_PARITY_IMAGES:
            self.console.say(
                f"no reference model is made: it needs at least {MIN_PARITY_IMAGES} images, there are "
                f"{len(self.pixels)}"
            )
            return None
        return wanted or ("base" if base else "student")

    def reference_model(self, profile: "Profile", kind: "OpinionKind", base: str | None, seed: int) -> "Classifier":
        """See `CleanInputs`."""
        import guard
        from guard.vetting import OPINION_REFERENCE, StudentSettings, derive_reference, teach_student

        if base is not None:
            return guard.load(base, classes=self.classifier.classes, device=str(self.classifier.device))
        images, progress = profile.bank_images(self.pixels, seed=seed), self.console.progress
        if kind == "student":
            return teach_student(self.classifier, images, StudentSettings(seed=seed), progress=progress)
        return derive_reference(self.classifier, images, replace(OPINION_REFERENCE, seed=seed), progress=progress)[0]

    def calibrate(self, profile: "Profile", alpha: float, **rules: Any) -> "Profile":  # noqa: ANN401 - handed through
        """See `CleanInputs`."""
        say = self.console.say
        return profile.calibrate(self.classifier, self.pixels, alpha, names=self.names, progress=say, **rules)

    def export(self, reference: "Classifier", folder: Path) -> None:
        """See `CleanInputs`."""
        import guard

        guard.export(reference, folder, self.pixels[:_PARITY])


@dataclass(frozen=True, eq=False)
class CleanTexts:
    """Texts."""

    classifier: "Classifier"
    texts: Sequence[str]
    console: Console
    pixels: "Tensor | None" = None

    @classmethod
    def read(cls, classifier: "Classifier", path: Path, limit: int, seed: int, console: Console) -> "CleanTexts":
        """Read the texts of a file; where there are more than the limit, some of them are drawn."""
        from guard.vetting import read_prompts

        texts = read_prompts(path)
        chosen = random.Random(seed).sample(texts, min(limit, len(texts)))  # noqa: S311 - repeatable, not secret
        return cls(classifier, chosen, console)

    def kind_of(self, wanted: "OpinionKind | Literal['none'] | None", base: str | None) -> "OpinionKind | None":
        """See `CleanInputs`."""
        if wanted == "student":
            raise UsageError("there is no student of a text tower; give --reference derived, or a trusted --base")
        return None if wanted == "none" else wanted or ("base" if base else None)

    def reference_model(self, profile: "Profile", kind: "OpinionKind", base: str | None, seed: int) -> "Classifier":
        """See `CleanInputs`."""
        import guard
        from guard.vetting.text_reference import TEXT_REFERENCE, derive_text_reference

        del kind
        if base is not None:
            return guard.load(base, classes=self.classifier.classes, device=str(self.classifier.device))
        settings, texts = replace(TEXT_REFERENCE, seed=seed), profile.bank_texts(self.texts, seed=seed)
        return derive_text_reference(self.classifier, texts, settings, progress=self.console.progress)[0]

    def calibrate(self, profile: "Profile", alpha: float, **rules: Any) -> "Profile":  # noqa: ANN401 - handed through
        """See `CleanInputs`."""
        say = self.console.say
        return profile.calibrate_texts(self.classifier, self.texts, alpha, names=self.texts, progress=say, **rules)

    def export(self, reference: "Classifier", folder: Path) -> None:
        """See `CleanInputs`."""
        from guard.classifiers import export_text

        export_text(reference, folder, self.texts[:_PARITY])
