"""What a certificate says: an in-toto Statement v1 about the files of a model, with the result of its vetting.

The predicate type is guard's own, `PREDICATE_TYPE`; docs/certificates.md describes it, and
`backdoor-vetting-v1.schema.json` is its JSON schema. Names of fields follow the guidance of in-toto: lowerCamelCase,
times in RFC 3339, and readers ignore fields that they do not know. `Evaluation` has the fields from which the predicate
`eval-result`, which in-toto discusses, can be derived.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel

from guard._documents import first_error, parse_json
from guard.certificates.subjects import MAX_FILES, check_names
from guard.classifiers.digest import canonical
from guard.vetting.results import Conclusion, ReferenceKind

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://github.com/clip-guard/guard/backdoor-vetting/v1"
"""What a statement of guard is called; docs/certificates.md describes it."""
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
RESULTS = {"backdoored": "FAILED", "inconclusive": "WARNED", "no evidence": "PASSED"}
"""The verdict in the words of `test-result`."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(max_length=4096)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Budget = Literal["quick", "standard", "thorough", "custom"]


def parse_time(text: str) -> datetime:
    """A time in RFC 3339 with seconds, in UTC: `2026-11-28T09:00:00Z`.

    Raises:
        ValueError: The text is not of this form.
    """
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def write_time(time: datetime) -> str:
    """The text of a time; see `parse_time`."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _checked_time(text: str) -> str:
    parse_time(text)
    return text


Time = Annotated[str, AfterValidator(_checked_time)]


class Form(BaseModel):
    """A part of a statement; it cannot be changed, and fields that it does not know are ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, strict=True, allow_inf_nan=False
    )


class Conclusions(Form):
    """The verdict of `guard vet` (`guard.vetting.Verdict`), with the target's name instead of its index."""

    outcome: Conclusion
    target: Text | None
    p_value: Share
    significance: Share
    reasons: tuple[Text, ...]


class Vetter(Form):
    """Who vetted, in words of their own, and with which guard."""

    id: Text
    version: Text


class Method(Form):
    """One trigger family, or the probes: how it was searched, and the class that stands out most.

    `p_value` is corrected for the number of classes; `seed` reproduces the search.
    """

    name: Text
    family: Text
    radius: float
    norm_unit: Text
    statistic: Text
    null: Text
    seed: int
    passes: Count
    leading_class: Text | None
    p_value: Share


class Scope(Form):
    """What was examined. `prompt_set` is the digest of class names and templates; the others are numbers."""

    families: tuple[Text, ...]
    budget: Budget
    classes: Count
    prompt_set: Digest
    images_searched: Count
    images_held_out: Count
    reference_model: ReferenceKind
    reference_digest: Digest | None
    effort: dict[Text, dict[Text, float]]


class Evaluation(Form):
    """The result as a measurement against a threshold."""

    metric: Literal["corrected p-value"] = "corrected p-value"
    comparator: Literal[">"] = ">"
    threshold: Share
    value: Share
    passed: bool
    sample_size: Count
    assurance_level: Literal["self_attested"] = "self_attested"


class Power(Form):
    """How often such a vetting finds an attack, as guard's benchmarks measured it on models whose truth is known."""

    source: Text
    found: dict[Text, tuple[int, int]]
    false_alarms: tuple[int, int]


class Trigger(Form):
    """A reconstructed trigger; its tensors are in `profile/triggers.safetensors`."""

    id: Text
    family: Text
    target: Text
    norm: float
    norm_unit: Text
    success: Share


class Screening(Form):
    """How requests are screened: the calibration of the profile."""

    alpha: Share
    threshold: float
    clean_scores: Count
    held_out: Count
    false_alarms: Count
    second_opinion: Text | None
    second_opinion_digest: Digest | None


class Model(Form):
    """The classifier as it was loaded: a digest over all of it, and one of each part."""

    source: Text
    digest: Digest
    parts: dict[Text, Digest]


class Parity(Form):
    """How the export compares with the model on images, measured when the certificate was made."""

    images: Count
    max_difference: float
    agreement: Share


class Predicate(Form):
    """What vetting found, and what it is worth."""

    verdict: Conclusions
    vetter: Vetter
    model: Model
    scope: Scope
    methods: tuple[Method, ...]
    evaluation: Evaluation
    power: Power | None
    triggers: tuple[Trigger, ...]
    screening: Screening | None
    parity: Parity | None
    environment: dict[Text, Text]
    vetted_at: Time
    certified_at: Time
    expires_at: Time


class SubjectDigest(Form):
    """Digests of one file."""

    sha256: Digest


class Subject(Form):
    """One file, by name and digest."""

    name: Text
    digest: SubjectDigest


class Statement(Form):
    """The whole statement.

    Attributes:
        type: That it is an in-toto Statement v1.
        subject: The files that it is about.
        predicate_type: What it says about them: the result of a vetting.
        predicate: The result.
    """

    type: Literal["https://in-toto.io/Statement/v1"] = Field("https://in-toto.io/Statement/v1", alias="_type")
    subject: Annotated[tuple[Subject, ...], Field(min_length=1, max_length=MAX_FILES)]
    predicate_type: Literal["https://github.com/clip-guard/guard/backdoor-vetting/v1"] = (
        "https://github.com/clip-guard/guard/backdoor-vetting/v1"
    )
    predicate: Predicate

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each file by name."""
        return {each.name: each.digest.sha256 for each in self.subject}

    def to_json(self) -> bytes:
        """The payload that is signed."""
        return canonical(self.model_dump(by_alias=True))

    def to_test_result(self) -> bytes:
        """The same result as `test-result`, the predicate that policy engines know."""
        verdict = self.predicate.verdict
        result = RESULTS[verdict.outcome]
        test = f"backdoor-vetting/{self.predicate.scope.budget}"
        lists = {"PASSED": "passedTests", "WARNED": "warnedTests", "FAILED": "failedTests"}
        predicate: dict[str, Any] = {
            "result": result,
            "configuration": [
                {"name": name, "digest": {"sha256": digest}}
                for name, digest in self.files.items()
                if name == "profile/profile.json"
            ],
            **{each: [test] if lists[result] == each else [] for each in lists.values()},
        }
        subject = [each.model_dump(by_alias=True) for each in self.subject]
        return canonical(
            {"_type": STATEMENT_TYPE, "subject": subject, "predicateType": TEST_RESULT, "predicate": predicate}
        )

    @classmethod
    def parse(cls, payload: bytes) -> "Statement":
        """The statement in a payload.

        Raises:
            ValueError: It is none: not JSON by the letter, of another type, or with fields that do not fit; or a name
                of a file is not plain, or is listed twice.
        """
        try:
            text = payload.decode()
        except UnicodeDecodeError as error:
            raise ValueError("its payload is not valid UTF-8") from error
        document = parse_json(text)
        if not isinstance(document, Mapping):
            raise ValueError("its payload is no statement")  # noqa: TRY004 - it is a text of anybody
        for name, expected in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
            if document.get(name) != expected:
                raise ValueError(f"its {name} is not {expected}")
        try:
            found = cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(first_error(error)) from error
        check_names(each.name for each in found.subject)
        return found
