"""What a profile says, as records: the contents of `profile.json`, and the banks beside it. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.classifiers.classes import ClassList
from guard.classifiers.preprocessing import Preprocessing
from guard.screening import Axis, AxisReference, Banks, Scores, Tail, Threshold
from guard.vetting.results import Check, FamilyResult, ReferenceModel, Verdict
from guard.vetting.text_results import TextVetting

SCHEMA = 5

TriggerTensors = Mapping[str, Mapping[str, Floats]]
"""Trigger id → tensor name → values."""


@dataclass(frozen=True)
class ModelRecord:
    """The classifier that a profile belongs to.

    Attributes:
        source: Where the classifier was loaded from, as the user gave it.
        digest: Root digest of the classifier.
        parts: Digest of each part of the classifier, so that a mismatch can name what differs.
        classes: Class names and prompt templates.
        preprocessing: How an image becomes the input of the image tower.
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
    """A text whose embedding lies near the target feature of a trigger.

    Attributes:
        text: A class name, or a text of the vocabulary.
        cosine: Cosine between the target feature and the embedding of the text, in [-1, 1].
    """

    text: str
    cosine: float


@dataclass(frozen=True)
class TriggerRecord:
    """A reconstructed trigger; its tensors are in `triggers.safetensors`.

    Attributes:
        id: Name of the trigger in metrics and replies.
        family: Kind of transformation (`guard.triggers.FAMILIES`).
        target: Index of the class that the trigger leads to.
        norm: Norm of the trigger, in `norm_unit`.
        norm_unit: Unit of the norm.
        success: Attack success rate on images that were not used to find the trigger, in [0, 1].
        p_value: p-value of the target class, combined over families and corrected for the number of classes.
        nearest: The texts nearest to the target feature, nearest first.
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
        verdict: The conclusion about the classifier.
        results: One result for each trigger family.
        checks: The smallest triggers found for the classes that stand out, tried on held-out images.
        effort: Settings of the searches, with their seeds.
        images: Number of images that were searched on, and number that were held out for the check.
        reference_model: The model that the classifier was compared with.
        device: The torch device that the examination ran on.
        seconds: Wall-clock time of the examination, in seconds.
        passes: Number of images that went through image towers.
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
    """An image that was given for calibration and not used, because it seems to carry a trigger.

    Attributes:
        image: Name of the image, or its number where it has no name.
        part: `bank` for an image that was to fill the banks, `calibration` for one that was to set the threshold.
        trigger: Id of the trigger that the image seems to carry.
    """

    image: str
    part: Literal["bank", "calibration"]
    trigger: str


InputKind = Literal["images", "texts"]
"""What requests carry that a profile screens."""
TEXT_TRIGGER = "text-1"
"""Id of the trigger that an examination of a text tower found."""
OpinionKind = Literal["base", "derived", "student"]
"""Where the reference model of a profile comes from: a trusted base model, the suspect's own tower that was disturbed
and taught again, or a smaller tower that was taught the suspect's embeddings."""


@dataclass(frozen=True)
class SecondOpinionRecord:
    """The reference model whose answers requests are compared with.

    Attributes:
        kind: Where it comes from.
        source: Where a base model was loaded from, or how the model was made.
        digest: Root digest of the reference model as a classifier.
        embedding: Length of its embeddings.
        scale: Factor between cosine and logit of the suspect.
        near: Surprise of the other scores above which a request is near the threshold (`guard.screening.Banks`).
        agreement: Share of the clean images that set the threshold to which both models give the same answer. The less
            they agree, the less a disagreement says.
    """

    kind: OpinionKind
    source: str
    digest: str
    embedding: int
    scale: float
    near: float
    agreement: float


