"""Calibrate a profile with clean inputs, of images or of texts. torch is needed where inputs are embedded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.profiles.document import (
    CalibrationRecord,
    Document,
    InputKind,
    LeftOut,
    OpinionKind,
    Reference,
    SecondOpinionRecord,
)
from guard.screening import AxisReference, Banks, ReferenceAnswers, calibration, default_k

if TYPE_CHECKING:
    from torch import Tensor

    from guard.classifiers import Classifier
    from guard.triggers import Trigger

Say = Callable[[str], None]


class Samples(Protocol):
    """Clean inputs, and what towers compute for them."""

    @property
    def kind(self) -> InputKind:
        """What they are."""
        ...

    def __len__(self) -> int: ...

    def embed(self) -> Floats:
        """The embeddings of all, shape [N, D], L2-normalised."""
        ...

    def stamped(self, rows: NDArray[np.int64], say: Say) -> dict[str, tuple[int, Floats]]:
        """For each trigger the class that it leads to, and the embeddings of some of them with it."""
        ...

    def ask(self, reference: "Classifier") -> ReferenceAnswers:
        """What a reference model answers to all."""
        ...


@dataclass(frozen=True, eq=False)
class ImageSamples:
    """Images.

    Attributes:
        classifier: The classifier of the profile.
        images: uint8, shape [N, 3, H, W].
        triggers: The triggers of the profile, by id.
        targets: The class that each leads to.
    """

    classifier: "Classifier"
    images: "Tensor"
    triggers: "dict[str, Trigger]"
    targets: dict[str, int]
    kind: InputKind = "images"

    def __len__(self) -> int:
        return len(self.images)

    def embed(self) -> Floats:
        """See `Samples`."""
        found: Floats = self.classifier.embed(self.images).numpy()
        return found

    def stamped(self, rows: NDArray[np.int64], say: Say) -> dict[str, tuple[int, Floats]]:
        """See `Samples`."""
        found = {}
        for name, trigger in self.triggers.items():
            say(f"embedding {len(rows)} images with the trigger {name}")
            found[name] = self.targets[name], self.classifier.embed(trigger.stamp(self.images[rows])).numpy()
        return found

    def ask(self, reference: "Classifier") -> ReferenceAnswers:
        """See `Samples`."""
        return ask(reference, self.images)


@dataclass(frozen=True, eq=False)
class TextSamples:
    """Texts.

    Attributes:
        classifier: The classifier of the profile.
        texts: The texts.
        document: The contents of `profile.json`.
        seed: Seed for where in a text the tokens of a trigger go.
    """

    classifier: "Classifier"
    texts: Sequence[str]
    document: Document
    seed: int
    kind: InputKind = "texts"

    def __len__(self) -> int:
        return len(self.texts)

    def embed(self) -> Floats:
        """See `Samples`."""
        return _encode(self.classifier, self.texts)

    def stamped(self, rows: NDArray[np.int64], say: Say) -> dict[str, tuple[int, Floats]]:
        """See `Samples`."""
        from guard.classifiers import TextTower
        from guard.vetting import stamped_texts

        found = {}
        for record in self.document.compared("texts"):
            if self.document.text is None:
                raise AssertionError("only a text tower that was examined has a trigger")
            say(f"embedding {len(rows)} texts with the trigger {record.id}")
            some, tower = [self.texts[row] for row in rows], TextTower(self.classifier)
            embeddings = stamped_texts(tower, self.document.text.trigger, some, seed=self.seed)
            found[record.id] = record.target, embeddings.cpu().numpy()
        return found

    def ask(self, reference: "Classifier") -> ReferenceAnswers:
        """See `Samples`."""
        embeddings = _encode(reference, self.texts)
        return ReferenceAnswers(embeddings, _logits(reference, embeddings))


def _encode(classifier: "Classifier", texts: Sequence[str]) -> Floats:
    from guard.classifiers import TextTower

    found: Floats = TextTower(classifier).encode(texts).cpu().numpy()
    return found


def ask(reference: "Classifier", images: "Tensor") -> ReferenceAnswers:
    """What a reference model answers to images: uint8, shape [N, 3, H, W], at its resolution."""
    embeddings: Floats = reference.embed(images).numpy()
    return ReferenceAnswers(embeddings, _logits(reference, embeddings))


def _logits(reference: "Classifier", embeddings: Floats) -> Floats:
    import torch

    found: Floats = reference.logits(torch.from_numpy(embeddings).to(reference.device)).float().cpu().numpy()
    return found


@dataclass(frozen=True)
class Rules:
    """How a threshold is set.

    Attributes:
        alpha: False-alarm rate, in (0, 1).
        per_class: Whether it must apply to each predicted class that has enough inputs.
        seed: Seed for the random split.
    """

    alpha: float
    per_class: bool
    seed: int


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What a calibration adds to a profile.

    Attributes:
        record: A part of its document.
        reference: The banks, without the axes of the profile.
        held_out: Embeddings of the inputs on which false alarms are counted.
        answers: What the reference model answers to these; None without one.
    """

    record: CalibrationRecord
    reference: Reference
    held_out: Floats
    answers: ReferenceAnswers | None


