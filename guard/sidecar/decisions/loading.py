"""Read what a model is served and screened with."""

from guard.classifiers import ExportedClassifier
from guard.errors import ProfileError
from guard.profiles import Profile
from guard.sidecar.settings import ModelSettings


def load(settings: ModelSettings, model: ExportedClassifier | None = None) -> tuple[Profile, ExportedClassifier | None]:
    """The profile of a model, and its exported form if it has one; they are of the same classifier.

    Args:
        settings: Of the model.
        model: That is loaded already.

    Raises:
        ProfileError: The profile is missing, damaged, or of another model.
        ModelError: The exported model is missing or damaged.
    """
    profile = read_profile(settings)
    if model is None and settings.model is not None:
        model = ExportedClassifier(settings.model)
    if model is not None:
        match(profile, model, settings)
    return profile, model


def read_profile(settings: ModelSettings) -> Profile:
    """The profile of a model.

    Raises:
        ProfileError: It is missing or damaged.
    """
    if settings.profile is None:
        raise ValueError("settings are checked before")
    return Profile.open(settings.profile)


def match(profile: Profile, model: ExportedClassifier, settings: ModelSettings) -> None:
    """Make sure that a profile is of the model that was exported.

    Raises:
        ProfileError: It is of another.
    """
    if model.digest != profile.document.model.digest:
        raise ProfileError(
            f"the profile {settings.profile} is of another model than {settings.model}: vet and calibrate the model "
            "that was exported, or export the one that was vetted"
        )
