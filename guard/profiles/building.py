"""From a vetting to the contents of a profile, and from stored tensors back to triggers. Needs torch."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import torch

from guard import __version__
from guard.classifiers.classifier import Classifier
from guard.errors import ProfileError
from guard.profiles.document import SCHEMA, Document, ModelRecord, TriggerRecord, TriggerTensors, VettingRecord
from guard.profiles.vocabulary import nearest
from guard.triggers import FAMILIES, Trigger
from guard.vetting.results import Vetting


def build(classifier: Classifier, vetting: Vetting, vocabulary: Sequence[str]) -> tuple[Document, TriggerTensors]:
    """Document and trigger tensors of a classifier that was vetted (`Profile.build`)."""
    model = ModelRecord(
        classifier.source,
        classifier.digest.root,
        classifier.digest.parts,
        classifier.classes,
        classifier.preprocessing,
        classifier.head.shape[-1],
    )
    record = VettingRecord(
        vetting.verdict,
        vetting.results,
        vetting.checks,
        asdict(vetting.effort),
        vetting.images,
        vetting.reference_model,
        vetting.device,
        vetting.seconds,
        vetting.passes,
    )
    named = nearest(classifier, [found.feature for found in vetting.triggers], vocabulary)
    triggers = tuple(
        TriggerRecord(
            found.id,
            found.trigger.family,
            found.target,
            found.norm,
            found.trigger.norm_unit,
            found.success,
            found.p_value,
            near,
        )
        for found, near in zip(vetting.triggers, named, strict=True)
    )
    created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    tensors = {
        found.id: {name: tensor.float().numpy() for name, tensor in found.trigger.tensors().items()}
        for found in vetting.triggers
    }
    return Document(SCHEMA, __version__, created, model, record, triggers, None, {}), tensors


def load_triggers(document: Document, stored: TriggerTensors) -> dict[str, Trigger]:
    """The reconstructed triggers as transformations, by id (`Profile.load_triggers`)."""
    triggers: dict[str, Trigger] = {}
    for record in document.triggers:
        if record.family not in FAMILIES:
            raise ProfileError(
                f"the trigger {record.id!r} is of the family {record.family!r}, which this guard does not know; "
                "use the newer guard that wrote the profile"
            )
        tensors = {name: torch.from_numpy(values.copy()) for name, values in stored[record.id].items()}
        try:
            triggers[record.id] = FAMILIES[record.family].from_tensors(tensors)
        except ValueError as error:
            raise ProfileError(
                f"the profile is damaged: {record.id!r} is not a {record.family} trigger: {error}"
            ) from error
    return triggers