@dataclass(frozen=True)
class CalibrationRecord:
    """How requests are compared, and how the threshold was set.

    Attributes:
        k: The neighbour that distances are taken to.
        tails: For each score the tail of its distribution over the images of the bank.
        shrinkage: Shrinkage of the covariance that embeddings are whitened with.
        threshold: The threshold on all requests, its alpha, and the number of scores that it was set from.
        per_class: Whether classes with enough images have a threshold of their own.
        reference: Number of embeddings in the reference bank, and in each stamped bank.
        held_out: Number of images that were kept out of banks and threshold.
        false_alarms: Number of held-out images that are flagged.
        left_out: Images that seem to carry a trigger.
        seed: Seed for the random split of the images.
        second_opinion: The reference model that requests are compared with; None without a second opinion.
        inputs: What the banks and the threshold are of: images, or texts.
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
    second_opinion: SecondOpinionRecord | None = None
    inputs: InputKind = "images"


@dataclass(frozen=True)
class AxisRecord:
    """An axis of the traffic that a person confirmed (`guard.screening.Axis`); `axis.safetensors` has its direction.

    Attributes:
        name: Name of the axis in metrics, evidence and replies.
        target: Index of the class that requests along it are predicted as.
        observed: Number of requests that the monitor had seen when it raised the alarm.
        after: Number of requests that came since the cluster began, as estimated; at least 1.
        share: Share of these that lay along the axis.
        bound: The largest share that clean images explained.
        within: Share of the unusual requests that led to the target.
        adopted: Time at which it was adopted: RFC 3339, UTC.
    """

    name: str
    target: int
    observed: int
    after: int
    share: float
    bound: float
    within: float
    adopted: str


@dataclass(frozen=True)
class Document:
    """The contents of `profile.json`.

    Attributes:
        schema: Version of the document's form.
        guard: Version of guard that wrote the document.
        created: Time of creation: RFC 3339, UTC.
        model: The classifier that the profile belongs to.
        vetting: How the classifier was examined, and with what result.
        triggers: The reconstructed triggers.
        calibration: How the detector was calibrated; None before calibration.
        files: SHA-256 of each other file of the profile but the report.
        axes: The axes of the traffic that were adopted.
        text: How the text tower was examined, and with what result; None where it was not.
    """

    schema: int
    guard: str
    created: str
    model: ModelRecord
    vetting: VettingRecord
    triggers: tuple[TriggerRecord, ...]
    calibration: CalibrationRecord | None
    files: Mapping[str, str]
    axes: tuple[AxisRecord, ...] = ()
    text: TextVetting | None = None

    @property
    def inputs(self) -> InputKind:
        """What requests carry that the profile screens."""
        return "images" if self.calibration is None else self.calibration.inputs

    def left_out(self) -> NDArray[np.int64]:
        """For each input that was to set the threshold and seems to carry a trigger, the class that this leads to.

        Nearly all of them are predicted as that class; a profile does not keep what they were predicted as.
        """
        if self.calibration is None:
            return np.empty(0, np.int64)
        targets = {record.id: record.target for record in self.compared(self.calibration.inputs)}
        dropped = [item.trigger for item in self.calibration.left_out if item.part == "calibration"]
        return np.array([targets.get(name, -1) for name in dropped], np.int64)

    def compared(self, inputs: InputKind) -> tuple[TriggerRecord, ...]:
        """The triggers that requests with inputs of a kind are compared with.

        For texts it is the one that was found in the text tower, unless there is no evidence for it.
        """
        if inputs == "images":
            return self.triggers
        if self.text is None or self.text.verdict.outcome == "no evidence":
            return ()
        found = self.text.trigger
        return (
            TriggerRecord(
                TEXT_TRIGGER,
                found.kind,
                found.target,
                float(max(1, len(found.vectors))),
                "letter" if found.replaced else "word" if found.inserted else "tokens",
                found.success,
                self.text.verdict.p_value,
                tuple(NearestText(near.text, near.cosine) for near in found.captions),
            ),
        )


@dataclass(frozen=True, eq=False)
class Reference:
    """What requests are compared with: the contents of `reference.safetensors`.

    Attributes:
        banks: Embeddings of clean images, without a trigger and with each trigger.
        clean: Scores of clean images that are in no bank.
        axis: What the traffic is compared with to find an axis (in `axis.safetensors`); None in a profile that an older
            guard calibrated.
        axes: The adopted axes.
    """

    banks: Banks
    clean: Scores
    axis: AxisReference | None = None
    axes: tuple[Axis, ...] = ()
