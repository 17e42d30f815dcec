"""What is done with decisions besides answering: second looks, stream monitor, evidence log, sample of the traffic."""

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guard._types import Floats
from guard.classifiers import ExportedClassifier, Tokenizer
from guard.errors import EmbeddingsError, GuardError, ProfileError, StateError
from guard.evidence import Record, thumbnail
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.screening import (
    MIN_AXIS,
    Alarm,
    Axis,
    AxisAlarm,
    AxisMonitor,
    AxisScores,
    Detector,
    Judgement,
    Monitor,
    Scores,
    axis_state,
    matched,
)
from guard.screening.monitor import write_state
from guard.screening.second_look import SecondLook, SecondLookResult
from guard.screening.text_look import TextLook
from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.inputs import Values
from guard.sidecar.decisions.reservoir import Reservoir, about_file, store
from guard.sidecar.decisions.state import set_aside
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import Decision
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.metrics import ModelMetrics
from guard.triggers import StoredTrigger

log = logging.getLogger(__name__)

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class _Tag(NamedTuple):
    """By what an image that formed an axis is known again.

    Attributes:
        request_id: Id of the request, as the client gave it, or "".
        trace_id: Id of the trace that the request belongs to, or "".
        image: Number of the image in the request.
        time: When it was decided about.
        p_value: Its p-value.
    """

    request_id: str
    trace_id: str
    image: int
    time: datetime
    p_value: float


@dataclass(frozen=True, eq=False)
class Shared:
    """What the models of a sidecar share.

    Attributes:
        settings: Settings of the sidecar.
        workers: The threads that decode, embed and screen.
        evidence: Records flagged images.
        process: The number of this process if there are several; None if it is the only one.
        read_only: Whether the state is only checked, so that what is damaged raises an error and stays where it is.
    """

    settings: Settings
    workers: Workers
    evidence: Recorder
    process: int | None = None
    read_only: bool = False

    def close(self) -> None:
        """Write the records that wait."""
        if not self.evidence.close():
            log.warning("some records could not be written to the evidence log")

    def state_file(self, stem: str, suffix: str) -> Path | None:
        """A file of this process alone in the folder for state; None if the settings name no folder."""
        folder, own = self.settings.state_dir, "" if self.process is None else f".{self.process}"
        return None if folder is None else folder / f"{stem}{own}{suffix}"


