"""Make a certificate: load again what a profile was made for, compare, and sign what vetting found."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from guard import __version__
from guard._documents import recording
from guard._files import replace_file
from guard.certificates.envelope import Envelope
from guard.certificates.keys import PrivateKey
from guard.certificates.statement import (
    Budget,
    Conclusions,
    Evaluation,
    Method,
    Model,
    Parity,
    Power,
    Predicate,
    Scope,
    Screening,
    Statement,
    Subject,
    SubjectDigest,
    Trigger,
    Vetter,
    parse_time,
    write_time,
)
from guard.certificates.subjects import (
    EXPORTED,
    check_names,
    files_of_loaded,
    named,
    profile_files,
)
from guard.certificates.verification import CERTIFICATE_FILE, TEST_RESULT_FILE
from guard.classifiers.classes import ClassList
from guard.classifiers.digest import canonical, sha256
from guard.classifiers.files import CLASSES_FILE
from guard.classifiers.images import ImageFolder
from guard.errors import CertificateError, UsageError
from guard.profiles import Profile
from guard.vetting.budgets import BUDGETS

if TYPE_CHECKING:
    from guard.classifiers import Classifier

MOST_DAYS = 3650
_POWER_FILE = "power.json"
_PACKAGES = ("torch", "open_clip_torch", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")
_PARITY_IMAGES = 64


@dataclass(frozen=True)
class Certified:
    """What was made.

    Attributes:
        statement: What the certificate says.
        certificate: Where it lies.
        key_ids: Ids of the keys that signed it.
    """

    statement: Statement
    certificate: Path
    key_ids: tuple[str, ...]


def certify(
    profile: Path,
    model: str,
    keys: Sequence[PrivateKey],
    *,
    exported: Path | None = None,
    images: ImageFolder | None = None,
    vetter: str = "guard",
    days: float = 90,
    device: str | None = None,
    now: datetime | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Certified:
    """Sign what vetting found about a model, and write `certificate.json` and `test-result.json` into the profile.

    Everything is loaded again, and hashed by the descriptors that it is read from. The classifier must be the one of
    the profile, the export must be of that classifier, and must compute the same.

    Args:
        profile: Folder of the profile.
        model: The model that was vetted, as `guard.load` takes it.
        keys: At least one.
        exported: What `guard export` wrote for the model; None if guard will not serve it.
        images: Images on which the export is compared with the model; by default 64 of noise, seeded.
        vetter: Who vetted, in words of their own; a trust policy can ask for it.
        days: How long the certificate is valid.
        device: torch device.
        now: The time; None for that of the clock.
        progress: Called with a short description of each step.

    Raises:
        ProfileError: The profile is missing, damaged, or of another model.
        ModelError: The model or the export cannot be loaded.
        CertificateError: The export is of another classifier or computes something else, beside the model lies a class
            list that is not the one of the profile, or only the text tower was examined.
        UsageError: There is no key, or the days are out of range.
    """
    from guard.classifiers import load

    if not keys or not 0 < days <= MOST_DAYS:
        raise UsageError(f"a certificate needs a key, and is valid for more than 0 and at most {MOST_DAYS} days")
    progress("reading the profile")
    with recording() as opened:
        stored = Profile.open(profile)
        if stored.reference_model is not None:
            stored.load_reference_model()
    files = profile_files(opened, profile)
    document = stored.document
    if document.text is not None and not document.vetting.results:
        raise CertificateError(
            f"{profile} is of the text tower alone, and a certificate is for a model that is served; examine both "
            "towers (guard vet --tower both)"
        )
    progress(f"loading {model}")
    with recording() as opened:
        classifier = load(model, classes=document.model.classes, device=device)
        listed = next(iter(opened)).parent / CLASSES_FILE
        if listed.is_file() and ClassList.read(listed) != document.model.classes:
            raise CertificateError(
                f"{listed} is not the class list that the model was vetted with; put that list there, or vet again"
            )
    stored.check_model(classifier.digest)
    files |= files_of_loaded(model, opened)
    parity = None
    if exported is not None:
        progress(f"comparing {exported} with the model")
        with recording() as opened:
            parity = _compare(classifier, exported, images)
        files |= named(opened, exported, EXPORTED)
    try:
        check_names(files)
    except ValueError as error:
        raise CertificateError(str(error)) from error
    time = (now or datetime.now(UTC)).replace(microsecond=0)
    statement = Statement(
        _type="https://in-toto.io/Statement/v1",
        subject=tuple(
            Subject(name=name, digest=SubjectDigest(sha256=digest)) for name, digest in sorted(files.items())
        ),
        predicate=_predicate(stored, vetter, parity, str(classifier.device), time, days),
    )
    certificate = profile / CERTIFICATE_FILE
    replace_file(profile / TEST_RESULT_FILE, Envelope.sign(statement.to_test_result(), keys).to_json())
    replace_file(certificate, Envelope.sign(statement.to_json(), keys).to_json())
    return Certified(statement, certificate, tuple(key.public.id for key in keys))


def _compare(classifier: "Classifier", exported: Path, images: ImageFolder | None) -> Parity:
    import torch

    from guard.classifiers import ExportedClassifier
    from guard.classifiers.exporting import TOLERANCE, compare

    model = ExportedClassifier(exported, gpu=False)
    if model.digest != classifier.digest.root:
        raise CertificateError(f"{exported} is the export of another model; export the one that was vetted")
    if images is not None:
        pixels = classifier.read(images)
    else:
        generator = torch.Generator().manual_seed(0)
        shape = (_PARITY_IMAGES, *classifier.image_shape)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    found = compare(classifier, model, pixels)
    if not found.max_difference <= TOLERANCE:
        raise CertificateError(
            f"{exported} does not compute what the model computes: embeddings differ by up to "
            f"{found.max_difference:.2g} (allowed {TOLERANCE:g}); export the model again"
        )
    return Parity(images=found.images, max_difference=found.max_difference, agreement=found.agreement)


def _predicate(
    profile: Profile, vetter: str, parity: Parity | None, device: str, time: datetime, days: float
) -> Predicate:
    document = profile.document
    vetting, model, calibration = document.vetting, document.model, document.calibration
    verdict, names = vetting.verdict, model.classes.names
    vetted = parse_time(write_time(datetime.fromisoformat(document.created)))
    smallest = min(1.0, verdict.p_value)
    opinion = None if calibration is None else calibration.second_opinion
    return Predicate(
        verdict=Conclusions(
            outcome=verdict.outcome,
            target=None if verdict.target is None else names[verdict.target],
            p_value=smallest,
            significance=verdict.significance,
            reasons=verdict.reasons,
        ),
        vetter=Vetter(id=vetter, version=document.guard),
        model=Model(source=model.source, digest=model.digest, parts=dict(model.parts)),
        scope=Scope(
            families=verdict.families,
            budget=budget_of(vetting.effort),
            classes=len(names),
            prompt_set=sha256(canonical(model.classes.document())),
            images_searched=vetting.images[0],
            images_held_out=vetting.images[1],
            reference_model=vetting.reference_model.kind,
            reference_digest=vetting.reference_model.digest,
            effort={
                part: {key: float(value) for key, value in values.items()} for part, values in vetting.effort.items()
            },
        ),
        methods=tuple(
            Method(
                name=each.method,
                family=each.family,
                radius=each.radius,
                norm_unit=each.norm_unit,
                statistic=each.statistic,
                null=each.null,
                seed=each.seed,
                passes=each.passes,
                leading_class=None if each.target is None else names[each.target],
                p_value=each.p_value,
            )
            for each in vetting.results
        ),
        evaluation=Evaluation(
            threshold=verdict.significance,
            value=smallest,
            passed=verdict.outcome == "no evidence",
            sample_size=sum(vetting.images),
        ),
        power=_power(vetting.reference_model.kind),
        triggers=tuple(
            Trigger(
                id=each.id,
                family=each.family,
                target=names[each.target],
                norm=each.norm,
                norm_unit=each.norm_unit,
                success=each.success,
            )
            for each in document.triggers
        ),
        screening=None
        if calibration is None
        else Screening(
            alpha=calibration.threshold.alpha,
            threshold=calibration.threshold.value,
            clean_scores=calibration.threshold.size,
            held_out=calibration.held_out,
            false_alarms=calibration.false_alarms,
            second_opinion=None if opinion is None else opinion.kind,
            second_opinion_digest=None if opinion is None else opinion.digest,
        ),
        parity=parity,
        environment={"guard": __version__, "python": platform.python_version(), "device": device, **_versions()},
        vetted_at=write_time(vetted),
        certified_at=write_time(time),
        expires_at=write_time(time + timedelta(days=days)),
    )


def budget_of(effort: object) -> Budget:
    """The budget whose settings these are, whatever the seeds; `custom` if none has them."""
    found = TypeAdapter(dict[str, dict[str, float]]).validate_python(effort)
    for name, known in BUDGETS.items():
        settings = TypeAdapter(dict[str, dict[str, float]]).validate_python(
            {part: vars(values) for part, values in vars(known).items()}
        )
        if _without_seeds(settings) == _without_seeds(found):
            return name
    return "custom"


def _without_seeds(effort: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {part: {key: value for key, value in values.items() if key != "seed"} for part, values in effort.items()}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _power(reference_model: str) -> Power | None:
    """What guard's benchmarks measured with this kind of reference model; None if they measured nothing."""
    text = resources.files("guard.certificates").joinpath(_POWER_FILE).read_text(encoding="utf-8")
    return TypeAdapter(dict[str, Power]).validate_json(text).get(reference_model)
