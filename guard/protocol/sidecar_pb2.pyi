import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_SHADOW: _ClassVar[Mode]
    MODE_TAG: _ClassVar[Mode]
    MODE_BLOCK: _ClassVar[Mode]

class FailurePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_POLICY_UNSPECIFIED: _ClassVar[FailurePolicy]
    FAILURE_POLICY_OPEN: _ClassVar[FailurePolicy]
    FAILURE_POLICY_CLOSED: _ClassVar[FailurePolicy]
MODE_UNSPECIFIED: Mode
MODE_SHADOW: Mode
MODE_TAG: Mode
MODE_BLOCK: Mode
FAILURE_POLICY_UNSPECIFIED: FailurePolicy
FAILURE_POLICY_OPEN: FailurePolicy
FAILURE_POLICY_CLOSED: FailurePolicy

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("version", "process", "started_at", "ready", "reason", "upstream", "active_requests", "evidence_trouble")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_TROUBLE_FIELD_NUMBER: _ClassVar[int]
    version: str
    process: int
    started_at: _timestamp_pb2.Timestamp
    ready: bool
    reason: str
    upstream: str
    active_requests: int
    evidence_trouble: str
    def __init__(self, version: _Optional[str] = ..., process: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ready: bool = ..., reason: _Optional[str] = ..., upstream: _Optional[str] = ..., active_requests: _Optional[int] = ..., evidence_trouble: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("include_pictures",)
    INCLUDE_PICTURES_FIELD_NUMBER: _ClassVar[int]
    include_pictures: bool
    def __init__(self, include_pictures: bool = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "unknown_models")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    unknown_models: Traffic
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., unknown_models: _Optional[_Union[Traffic, _Mapping]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "label", "digest", "verdict", "mode", "failure_policy", "alpha", "threshold", "reference_size", "calibration", "triggers", "alarms", "loaded_at", "stale", "second_opinion", "certificate", "traffic")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_POLICY_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_SIZE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    LOADED_AT_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    SECOND_OPINION_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    label: str
    digest: str
    verdict: Verdict
    mode: Mode
    failure_policy: FailurePolicy
    alpha: float
    threshold: float
    reference_size: int
    calibration: Calibration
    triggers: _containers.RepeatedCompositeFieldContainer[Trigger]
    alarms: _containers.RepeatedCompositeFieldContainer[Alarm]
    loaded_at: _timestamp_pb2.Timestamp
    stale: bool
    second_opinion: SecondOpinion
    certificate: Certificate
    traffic: Traffic
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., label: _Optional[str] = ..., digest: _Optional[str] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ..., mode: _Optional[_Union[Mode, str]] = ..., failure_policy: _Optional[_Union[FailurePolicy, str]] = ..., alpha: _Optional[float] = ..., threshold: _Optional[float] = ..., reference_size: _Optional[int] = ..., calibration: _Optional[_Union[Calibration, _Mapping]] = ..., triggers: _Optional[_Iterable[_Union[Trigger, _Mapping]]] = ..., alarms: _Optional[_Iterable[_Union[Alarm, _Mapping]]] = ..., loaded_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., stale: bool = ..., second_opinion: _Optional[_Union[SecondOpinion, _Mapping]] = ..., certificate: _Optional[_Union[Certificate, _Mapping]] = ..., traffic: _Optional[_Union[Traffic, _Mapping]] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("accepted", "reason", "expires_at")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    expires_at: _timestamp_pb2.Timestamp
    def __init__(self, accepted: bool = ..., reason: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Traffic(_message.Message):
    __slots__ = ("requests", "images", "unchecked", "scores", "overhead_seconds")
    class RequestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ImagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class UncheckedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    UNCHECKED_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    OVERHEAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.ScalarMap[str, int]
    images: _containers.ScalarMap[str, int]
    unchecked: _containers.ScalarMap[str, int]
    scores: Histogram
    overhead_seconds: Histogram
    def __init__(self, requests: _Optional[_Mapping[str, int]] = ..., images: _Optional[_Mapping[str, int]] = ..., unchecked: _Optional[_Mapping[str, int]] = ..., scores: _Optional[_Union[Histogram, _Mapping]] = ..., overhead_seconds: _Optional[_Union[Histogram, _Mapping]] = ...) -> None: ...

class Histogram(_message.Message):
    __slots__ = ("bounds", "counts")
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    bounds: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, bounds: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ...) -> None: ...

class SecondOpinion(_message.Message):
    __slots__ = ("requests", "kind", "digest", "agreement")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    requests: str
    kind: str
    digest: str
    agreement: float
    def __init__(self, requests: _Optional[str] = ..., kind: _Optional[str] = ..., digest: _Optional[str] = ..., agreement: _Optional[float] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("outcome", "target_class", "p_value")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[Verdict.Outcome]
        OUTCOME_BACKDOORED: _ClassVar[Verdict.Outcome]
        OUTCOME_NO_EVIDENCE: _ClassVar[Verdict.Outcome]
        OUTCOME_INCONCLUSIVE: _ClassVar[Verdict.Outcome]
    OUTCOME_UNSPECIFIED: Verdict.Outcome
    OUTCOME_BACKDOORED: Verdict.Outcome
    OUTCOME_NO_EVIDENCE: Verdict.Outcome
    OUTCOME_INCONCLUSIVE: Verdict.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TARGET_CLASS_FIELD_NUMBER: _ClassVar[int]
    P_VALUE_FIELD_NUMBER: _ClassVar[int]
    outcome: Verdict.Outcome
    target_class: str
    p_value: float
    def __init__(self, outcome: _Optional[_Union[Verdict.Outcome, str]] = ..., target_class: _Optional[str] = ..., p_value: _Optional[float] = ...) -> None: ...

class Calibration(_message.Message):
    __slots__ = ("images", "held_out_images", "held_out_false_alarms")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_IMAGES_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FALSE_ALARMS_FIELD_NUMBER: _ClassVar[int]
    images: int
    held_out_images: int
    held_out_false_alarms: int
    def __init__(self, images: _Optional[int] = ..., held_out_images: _Optional[int] = ..., held_out_false_alarms: _Optional[int] = ...) -> None: ...

class Trigger(_message.Message):
    __slots__ = ("id", "family", "target_class", "success", "picture")
    ID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    TARGET_CLASS_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    id: str
    family: str
    target_class: str
    success: float
    picture: bytes
    def __init__(self, id: _Optional[str] = ..., family: _Optional[str] = ..., target_class: _Optional[str] = ..., success: _Optional[float] = ..., picture: _Optional[bytes] = ...) -> None: ...

class Alarm(_message.Message):
    __slots__ = ("kind", "stream")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Alarm.Kind]
        KIND_ATTACK: _ClassVar[Alarm.Kind]
        KIND_DRIFT: _ClassVar[Alarm.Kind]
    KIND_UNSPECIFIED: Alarm.Kind
    KIND_ATTACK: Alarm.Kind
    KIND_DRIFT: Alarm.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    kind: Alarm.Kind
    stream: str
    def __init__(self, kind: _Optional[_Union[Alarm.Kind, str]] = ..., stream: _Optional[str] = ...) -> None: ...

class FollowEvidenceRequest(_message.Message):
    __slots__ = ("models", "include_withdrawn", "include_thumbnails", "recent")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_THUMBNAILS_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedScalarFieldContainer[str]
    include_withdrawn: bool
    include_thumbnails: bool
    recent: int
    def __init__(self, models: _Optional[_Iterable[str]] = ..., include_withdrawn: bool = ..., include_thumbnails: bool = ..., recent: _Optional[int] = ...) -> None: ...

class Evidence(_message.Message):
    __slots__ = ("lost", "time", "request_id", "trace_id", "model", "model_digest", "image", "decision", "mode", "predicted_class", "p_value", "alpha", "scores", "thresholds", "trigger", "target_class", "second_look", "explanation", "input_digest", "thumbnail", "decided_by", "reference_class", "record", "text")
    class Decision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DECISION_UNSPECIFIED: _ClassVar[Evidence.Decision]
        DECISION_PASS: _ClassVar[Evidence.Decision]
        DECISION_FLAG: _ClassVar[Evidence.Decision]
    DECISION_UNSPECIFIED: Evidence.Decision
    DECISION_PASS: Evidence.Decision
    DECISION_FLAG: Evidence.Decision
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ThresholdsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LOST_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_CLASS_FIELD_NUMBER: _ClassVar[int]
    P_VALUE_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    THRESHOLDS_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    TARGET_CLASS_FIELD_NUMBER: _ClassVar[int]
    SECOND_LOOK_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    INPUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    THUMBNAIL_FIELD_NUMBER: _ClassVar[int]
    DECIDED_BY_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_CLASS_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    lost: int
    time: _timestamp_pb2.Timestamp
    request_id: str
    trace_id: str
    model: str
    model_digest: str
    image: int
    decision: Evidence.Decision
    mode: Mode
    predicted_class: str
    p_value: float
    alpha: float
    scores: _containers.ScalarMap[str, float]
    thresholds: _containers.ScalarMap[str, float]
    trigger: str
    target_class: str
    second_look: str
    explanation: str
    input_digest: str
    thumbnail: bytes
    decided_by: str
    reference_class: str
    record: int
    text: str
    def __init__(self, lost: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., request_id: _Optional[str] = ..., trace_id: _Optional[str] = ..., model: _Optional[str] = ..., model_digest: _Optional[str] = ..., image: _Optional[int] = ..., decision: _Optional[_Union[Evidence.Decision, str]] = ..., mode: _Optional[_Union[Mode, str]] = ..., predicted_class: _Optional[str] = ..., p_value: _Optional[float] = ..., alpha: _Optional[float] = ..., scores: _Optional[_Mapping[str, float]] = ..., thresholds: _Optional[_Mapping[str, float]] = ..., trigger: _Optional[str] = ..., target_class: _Optional[str] = ..., second_look: _Optional[str] = ..., explanation: _Optional[str] = ..., input_digest: _Optional[str] = ..., thumbnail: _Optional[bytes] = ..., decided_by: _Optional[str] = ..., reference_class: _Optional[str] = ..., record: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class GetConfigurationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Configuration(_message.Message):
    __slots__ = ("settings",)
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    def __init__(self, settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("model", "name", "value", "source")
    class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SOURCE_UNSPECIFIED: _ClassVar[Setting.Source]
        SOURCE_DEFAULT: _ClassVar[Setting.Source]
        SOURCE_FILE: _ClassVar[Setting.Source]
        SOURCE_ENVIRONMENT: _ClassVar[Setting.Source]
        SOURCE_OPTION: _ClassVar[Setting.Source]
    SOURCE_UNSPECIFIED: Setting.Source
    SOURCE_DEFAULT: Setting.Source
    SOURCE_FILE: Setting.Source
    SOURCE_ENVIRONMENT: Setting.Source
    SOURCE_OPTION: Setting.Source
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    value: str
    source: Setting.Source
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ..., value: _Optional[str] = ..., source: _Optional[_Union[Setting.Source, str]] = ...) -> None: ...
