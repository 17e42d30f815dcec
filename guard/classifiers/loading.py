"""Choose the reader for a model: by its path, its hub tag and the files in it."""

from pathlib import Path
from typing import TYPE_CHECKING

from guard._safetensors import open_tensors
from guard.classifiers.classes import ClassList
from guard.classifiers.files import CONFIG_FILE, HUGGING_FACE_FILES, LEARNER_FILE, OPEN_CLIP_FILES, WEIGHTS_FILE
from guard.classifiers.open_clip import import_open_clip, load_open_clip, load_weights_file
from guard.errors import ModelError

if TYPE_CHECKING:
    from guard.classifiers.classifier import Classifier

HUB_PREFIX = "hf-hub:"


def load(model: str, *, classes: Path | str | ClassList | None = None, device: str | None = None) -> "Classifier":
    """Load a classifier.

    Args:
        model: An open_clip directory (`open_clip_config.json` and `open_clip_model.safetensors`), a Hugging Face
            `CLIPModel` directory (`config.json`, `preprocessor_config.json` and `model.safetensors`, whole or in
            shards), `ARCH::FILE` for a safetensors file of an architecture that open_clip knows by name, or a hub tag
            `hf-hub:OWNER/NAME`, optionally with `@REVISION`, of either kind of directory. A directory may hold a prompt
            learner too (`prompt_learner.safetensors`), which then takes the place of the hand-written prompts.
        classes: Class list, or the path of one (`ClassList.read`); by default the `classes.json` beside the weights.
        device: torch device; by default a GPU if there is one.

    Raises:
        ModelError: The model is missing, damaged, a pickle, or asks to run code of its own; or its prompt learner does
            not fit it.
        ClassListError: The class list is missing or unusable.
        ModuleNotFoundError: torch or open_clip is not installed.
        MissingDependencyError: torchvision does not fit torch.
    """
    if isinstance(classes, str):
        classes = Path(classes)
    if model.startswith(HUB_PREFIX):
        return _load_directory(_download(model.removeprefix(HUB_PREFIX)), model, classes, device)
    if "::" in model:
        architecture, _, file = model.partition("::")
        return load_weights_file(architecture, Path(file), model, classes, device)
    path = Path(model)
    if path.is_dir():
        return _load_directory(path, model, classes, device)
    if path.exists():
        with open_tensors(path, ModelError, wanted=WEIGHTS_FILE):
            pass
        raise ModelError(f"{path} is a file; give its architecture too, as ARCH::{path}")
    raise ModelError(f"there is no model {model}: not a directory, not ARCH::FILE, not {HUB_PREFIX}OWNER/NAME")


def _download(tag: str) -> Path:
    """Fetch the files of a hub model that guard reads, and no others; a file in the cache is not fetched again."""
    import_open_clip()
    from huggingface_hub import snapshot_download

    repository, _, revision = tag.partition("@")
    try:
        # Many repositories contain both forms; the second is fetched only if the first is missing.
        for patterns in (OPEN_CLIP_FILES, HUGGING_FACE_FILES):
            directory = Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
            if (directory / CONFIG_FILE).is_file():
                break
    except Exception as error:  # the hub client raises dozens of types, all of which mean that the fetch failed
        raise ModelError(f"cannot fetch {HUB_PREFIX}{tag}: {error}") from error
    return directory


def with_prompt_learner(towers: "Classifier", file: Path) -> "Classifier":
    """The classifier with the prompt learner of a file in place of its hand-written prompts.

    Raises:
        ModelError: The file holds no prompt learner, or one that does not fit the classifier; or the classifier has
            one already.
    """
    from guard.classifiers.prompts import PromptedClassifier, load_prompt_learner

    if isinstance(towers, PromptedClassifier):
        raise ModelError(f"{towers.source} holds a prompt learner already; leave {file} out")
    return PromptedClassifier(towers, load_prompt_learner(file), source=f"{towers.source} with {file}")


def _load_directory(directory: Path, source: str, classes: Path | ClassList | None, device: str | None) -> "Classifier":
    towers = _load_towers(directory, source, classes, device)
    if not (directory / LEARNER_FILE).is_file():
        return towers
    from guard.classifiers.prompts import PromptedClassifier, load_prompt_learner

    return PromptedClassifier(towers, load_prompt_learner(directory / LEARNER_FILE), source=source)


def _load_towers(directory: Path, source: str, classes: Path | ClassList | None, device: str | None) -> "Classifier":
    if (directory / CONFIG_FILE).is_file():
        return load_open_clip(directory, source, classes, device)
    if (directory / "config.json").is_file():
        import_open_clip()  # before torch, for the message that explains how this usually fails
        from guard.classifiers.hugging_face.weights import load_hugging_face

        return load_hugging_face(directory, source, classes, device)
    raise ModelError(
        f"{directory} is not a model: it has neither the {CONFIG_FILE} of open_clip nor the config.json of a CLIPModel"
    )
