"""From a vetting to the contents of a profile, and from stored tensors back to triggers. Needs torch."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import torch

from guard import __version__
from guard.classifiers.classifier import Classifier
from guard.errors import ProfileError, UsageError
from guard.profiles.document import SCHEMA, Document, ModelRecord, TriggerRecord, TriggerTensors, VettingRecord
from guard.profiles.vocabulary import nearest
from guard.triggers import FAMILIES, Trigger
from guard.vetting.results import Vetting
from guard.vetting.text_results import TextVetting
from guard.vetting.text_verdict import with_text


def build(
    classifier: Classifier, vetting: Vetting | None, vocabulary: Sequence[str], text: TextVetting | None
) -> tuple[Document, TriggerTensors]:
    """Document and trigger tensors of a classifier that was vetted (`Profile.build`)."""
    model = ModelRecord(
        classifier.source,
        classifier.digest.root,
        classifier.digest.parts,
        classifier.classes,
        classifier.preprocessing,
        classifier.head.shape[-1],
    )
    record = _text_alone(text) if vetting is None else _record(vetting, text)
    found_triggers = () if vetting is None else vetting.triggers
    named = nearest(classifier, [found.feature for found in found_triggers], vocabulary)
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
        for found, near in zip(found_triggers, named, strict=True)
    )
    created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    tensors = {
        found.id: {name: tensor.float().numpy() for name, tensor in found.trigger.tensors().items()}
        for found in found_triggers
    }
    return Document(SCHEMA, __version__, created, model, record, triggers, None, {}, text=text), tensors


def _record(vetting: Vetting, text: TextVetting | None) -> VettingRecord:
    """What is stored of an examination of the image tower, with the verdict about both towers if both were examined."""
    return VettingRecord(
        vetting.verdict if text is None else with_text(vetting.verdict, text.verdict),
        vetting.results,
        vetting.checks,
        asdict(vetting.effort),
        vetting.images,
        vetting.reference_model,
        vetting.device,
        vetting.seconds,
        vetting.passes,
    )


def _text_alone(text: TextVetting | None) -> VettingRecord:
    """What is stored where only the text tower was examined."""
    if text is None:
        raise UsageError("a profile needs the examination of at least one tower")
    effort = {"text_search": asdict(text.settings)}
    return VettingRecord(
        text.verdict, (), (), effort, (0, 0), text.reference_model, text.device, text.seconds, passes=0
    )


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
