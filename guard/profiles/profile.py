"""The profile: what vetting learned about one classifier, in the form that a sidecar reads. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from guard._types import Floats
from guard.classifiers.classes import ClassList
from guard.classifiers.digest import ClassifierDigest
from guard.classifiers.preprocessing import Preprocessing
from guard.errors import ProfileError
from guard.screening import Banks, Detector, Scores, Screen, SearchMethod, Tail, Threshold
from guard.vetting.results import Check, FamilyResult, ReferenceModel
from guard.vetting.verdict import Verdict

SCHEMA = 4


@dataclass(frozen=True)
class ModelRecord:
    """Which classifier a profile is of.

    Attributes:
        source: Where it was loaded from, as the user gave it.
        digest: Root digest.
        parts: Digest of each part, so that a mismatch can name what differs.
        classes: Class names and templates.
        preprocessing: From an image to the tower's input.
        embedding: Length of an embedding.
    """

    source: str
    digest: str
    parts: Mapping[str, str]
    classes: ClassList
    preprocessing: Preprocessing
    embedding: int


@dataclass(frozen=True)
class NearestText:
    """A text that lies near a target feature.

    Attributes:
        text: A class name, or a word of the vocabulary.
        cosine: Between the feature and the text's embedding, in [-1, 1].
    """

    text: str
    cosine: float


@dataclass(frozen=True)
class TriggerRecord:
    """A reconstructed trigger; its tensors lie in `triggers.safetensors`.

    Attributes:
        id: Names it in metrics and replies.
        family: Which transformation it is.
        target: Class index that it leads to.
        norm: Its norm.
        norm_unit: Unit of the norm.
        success: Success on images that were not used to find it, in [0, 1].
        p_value: Of its class: combined over families, corrected for classes.
        nearest: The texts nearest to its target feature, nearest first.
    """

    id: str
    family: str
    target: int
    norm: float
    norm_unit: str
    success: float
    p_value: float
    nearest: tuple[NearestText, ...]


@dataclass(frozen=True)
class VettingRecord:
    """How a classifier was examined, and with what result.

    Attributes:
        verdict: The result.
        evidence: One entry per trigger family.
        checks: The smallest triggers of the classes that stand out, tried on held-out images.
        effort: How hard was searched; the seeds are among it.
        images: Number of images used to search, and kept out for the check.
        reference_model: What the classifier was compared with.
        device: Where it ran.
        seconds: Wall-clock time.
        passes: Images pushed through image towers.
    """

    verdict: Verdict
    results: tuple[FamilyResult, ...]
    checks: tuple[Check, ...]
    effort: Mapping[str, Mapping[str, float]]
    images: tuple[int, int]
    reference_model: ReferenceModel
    device: str
    seconds: float
    passes: int


@dataclass(frozen=True)
class LeftOut:
    """A clean image that was given for calibration, and not used.

    Attributes:
        image: Its name, or its number where it has none.
        part: Whether it was meant for the banks or for the threshold.
        trigger: Id of the trigger that it seems to carry.
    """

    image: str
    part: Literal["bank", "calibration"]
    trigger: str


@dataclass(frozen=True)
class CalibrationRecord:
    """How requests are compared, and how the threshold was set.

    Attributes:
        k: Neighbour that distances are taken to.
        tails: For each score its tail over the bank's own images.
        shrinkage: Of the whitening.
        threshold: The threshold on the whole, its alpha, and the number of scores behind it.
        per_class: Whether classes with enough images have a threshold of their own.
        reference: Number of embeddings in the reference bank, and in each stamped bank.
        held_out: Number of images kept out of banks and threshold.
        false_alarms: How many of these are flagged.
        left_out: Images that seem to carry a trigger.
        seed: Of the split.
    """

    k: int
    tails: Mapping[str, Tail]
    shrinkage: float
    threshold: Threshold
    per_class: bool
    reference: int
    held_out: int
    false_alarms: int
    left_out: tuple[LeftOut, ...]
    seed: int


@dataclass(frozen=True)
class Document:
    """`profile.json`.

    Attributes:
        schema: Version of this form.
        guard: Version of guard that wrote it.
        created: RFC 3339 time, UTC.
        model: Which classifier it is of.
        vetting: How that was examined, and with what result.
        triggers: What stood out.
        calibration: Set by calibration; None before.
        files: SHA-256 of the tensor files beside it.
    """

    schema: int
    guard: str
    created: str
    model: ModelRecord
    vetting: VettingRecord
    triggers: tuple[TriggerRecord, ...]
    calibration: CalibrationRecord | None
    files: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Reference:
    """What the sidecar compares requests with: `reference.safetensors`.

    Attributes:
        banks: Embeddings of clean images, without and with each trigger.
        clean: Scores of clean images that are in no bank.
    """

    banks: Banks
    clean: Scores


@dataclass(frozen=True, eq=False)
class Profile:
    """A whole profile in memory.

    Attributes:
        document: `profile.json`.
        triggers: Trigger id → tensor name → values: `triggers.safetensors`.
        reference: Banks and calibration scores; None before calibration.
    """

    document: Document
    triggers: Mapping[str, Mapping[str, Floats]]
    reference: Reference | None = None

    def check_model(self, digest: ClassifierDigest) -> None:
        """Make sure that the profile is of this classifier.

        Raises:
            ProfileError: It is of another; the message names the parts that differ.
        """
        if digest.root != self.document.model.digest:
            parts = digest.differences(ClassifierDigest(self.document.model.parts))
            raise ProfileError(
                f"the profile is of another model ({self.document.model.source}): {', '.join(parts)} differ; "
                "vet this model, or give the one that was vetted"
            )

    def detector(self, method: SearchMethod = "exact", alpha: float | None = None) -> Detector:
        """What decides about requests.

        Args:
            method: How neighbours are found.
            alpha: False-alarm rate, in (0, 1); None for that of the calibration.

        Raises:
            ProfileError: The profile was not calibrated.
            UsageError: The calibration had too few images for alpha.
            MissingDependencyError: The method needs a library that is not installed.
        """
        if self.reference is None or self.document.calibration is None:
            raise ProfileError("the profile has no reference bank yet; run guard calibrate on it")
        calibration = self.document.calibration
        screen = Screen(self.reference.banks, method=method)
        rate = calibration.threshold.alpha if alpha is None else alpha
        return Detector(screen, self.reference.clean, rate, per_class=calibration.per_class)

    def class_name(self, index: int) -> str:
        """Name of a class."""
        return self.document.model.classes.names[index]