class Watch:
    """Everything that guard does with a decision besides answering; safe to use from several threads.

    Args:
        profile: Profile of the model.
        detector: Detector of the profile.
        model: The exported classifier; None if embeddings come from the upstream server, so that there are no second
            looks.
        settings: Settings of the model.
        metrics: Metrics of the model.
        shared: What the models of a sidecar share.
        sample: The sample of the model's traffic, if one is kept.
        asks: Whether requests get second opinions.
        tokenizer: What reads the texts of the model; None if its requests carry images, or guard reads none.

    Attributes:
        sample: As given.

    Raises:
        StateError: The state of the monitor is damaged, or of other settings; only if the state is only checked.
        ProfileError: A trigger of the profile cannot be used.
    """

    def __init__(
        self,
        profile: Profile,
        detector: Detector,
        model: ExportedClassifier | None,
        settings: ModelSettings,
        metrics: ModelMetrics,
        shared: Shared,
        sample: Reservoir | None,
        *,
        asks: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._profile, self._model, self._asks, self._tokenizer = profile, model, asks, tokenizer
        self._base = self._detector = detector
        self._settings, self._metrics, self._shared = settings, metrics, shared
        compared = profile.document.compared(profile.document.inputs)
        self._targets = {record.id: profile.class_name(record.target) for record in compared}
        self._targets |= {axis.name: profile.class_name(axis.target) for axis in profile.document.axes}
        self._lock = threading.Lock()
        streams = detector.streams()
        # Each process sees a share of the images; together they must raise no more false alarms than one process would.
        run_length = shared.settings.run_length * shared.settings.processes
        self._monitor = Monitor(streams, run_length=run_length) if streams else None
        self._axes = self._make_axis_monitor(run_length)
        self.sample = sample
        self._look = self._make_second_look() if settings.second_looks and model is not None else None
        self._state_file = shared.state_file(f"monitor-{self._calibration_id()}", ".json")
        self._axis_file = shared.state_file(f"axis-{self._calibration_id()}", ".safetensors")
        self._sample_file = shared.state_file(f"traffic-{settings.label}", ".npy")
        self._continue_monitor()
        self._continue_axes()
        self._continue_sample()

    def _make_axis_monitor(self, run_length: float) -> AxisMonitor | None:
        """What looks for axes of the traffic; None if the profile has too few images to compare it with."""
        reference = self._profile.reference
        if reference is None or reference.axis is None or len(reference.axis.clean) < MIN_AXIS:
            return None
        return AxisMonitor(reference.axis, known=reference.axes, run_length=run_length)

    def _continue_axes(self) -> None:
        """Go on from the stored state of the axes, if there is one; what cannot be used is moved aside."""
        if self._axes is None or self._axis_file is None or not os.path.lexists(self._axis_file):
            return
        try:
            axis_state.restore(self._axes, self._axis_file)
        except StateError as error:
            if self._shared.read_only:
                raise
            set_aside(self._axis_file, "monitor", error, self._metrics.state_damaged)
        self._use_axes()
        self._metrics.alarms(self._active(), ())

    def _use_axes(self) -> None:
        """Flag single requests along the axes that were found, besides those of the profile."""
        if self._axes is None or not self._axes.axes:
            return
        axes = (*self._axes.known, *self._axes.axes)
        self._targets = {**self._targets, **{axis.name: self._profile.class_name(axis.target) for axis in axes}}
        self._detector = self._base.along(AxisScores(axes, self._axes.reference))

    @property
    def detector(self) -> Detector:
        """The detector that decides now: that of the profile, with the axes that the traffic has shown."""
        return self._detector

    def _active(self) -> tuple[Alarm, ...]:
        """The active alarms: those of the monitor, and one for each axis that was found."""
        active = () if self._monitor is None else self._monitor.active
        return active if self._axes is None else (*active, *map(_alarm_of, self._axes.axes))

    def _continue_monitor(self) -> None:
        """Go on from the stored state of the monitor, if there is one; what cannot be used is moved aside."""
        if self._monitor is None or self._state_file is None or not os.path.lexists(self._state_file):
            return
        try:
            self._monitor.load(self._state_file)
        except StateError as error:
            if self._shared.read_only:
                raise
            set_aside(self._state_file, "monitor", error, self._metrics.state_damaged)
        self._metrics.alarms(self._active(), ())

    def _continue_sample(self) -> None:
        """Go on with the stored sample, if this one is empty and there is one; what cannot be used is moved aside."""
        path = self._sample_file
        if self.sample is None or self.sample.seen or path is None or not os.path.lexists(path):
            return
        try:
            self.sample.restore(path, self._profile.document.model.digest)
        except (StateError, EmbeddingsError) as error:
            if os.path.lexists(about := about_file(path)):
                set_aside(about, "sample", error, lambda _: None)
            set_aside(path, "sample", error, self._metrics.state_damaged)

    def _calibration_id(self) -> str:
        """Names the file with the monitor's state: p-values of another calibration or model cannot be continued."""
        parts = (self._settings.label, *sorted(self._profile.document.files.values()))
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def _make_second_look(self) -> Callable[[Values, str], SecondLookResult]:
        """What takes a second look at an input, given the trigger that it matches, or ""."""
        document, model = self._profile.document, self._model
        if model is None:
            raise ValueError("a second look needs a model")
        if self._tokenizer is not None:
            of_texts = TextLook(
                self._tokenizer,
                embed=model.run,
                p_values=lambda embeddings: self._detector.score(embeddings).p_values,
                alpha=self._detector.alpha,
                max_per_second=self._settings.second_looks,
            )
            return lambda ids, _: of_texts.look(ids.astype(np.int64, copy=False))
        triggers = {
            record.id: StoredTrigger(record.family, record.target, self._profile.triggers[record.id])
            for record in document.triggers
        }
        try:
            of_images = SecondLook(
                triggers,
                embed=lambda images: model.run(model.preprocessing.normalise(images)),
                p_values=lambda embeddings: self._detector.score(embeddings).p_values,
                classes=document.model.classes.names,
                alpha=self._detector.alpha,
                max_per_second=self._settings.second_looks,
            )
        except ValueError as error:
            raise ProfileError(f"the profile is damaged: {error}") from error
        return lambda image, trigger: of_images.look(self._pixels(image), trigger or None)

    def _pixels(self, image: Values) -> Floats:
        """An image as it was before normalisation."""
        if self._model is None:
            raise ValueError("pixels need the preprocessing of a model")
        return self._model.preprocessing.restore(image.astype(np.float32, copy=False))

    @property
    def threshold(self) -> float:
        """Score above which an image is flagged, where its class has no threshold of its own.

        Where only a share of the requests gets a second opinion, it is that of these requests.
        """
        return self._threshold(asked=self._asks)

    def _threshold(self, *, asked: bool) -> float:
        return (self._detector.threshold if asked else self._detector.threshold_alone).value

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """The active alarms."""
        with self._lock:
            return self._active()

    def follow(
        self,
        found: Judgement,
        rows: NDArray[np.int64],
        message: ModelInferRequest,
        trace_id: str,
        inputs: Values | None,
    ) -> NDArray[np.bool_]:
        """Take second looks, feed the stream monitor, and record what is flagged.

        Args:
            found: What was decided about images or texts of a request.
            rows: Their numbers in the request, shape [N].
            message: The request.
            trace_id: The trace that the request belongs to, or "".
            inputs: Preprocessed images, shape [N, 3, S, S], or token ids, shape [N, L]; None if guard has not seen
                them.

        Returns:
            The flags, without those that the second look withdrew.
        """
        flagged = np.flatnonzero(found.flags).tolist()
        looks: dict[int, SecondLookResult] = {}
        if self._look is not None and inputs is not None:
            for row in flagged:
                looks[row] = self._look(inputs[row], self._trigger(found, row))
                self._metrics.second_look(looks[row].outcome)
        flags = found.flags.copy()
        flags[[row for row, look in looks.items() if look.outcome == "withdrawn"]] = False
        self._observe(found, rows, message, trace_id)
        if self._shared.evidence.wanted:
            for row in flagged:
                kept = bool(flags[row])
                place, look = (row, int(rows[row])), looks.get(row)
                seen = None if inputs is None or not self._shared.settings.thumbnails else inputs[row]
                self._shared.evidence.record(self._record(found, place, kept, message, trace_id, seen, look))
        return flags

    def _trigger(self, found: Judgement, row: int) -> str:
        """The trigger or axis that a request carries, as far as the scores tell; else ""."""
        return self._detector.named(found.scores)[row]

    def _observe(self, found: Judgement, rows: NDArray[np.int64], message: ModelInferRequest, trace_id: str) -> None:
        self._metrics.p_values(found.p_values)
        observed, scores = self._detector.observations(found.scores), found.scores
        now = datetime.now(UTC)
        tags = [
            _Tag(message.id, trace_id, int(number), now, float(p_value))
            for number, p_value in zip(rows, found.p_values, strict=True)
        ]
        raised: list[Alarm] = []
        shown: list[AxisAlarm] = []
        with self._lock:
            if self.sample is not None:
                self.sample.add(scores.embeddings)
            if self._monitor is not None:
                raised = [alarm for row in observed for alarm in self._monitor.observe(row)]
            if self._axes is not None:
                shown = self._axes.observe(scores.embeddings, scores.classes, tags)
            if shown:
                self._use_axes()
            if raised or shown or self._metrics.alarmed:
                self._metrics.alarms(self._active(), [*raised, *(_alarm_of(alarm.axis) for alarm in shown)])
        for alarm in raised:
            log.warning("%s", self._describe(alarm))
        for axis_alarm in shown:
            log.warning("%s", self._describe_axis(axis_alarm))
            self._mark(axis_alarm)

    def _describe_axis(self, alarm: AxisAlarm) -> str:
        axis = alarm.axis
        return (
            f"attack: {axis.name} of the traffic leads to {self._profile.class_name(axis.target)!r}: of about the last "
            f"{axis.after} images, {axis.share:.2%} lie along it; clean images explain up to {axis.bound:.2%}. "
            f"{axis.within:.0%} of the unusual images lead to this class, which drift does not. From now on images "
            f"along it are flagged; look at the {len(alarm.tags)} that formed it, then confirm the axis with "
            "guard calibrate --adopt-axis"
        )

    def _mark(self, alarm: AxisAlarm) -> None:
        """Record the images that formed an axis; most of them passed before it was known."""
        if not self._shared.evidence.wanted:
            return
        axis, document = alarm.axis, self._profile.document
        target = self._profile.class_name(axis.target)
        for tag in alarm.tags:
            record = Record(
                tag.request_id,
                self._settings.label,
                document.model.digest,
                tag.image,
                Decision.FLAG if tag.p_value <= self._detector.alpha else Decision.PASS,
                self._settings.mode,
                time=tag.time.isoformat(),
                trace_id=tag.trace_id,
                predicted=target,
                p_value=tag.p_value,
                alpha=self._detector.alpha,
                trigger=axis.name,
                target=target,
                explanation=f"one of the images that formed {axis.name} of the traffic; decided about before it was",
            )
            self._shared.evidence.record(record)

    def _describe(self, alarm: Alarm) -> str:
        what = "attack" if alarm.kind == "attack" else "drift"
        cause = " (a drift alarm is active as well, and may be the cause)" if alarm.during_drift else ""
        return (
            f"{what} in the stream {alarm.stream!r}: of about the last {alarm.after} images, {alarm.rate:.2%} have a "
            f"p-value of at most {alarm.level:g}; clean images explain up to {alarm.bound:.2%}{cause}"
        )

    def _record(
        self,
        found: Judgement,
        place: tuple[int, int],
        flagged: bool,  # noqa: FBT001 - handed through
        message: ModelInferRequest,
        trace_id: str,
        seen: Values | None,
        look: SecondLookResult | None,
    ) -> Record:
        row, number = place  # among the images that were scored, and in the request
        trigger, document = self._trigger(found, row), self._profile.document
        asked = bool(found.scores.asked[row])
        small, text = None, ""
        if seen is not None and self._tokenizer is not None:
            text = self._tokenizer.decode(seen.tolist())
        elif seen is not None and self._model is not None:
            array = (self._pixels(seen).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
            small = thumbnail(Image.fromarray(np.ascontiguousarray(array)))
        return Record(
            message.id,
            self._settings.label,
            document.model.digest,
            number,
            Decision.FLAG if flagged else Decision.PASS,
            self._settings.mode,
            trace_id=trace_id,
            predicted=self._profile.class_name(int(found.scores.classes[row])),
            p_value=float(found.p_values[row]),
            alpha=self._detector.alpha,
            scores=_scores(found.scores, row),
            thresholds={"score": self._threshold(asked=asked)},
            decided_by=found.scores.decided_by[row],
            reference=self._profile.class_name(int(found.scores.answers[row])) if asked else "",
            trigger=trigger,
            target=self._targets.get(trigger, ""),
            second_look="" if look is None else look.outcome,
            explanation="" if look is None else look.explanation,
            input_digest=input_digest(message, number, self._settings.input_tensor),
            thumbnail=small,
            text=text,
        )

    def save(self) -> None:
        """Save the monitor's state and the sample, if there is a folder for them; an error is logged, not raised."""
        if self._state_file is None or self._sample_file is None:
            return
        # Requests wait for this lock, and must not wait for a disk.
        with self._lock:
            state = None if self._monitor is None else self._monitor.state()
            axes = None if self._axes is None else axis_state.dump(self._axes)
            sample = None if self.sample is None else self.sample.snapshot()
        try:
            if axes is not None and self._axis_file is not None:
                axis_state.write(self._axis_file, axes)
            if state is not None:
                write_state(self._state_file, state)
            if sample is not None and sample[1]:
                store(self._sample_file, *sample, self._profile.document.model.digest)
        except (OSError, GuardError) as error:
            log.warning("the state in %s cannot be written: %s", self._state_file.parent, error)


def _alarm_of(axis: Axis) -> Alarm:
    """The alarm by which an axis is shown among those of the monitor; it stays active until the axis is adopted."""
    return Alarm(axis.name, "attack", axis.observed, axis.after, axis.bound, axis.share, axis.bound, during_drift=False)


def _scores(scores: Scores, row: int) -> dict[str, float]:
    """The scores of an image by name; a record keeps the first few, so those that are not of triggers come first."""
    parts = {name: float(values[row]) for name, values in scores.parts.items() if not np.isnan(values[row])}
    others = {name: value for name, value in parts.items() if not matched(name)}
    return {"score": float(scores.values[row]), **others, **parts}


def input_digest(request: ModelInferRequest, row: int, name: str) -> str:
    """SHA-256 of the bytes of one image or text, by which the same input is recognised again; "" if there is none.

    Args:
        request: The request.
        row: The number of the image in its batch, from 0.
        name: Name of the input tensor.
    """
    # The input that the images were read from, by whatever name a request with one input gives it.
    names = [tensor.name for tensor in request.inputs]
    index = names.index(name) if name in names else 0
    if name not in names and len(names) != 1:
        return ""
    tensor, raws = request.inputs[index], request.raw_input_contents
    raw = raws[index] if index < len(raws) else None
    if tensor.contents.bytes_contents:
        parts: Sequence[bytes] = tensor.contents.bytes_contents
        return hashlib.sha256(parts[row]).hexdigest() if row < len(parts) else ""
    rows = max(1, tensor.shape[0] if tensor.shape else 1)
    if raw is not None:
        if tensor.datatype == "BYTES":
            return _digest_of_element(raw, row)
        size = len(raw) // rows
        return hashlib.sha256(memoryview(raw)[row * size : (row + 1) * size]).hexdigest()
    contents = tensor.contents
    values: NDArray[Any] = np.array(contents.fp32_contents, np.float32)
    if not values.size:
        values = np.array(contents.int64_contents or contents.int_contents, np.int64)
    if not values.size:
        return ""
    size = len(values) // rows
    return hashlib.sha256(values[row * size : (row + 1) * size].tobytes()).hexdigest()


def _digest_of_element(raw: bytes, row: int) -> str:
    """SHA-256 of one element of a raw BYTES tensor, without copying the others; see `unpack_bytes`."""
    start = 0
    for _ in range(row):
        start += 4 + int.from_bytes(raw[start : start + 4], "little")
    length = int.from_bytes(raw[start : start + 4], "little")
    return hashlib.sha256(memoryview(raw)[start + 4 : start + 4 + length]).hexdigest()


def trace_id(metadata: Mapping[str, str | bytes]) -> str:
    """The trace id in a W3C `traceparent`; "" if there is no valid one, since a client may send anything."""
    found = _TRACEPARENT.match(str(metadata.get("traceparent", "")))
    return found["trace"] if found else ""
