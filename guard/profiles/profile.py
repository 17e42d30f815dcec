"""A profile: what vetting found out about one classifier, and what calibration added, in memory and on disk.

Opening, using and recalibrating a profile works without torch. Building one from a vetting, calibrating it with images
and loading its triggers need torch, which is imported there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.classifiers.digest import ClassifierDigest
from guard.errors import ProfileError
from guard.profiles import storage
from guard.profiles.calibrating import Calibrated, ImageSamples, Rules, TextSamples, calibrate, threshold
from guard.profiles.document import AxisRecord, Document, OpinionKind, Reference, TriggerTensors
from guard.screening import (
    AXIS,
    Axis,
    AxisScores,
    Detector,
    Screen,
    SearchMethod,
    calibration,
)

if TYPE_CHECKING:
    from torch import Tensor

    from guard.classifiers import Classifier, ExportedClassifier
    from guard.triggers import Trigger
    from guard.vetting import TextVetting, Vetting

_SAME = 0.9
"""Cosine from which two axes with one target are the same."""


@dataclass(frozen=True, eq=False)
class Profile:
    """What is known about one classifier: how it was vetted, its reconstructed triggers, its banks and threshold.

    A profile never changes: `calibrate` returns another one.

    Attributes:
        document: The contents of `profile.json`.
        triggers: Tensors of the reconstructed triggers: trigger id → tensor name → values.
        reference: Banks and calibration scores; None before calibration.
        reference_model: Folder of the exported reference model that gives second opinions; None if the profile has
            none. `save` copies it into the profile.
    """

    document: Document
    triggers: TriggerTensors
    reference: Reference | None = None
    reference_model: Path | None = None

    @classmethod
    def build(
        cls,
        classifier: "Classifier",
        vetting: "Vetting | None",
        *,
        text: "TextVetting | None" = None,
        vocabulary: Sequence[str] = (),
    ) -> "Profile":
        """Make the profile of a classifier that was vetted; it is not calibrated yet.

        Args:
            classifier: The classifier that was vetted.
            vetting: What `guard.vet` returned for this classifier; None if only its text tower was examined.
            text: What `guard.vet_text` returned for it; None if its text tower was not examined.
            vocabulary: Texts, besides the class names, that may name what a trigger leads to.
        """
        from guard.profiles.building import build

        return cls(*build(classifier, vetting, vocabulary, text))

    @classmethod
    def open(cls, directory: Path | str) -> "Profile":
        """Read a profile from disk and check all of it.

        Raises:
            ProfileError: A file is missing or damaged, tensors are missing, of a wrong shape or not finite, or the
                profile was written by a newer guard.
        """
        return cls(*storage.read(Path(directory)))

    def save(self, directory: Path | str, *, report: str | None = None) -> None:
        """Write the profile; an older one in its place is replaced as a whole, or kept if anything fails.

        Args:
            directory: Folder to write.
            report: Text of `report.html` (`guard.report.render`); None to write no report.

        Raises:
            UsageError: Something other than a profile lies in the directory.
            ModelError: The reference model is missing or damaged.
        """
        storage.write(Path(directory), self.document, self.triggers, self.reference, self.reference_model, report)

    def calibrate(
        self,
        classifier: "Classifier",
        images: "Tensor",
        alpha: float,
        *,
        k: int | None = None,
        per_class: bool = False,
        names: Sequence[str] | None = None,
        groups: NDArray[np.int64] | None = None,
        reference: "Classifier | None" = None,
        kind: OpinionKind = "base",
        seed: int = 0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> "Profile":
        """Build the reference bank and the stamped banks, and set the threshold.

        The images are split at random: 40 % fill the banks, 40 % set the threshold, and on the last 20 % false alarms
        are counted. The images must be clean, of the kind that the deployment will see, and not ones that the model was
        trained on: a model knows its training images better, and the threshold would be too low.

        Images that seem to carry a reconstructed trigger are left out of banks and threshold, and listed
        (`guard.screening.hygiene`). They may be clean and only look so, and therefore count as clean images above all
        others (`guard.screening.conformal.counted_above`). Where alpha or more of the images that set the threshold are
        left out, the rate of false alarms may exceed alpha by their share.

        Args:
            classifier: The classifier of this profile; it computes the embeddings.
            images: uint8, shape [N, 3, H, W], at the classifier's resolution (`Classifier.read`).
            alpha: False-alarm rate that the operator accepts, in (0, 1).
            k: The neighbour that distances are taken to; default is `guard.screening.default_k`.
            per_class: Whether alpha must apply to each predicted class that has enough images.
            names: Names of the images, by which those that are left out are listed; default is their number.
            groups: int64, shape [N]: images of one group, such as the frames of one film, stay on one side of the
                split, and only one of them, drawn at random, sets the threshold. A near-duplicate in the bank makes an
                image look more ordinary than any request will, and near-duplicates behind the threshold say less than
                their number: both would set the threshold too low. Default: each image is a group of its own.
            reference: A reference model for second opinions, with the same classes and input size; None for no second
                opinion. If it was taught on images given here, on none but those of `bank_images`. Export it and give
                the export to `with_reference_model`, so that a sidecar can use it.
            kind: Where the reference model comes from.
            seed: Seed for the random split.
            progress: Called with a short description of each step.

        Returns:
            The calibrated profile; an earlier calibration is replaced.

        Raises:
            ProfileError: The profile belongs to another classifier.
            ImageError: There are too few images for banks of k.
            UsageError: There are too few images for this alpha, or the reference model is the classifier itself, or has
                other classes or another input size.
        """
        self.check_model(classifier.digest)
        if reference is not None:
            classifier.check_comparable(reference)
        targets = {record.id: record.target for record in self.document.triggers}
        found = calibrate(
            ImageSamples(classifier, images, self.load_triggers(), targets),
            classifier,
            Rules(alpha, per_class, seed),
            k=k,
            names=names,
            groups=groups,
            reference=reference,
            kind=kind,
            say=progress,
        )
        return self._calibrated(found)

    def calibrate_texts(
        self,
        classifier: "Classifier",
        texts: Sequence[str],
        alpha: float,
        *,
        k: int | None = None,
        per_class: bool = False,
        names: Sequence[str] | None = None,
        reference: "Classifier | None" = None,
        kind: OpinionKind = "base",
        seed: int = 0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> "Profile":
        """The same for requests that carry texts: the text tower embeds them, and clean texts fill the banks.

        If `guard.vet_text` found a trigger that any evidence speaks for, its bank is filled with the same texts with
        that trigger. A profile screens inputs of one kind, so that this replaces a calibration with images.

        Args:
            classifier: The classifier of this profile; its text tower computes the embeddings.
            texts: Clean texts like those of requests, each different; none of them may have been trained on.
            alpha: As for `calibrate`.
            k: As for `calibrate`.
            per_class: As for `calibrate`; a text counts as of the class whose embedding is nearest.
            names: Names of the texts, by which those that are left out are listed; default is their number.
            reference: A reference model for second opinions, with the same classes and tokenizer; None for none.
            kind: Where the reference model comes from.
            seed: Seed for the random split.
            progress: Called with a short description of each step.

        Raises:
            ProfileError: The profile belongs to another classifier.
            ModelError: The text tower is of a kind that guard cannot open.
            ImageError: There are too few texts for banks of k.
            UsageError: There are too few texts for this alpha, or the reference model is the classifier itself, or has
                other classes or another tokenizer.
        """
        self.check_model(classifier.digest)
        if reference is not None:
            from guard.vetting.text_examination import check_text_comparable

            classifier.check_comparable(reference)
            check_text_comparable(classifier, reference)
        found = calibrate(
            TextSamples(classifier, texts, self.document, seed),
            classifier,
            Rules(alpha, per_class, seed),
            k=k,
            names=names,
            groups=None,
            reference=reference,
            kind=kind,
            say=progress,
        )
        return self._calibrated(found)

    @staticmethod
    def bank_images(images: "Tensor", *, groups: NDArray[np.int64] | None = None, seed: int = 0) -> "Tensor":
        """The images that `calibrate` fills the banks with, on which a reference model may be taught.

        Whatever is learned from them, the threshold is set on others, so that the false-alarm rate holds.

        Args:
            images: As for `calibrate`.
            groups: As for `calibrate`.
            seed: As for `calibrate`.
        """
        return images[calibration.split(np.arange(len(images)) if groups is None else groups, seed).banks]

    @staticmethod
    def bank_texts(texts: Sequence[str], *, seed: int = 0) -> list[str]:
        """The texts that `calibrate_texts` fills the banks with, for the same purpose.

        Args:
            texts: As for `calibrate_texts`.
            seed: As for `calibrate_texts`.
        """
        return [texts[row] for row in calibration.split(np.arange(len(texts)), seed).banks]

    def with_reference_model(self, directory: Path | str) -> "Profile":
        """The same profile with the exported reference model that it was calibrated with.

        Args:
            directory: What `guard.export` wrote for the reference model. It must exist until the profile is saved.

        Raises:
            ProfileError: The profile was calibrated without a reference model, or with another one.
            ModelError: The export is missing or damaged.
        """
        storage.check_reference_model(self.document, Path(directory))
        return replace(self, reference_model=Path(directory))

    def recalibrate(self, embeddings: Floats, alpha: float, *, per_class: bool = False, seed: int = 0) -> "Profile":
        """Set the threshold anew from embeddings of clean requests, such as recorded traffic.

        The banks stay as they are, because stamping needs pixels. Two thirds of the embeddings set the threshold, on
        the others false alarms are counted.

        Args:
            embeddings: float32, shape [N, D], as the model computed them, of clean requests.
            alpha: False-alarm rate, in (0, 1).
            per_class: Whether alpha must apply to each predicted class that has enough embeddings.
            seed: Seed for the random split.

        Returns:
            The profile with another threshold.

        Raises:
            ProfileError: The profile was never calibrated with images.
            RequestError: The embeddings were not computed by this model.
            UsageError: There are too few embeddings for this alpha.
        """
        if self.reference is None or self.document.calibration is None:
            raise ProfileError(
                "the profile has no banks yet; calibrate it with images once, embeddings only replace the threshold"
            )
        if self.document.calibration.second_opinion is not None:
            raise ProfileError(
                "the profile compares requests with a reference model, about which embeddings say nothing; give images "
                "like those of requests"
            )
        found = threshold(
            self.reference.banks,
            self.reference.axis,
            embeddings,
            calibration.split_without_banks(len(embeddings), seed),
            Rules(alpha, per_class, seed),
            names=[str(row) for row in range(len(embeddings))],
            left_out=tuple(item for item in self.document.calibration.left_out if item.part == "bank"),
            kind=self.document.calibration.inputs,
        )
        return self._calibrated(found)

    def adopt(self, axes: Sequence[Axis]) -> "Profile":
        """Make axes of the traffic scores of the profile, as reconstructed triggers are, and set the threshold anew.

        A person must have looked at the requests that formed them. An axis that the profile has already, with the same
        target and nearly the same direction, is not adopted again. The counted false alarms stay those of the last
        calibration.

        Args:
            axes: Axes that a monitor found for this model.

        Returns:
            The profile with more axes; later calibrations keep them.

        Raises:
            ProfileError: The profile was not calibrated, or by a guard that knew no axes.
        """
        reference, calibrated = self.reference, self.document.calibration
        if reference is None or calibrated is None or reference.axis is None:
            raise ProfileError("the profile has nothing to compare an axis with; calibrate it with images once")
        records, kept = list(self.document.axes), list(reference.axes)
        for axis in axes:
            if any(known.target == axis.target and float(known.offset @ axis.offset) > _SAME for known in kept):
                continue
            name = f"{AXIS}-{len(kept) + 1}"
            kept.append(replace(axis, name=name))
            figures = (axis.target, axis.observed, axis.after, axis.share, axis.bound, axis.within)
            records.append(AxisRecord(name, *figures, datetime.now(UTC).isoformat(timespec="seconds")))
        found = replace(
            self,
            document=replace(self.document, axes=tuple(records)),
            reference=replace(reference, axes=tuple(kept)),
        )
        record = replace(calibrated, threshold=found.detector().threshold)
        return replace(found, document=replace(found.document, calibration=record))

    def _calibrated(self, found: Calibrated) -> "Profile":
        """The profile with another calibration; its axes stay, as long as it screens inputs of the same kind."""
        before = self.document.calibration
        same = before is None or before.inputs == found.record.inputs
        axes = self.reference.axes if self.reference and same else ()
        document = replace(self.document, calibration=found.record, axes=self.document.axes if axes else ())
        reference = replace(found.reference, axes=axes if found.reference.axis is not None else ())
        calibrated = replace(self, document=document, reference=reference, reference_model=None)
        if not reference.axes:
            return calibrated
        detector = calibrated.detector()
        flags = detector.score(found.held_out, found.answers).flags
        record = replace(found.record, threshold=detector.threshold, false_alarms=int(flags.sum()))
        return replace(calibrated, document=replace(document, calibration=record))

    def load_triggers(self) -> "dict[str, Trigger]":
        """The reconstructed triggers as transformations of images, by id.

        Raises:
            ProfileError: A trigger is of a family that this guard does not know, or its tensors do not make a trigger
                of that family.
        """
        from guard.profiles.building import load_triggers

        return load_triggers(self.document, self.triggers)

    def load_reference_model(
        self, *, threads: int = 0, loaded: "ExportedClassifier | None" = None
    ) -> "ExportedClassifier":
        """The reference model, ready to run.

        Args:
            threads: Threads that one forward pass uses, see `guard.classifiers.ExportedClassifier`.
            loaded: A model that is loaded already: it is returned if it is the one in the profile, by its manifest.

        Raises:
            ProfileError: The profile has no reference model, or another one lies in its place.
            ModelError: A file of the reference model is missing or damaged.
        """
        if self.reference_model is None:
            raise ProfileError("the profile has no reference model; run guard calibrate with --images on it")
        return storage.load_reference_model(self.document, self.reference_model, threads=threads, loaded=loaded)

    def check_model(self, digest: ClassifierDigest) -> None:
        """Make sure that the profile belongs to this classifier.

        Raises:
            ProfileError: The profile belongs to another classifier; the message names the parts that differ.
        """
        if digest.root != self.document.model.digest:
            parts = digest.differences(ClassifierDigest(self.document.model.parts))
            raise ProfileError(
                f"the profile is of another model ({self.document.model.source}): {', '.join(parts)} differ; "
                "vet this model, or give the one that was vetted"
            )

    def detector(
        self, method: SearchMethod = "exact", alpha: float | None = None, *, near_only: bool = False
    ) -> Detector:
        """The detector that decides about requests.

        Args:
            method: How nearest neighbours are searched: `exact` or `approximate`.
            alpha: False-alarm rate, in (0, 1); None for that of the calibration.
            near_only: Whether only requests that other scores put near the threshold get a second opinion
                (`guard.screening.Detector`).

        Raises:
            ProfileError: The profile was not calibrated.
            UsageError: The calibration had too few images for alpha.
            MissingDependencyError: The method needs a library that is not installed.
        """
        if self.reference is None or self.document.calibration is None:
            raise ProfileError("the profile has no reference bank yet; run guard calibrate on it")
        record = self.document.calibration
        screen = Screen(self.reference.banks, method=method)
        rate = record.threshold.alpha if alpha is None else alpha
        axes, axis = self.reference.axes, self.reference.axis
        return Detector(
            screen,
            self.reference.clean,
            rate,
            per_class=record.per_class,
            near_only=near_only,
            axes=AxisScores(axes, axis) if axes and axis is not None else None,
            left_out=self.document.left_out(),
        )

    def class_name(self, index: int) -> str:
        """Name of the class with this index."""
        return self.document.model.classes.names[index]
