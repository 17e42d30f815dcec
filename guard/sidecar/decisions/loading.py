"""Reading of the profile and of the exported classifier of a model."""

from guard.classifiers import ExportedClassifier
from guard.errors import ProfileError
from guard.profiles import Profile
from guard.sidecar.model_settings import ModelSettings


def load(
    settings: ModelSettings, model: ExportedClassifier | None = None, *, threads: int = 0
) -> tuple[Profile, ExportedClassifier | None]:
    """Read the profile of a model and its exported classifier, if it has one, and make sure that they belong together.

    Args:
        settings: Settings of the model.
        model: The exported classifier, if it is loaded already.
        threads: Threads that one forward pass uses, see `ExportedClassifier`.

    Raises:
        ProfileError: The profile is missing, damaged, or of another model.
        ModelError: The exported model is missing or damaged.
    """
    profile = read_profile(settings)
    if model is None and settings.model is not None:
        model = ExportedClassifier(settings.model, threads=threads)
    if model is not None:
        match(profile, model, settings)
    return profile, model


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
    if model.digest != profile.document.model.digest:
        raise ProfileError(
            f"the profile {settings.profile} is of another model than {settings.model}: vet and calibrate the model "
            "that was exported, or export the one that was vetted"
        )