def calibrate(
    samples: Samples,
    classifier: "Classifier",
    rules: Rules,
    *,
    k: int | None,
    names: Sequence[str] | None,
    groups: NDArray[np.int64] | None,
    reference: "Classifier | None",
    kind: OpinionKind,
    say: Say,
) -> Calibrated:
    """Build the reference bank and the stamped banks, and set the threshold (`Profile.calibrate`)."""
    parts = calibration.split(np.arange(len(samples)) if groups is None else groups, rules.seed)
    bank = parts.banks
    if k is None:
        k = default_k(len(bank), len(classifier.classes.names))
    calibration.check_bank_size(len(bank), k)
    say(f"embedding {len(samples)} {samples.kind}")
    embeddings = samples.embed()
    stamped = samples.stamped(bank, say)
    answers = None
    if reference is not None:
        say(f"asking the reference model about {len(samples)} {samples.kind}")
        answers = samples.ask(reference)
    head = np.ascontiguousarray(classifier.head.float().cpu().numpy().T)
    own, scale = None if answers is None else answers[bank], classifier.logit_scale
    banks, carrying = calibration.fit_banks(embeddings[bank], stamped, head, k=k, answers=own, scale=scale)
    called = [str(row) for row in range(len(samples))] if names is None else names
    left_out = tuple(LeftOut(called[bank[row]], "bank", trigger) for row, trigger in carrying.items())
    opinion = None
    if reference is not None and banks.near is not None:
        opinion = SecondOpinionRecord(
            kind, reference.source, reference.digest.root, reference.head.shape[-1], scale, banks.near, 0.0
        )
    kept = np.array([row not in carrying for row in range(len(bank))])
    axis = AxisReference.fit(embeddings[bank][kept], embeddings[:0], head)
    return threshold(
        banks, axis, embeddings, parts, rules, names=called, left_out=left_out, kind=samples.kind,
        answers=answers, opinion=opinion,
    )  # fmt: skip


def threshold(
    banks: Banks,
    axis: AxisReference | None,
    embeddings: Floats,
    parts: calibration.Split,
    rules: Rules,
    *,
    names: Sequence[str],
    left_out: tuple[LeftOut, ...],
    kind: InputKind,
    answers: ReferenceAnswers | None = None,
    opinion: SecondOpinionRecord | None = None,
) -> Calibrated:
    """Set a threshold for banks from embeddings of clean inputs, without the axes of a profile."""
    found = calibration.calibrate(
        banks,
        embeddings[parts.threshold],
        embeddings[parts.held_out],
        rules.alpha,
        per_class=rules.per_class,
        answers=None if answers is None else (answers[parts.threshold], answers[parts.held_out]),
    )
    if opinion is not None and found.agreement is not None:
        opinion = replace(opinion, agreement=found.agreement)
    more = tuple(
        LeftOut(names[parts.threshold[row]], "calibration", trigger) for row, trigger in found.left_out.items()
    )
    record = CalibrationRecord(
        banks.k,
        banks.tails,
        banks.whitening.shrinkage,
        found.threshold,
        rules.per_class,
        len(banks.reference),
        found.held_out,
        found.false_alarms,
        left_out + more,
        rules.seed,
        opinion,
        kind,
    )
    if axis is not None:
        behind = np.array([row not in found.left_out for row in range(len(parts.threshold))])
        axis = axis.with_clean(embeddings[parts.threshold][behind], banks.head)
    held_out = parts.held_out
    return Calibrated(
        record,
        Reference(banks, found.clean, axis),
        embeddings[held_out],
        None if answers is None else answers[held_out],
    )
