"""Reading of what a model is screened with: its profile, the exported classifier and the reference model."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from guard._documents import recording
from guard.certificates.subjects import EXPORTED, REFERENCE_MODEL_PART, named, profile_files
from guard.classifiers import ExportedClassifier
from guard.errors import ProfileError
from guard.profiles import Profile
from guard.screening import Detector
from guard.sidecar.decisions.certification import Certification
from guard.sidecar.decisions.images import ImageReader
from guard.sidecar.decisions.inputs import Reader
from guard.sidecar.decisions.opinions import SecondOpinions
from guard.sidecar.decisions.texts import TextReader
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import FailurePolicy
from guard.sidecar.settings import Settings


@dataclass(frozen=True, eq=False)
class Loaded:
    """What a model is screened with.

    Attributes:
        profile: The calibrated profile.
        detector: The detector of the profile.
        model: The exported classifier; None if the embeddings come from the upstream server.
        opinions: Asks the reference model; None without second opinions.
    """

    profile: Profile
    detector: Detector
    model: ExportedClassifier | None = None
    opinions: SecondOpinions | None = None
    certification: Certification | None = None


def load(
    settings: ModelSettings,
    own: Settings,
    model: ExportedClassifier | None = None,
    old: Loaded | None = None,
) -> Loaded:
    """Read what a model is screened with, and make sure that it belongs together.

    Args:
        settings: Settings of the model.
        own: Settings of the sidecar.
        model: The exported classifier, if it is loaded already.
        old: What was loaded before; its reference model is used again if it is that of the profile.

    Raises:
        ProfileError: The profile is missing, damaged, not calibrated, of another model, or has no reference model where
            the settings need one.
        ModelError: An exported model is missing or damaged.
        UsageError: The calibration does not support the alpha of the settings.
        RefusedError: The settings require a certificate, and the failure policy is closed, and no policy accepts it.
    """
    threads, kept = own.forward_threads, model
    reference = None if old is None or old.opinions is None else old.opinions.model
    certified = bool(own.policy or own.trust)
    # Digests are taken of what is read only where a certificate is compared with them: it reads large files once more.
    recorded: AbstractContextManager[dict[Path, str]] = recording() if certified else nullcontext({})
    with recorded as opened:
        profile = read_profile(settings)
        if model is None and settings.model is not None:
            model = ExportedClassifier(settings.model, threads=threads)
        if model is not None:
            match(profile, model, settings)
        opinions = read_opinions(profile, settings, reference, threads=threads)
    certification = None
    if certified:
        again = {EXPORTED} if kept is not None else set()
        if opinions is not None and opinions.model is reference:
            again.add(REFERENCE_MODEL_PART)
        known = {} if old is None or old.certification is None else old.certification.files
        files = {name: digest for name, digest in known.items() if name.partition("/")[0] in again}
        certification = Certification(own, settings, files | _files(opened, settings))
        if own.require_certified and settings.on_failure is FailurePolicy.CLOSED:
            certification.admission.demand()
    return Loaded(profile, make_detector(profile, settings, opinions), model, opinions, certification)


def _files(opened: Mapping[Path, str], settings: ModelSettings) -> dict[str, str]:
    """The files that were opened, by name of subject."""
    found = {} if settings.profile is None else profile_files(opened, settings.profile)
    return found if settings.model is None else found | named(opened, settings.model, EXPORTED)


def read_profile(settings: ModelSettings) -> Profile:
    """Read the profile of a model.

    Raises:
        ProfileError: The profile is missing or damaged.
    """
    if settings.profile is None:
        raise ValueError("the settings name no profile")
    return Profile.open(settings.profile)


def match(profile: Profile, model: ExportedClassifier, settings: ModelSettings) -> None:
    """Make sure that a profile is of the model that was exported.

    Raises:
        ProfileError: The profile is of another model.
    """
    inputs = "images" if model.text is None else "texts"
    if inputs != profile.document.inputs:
        raise ProfileError(
            f"the profile {settings.profile} screens {profile.document.inputs}, and {settings.model} is of a tower "
            f"of {inputs}: calibrate the profile with {inputs}, or export the other tower"
        )
    if model.digest != profile.document.model.digest:
        raise ProfileError(
            f"the profile {settings.profile} is of another model than {settings.model}: vet and calibrate the model "
            "that was exported, or export the one that was vetted"
        )


def has_reference_model(profile: Profile) -> bool:
    """Whether a profile was calibrated with a reference model, and holds its export."""
    calibration = profile.document.calibration
    return calibration is not None and calibration.second_opinion is not None and profile.reference_model is not None


def read_opinions(
    profile: Profile,
    settings: ModelSettings,
    reference: ExportedClassifier | None = None,
    *,
    threads: int = 0,
) -> SecondOpinions | None:
    """The second opinions that the settings ask for; the arguments are those of `load`.

    Raises:
        ProfileError: The settings ask for second opinions, and the profile has no reference model; or another model
            lies in its place.
        ModelError: A file of the reference model is missing or damaged.
    """
    rule = settings.opinions
    if rule == "off":
        return None
    if not has_reference_model(profile):
        if settings.second_opinion is None:
            return None
        raise ProfileError(
            f"second_opinion is {rule}, and the profile {settings.profile} has no reference model: run guard calibrate "
            "with images and a reference model on it, or set second_opinion to off"
        )
    found = profile.load_reference_model(threads=threads, loaded=reference)
    return SecondOpinions(found, profile.document.model.preprocessing, rule)


def make_reader(loaded: Loaded, settings: ModelSettings, limits: Settings) -> Reader:
    """What reads the requests of a model.

    Raises:
        MissingDependencyError: Texts are to be read, and what reads them is not installed.
        ModelError: The tokenizer of a text tower is damaged.
    """
    model = loaded.model or (None if loaded.opinions is None else loaded.opinions.model)
    if loaded.profile.document.inputs == "texts":
        return TextReader(None if model is None else model.text, settings, limits)
    own = loaded.profile.document.model if loaded.model is None else loaded.model
    return ImageReader(own.preprocessing, settings, limits)


def make_detector(profile: Profile, settings: ModelSettings, opinions: SecondOpinions | None) -> Detector:
    """The detector of a profile, for requests that get these second opinions.

    Raises:
        ProfileError: The profile was not calibrated.
        UsageError: The calibration does not support the alpha of the settings.
    """
    near_only = opinions is not None and opinions.near_only
    return profile.detector(settings.neighbours, settings.alpha, near_only=near_only)
