"""Read and write classifiers in open_clip's own forms. Imports without torch and open_clip until they are needed."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard._files import replace_directory
from guard.classifiers.classes import ClassList
from guard.classifiers.files import CLASSES_FILE, CONFIG_FILE, WEIGHTS_FILE, missing_weights
from guard.classifiers.open_clip_config import check_config, read_config
from guard.classifiers.preprocessing import Preprocessing
from guard.errors import MissingDependencyError, ModelError, first_line

if TYPE_CHECKING:
    import torch

    from guard.classifiers.classifier import Classifier
    from guard.classifiers.weights import Weights

_PUBLISHED = ("mean", "std", "interpolation", "resize_mode", "quick_gelu")
"""What open_clip says of each of the weights that it publishes."""
_PARALLEL, _TEXT = "module.", ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
"""Beginnings of the names that `_rename` knows."""


def import_open_clip() -> Any:  # noqa: ANN401 - open_clip publishes no types
    """Import open_clip, with an explanation of the most common failure.

    Raises:
        ModuleNotFoundError: It is not installed.
        MissingDependencyError: torchvision does not fit the installed torch.
    """
    try:
        import open_clip
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise MissingDependencyError(
            "torchvision was built for another torch (a CUDA torchvision beside a CPU torch); install both from the "
            "same index, or see docs/decisions/0003-environment.md for the remedy that `make` applies"
        ) from error
    return open_clip


def pick_device(name: str | None = None) -> "torch.device":
    """The device with this name; without a name a GPU if torch can use one, else the CPU."""
    import_open_clip()
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence open_clip's warning, on the root logger, that no weights were loaded: guard loads them itself."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def load_open_clip(directory: Path, source: str, classes: Path | ClassList | None, device: str | None) -> "Classifier":
    """Load an open_clip directory; see `guard.classifiers.load`.

    Raises:
        ModelError: The model is missing, damaged, a pickle, or asks for what guard does not do.
    """
    if not (directory / WEIGHTS_FILE).is_file():
        raise missing_weights(directory, WEIGHTS_FILE)
    config, preprocessing = read_config(directory / CONFIG_FILE)
    return _build(
        config,
        preprocessing,
        directory / WEIGHTS_FILE,
        classes or directory / CLASSES_FILE,
        source=source,
        device=device,
    )


def load_weights_file(
    architecture: str, weights: Path, source: str, classes: Path | ClassList | None, device: str | None
) -> "Classifier":
    """Load a safetensors file of an architecture that open_clip knows by name; see `guard.classifiers.load`.

    Raises:
        ModelError: The architecture is unknown, its name does not say all that the weights need, or the file is
            missing, damaged or a pickle.
    """
    open_clip = import_open_clip()
    from guard.classifiers.weights import open_weights

    # Nothing but a name of this list: open_clip would also follow the name of a folder, or of a model on a hub.
    if architecture not in open_clip.list_models():
        raise ModelError(f"open_clip knows no architecture {architecture!r}; `open_clip.list_models()` lists them")
    with open_weights([weights]):
        pass  # what is wrong with the file is said before what is wrong with the architecture
    config = open_clip.get_model_config(architecture)
    size = check_config(architecture, config)
    preprocessing = _published_preprocessing(architecture, config, size)
    return _build(
        config, preprocessing, weights, classes or weights.parent / CLASSES_FILE, source=source, device=device
    )


def _published_preprocessing(architecture: str, config: Mapping[str, Any], size: int) -> Preprocessing:
    """The preprocessing of all weights that open_clip publishes for an architecture.

    A file of weights does not say how images are prepared for it, and with which activation it was trained.

    Raises:
        ModelError: The published weights differ, or need another activation than the architecture's, or there are none.
    """
    open_clip = import_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    found = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    differing = [name for name in _PUBLISHED if len({repr(each.get(name) or None) for each in found}) > 1]
    quick = bool(config.get("quick_gelu"))
    if not found:
        reason = "open_clip publishes no weights of it, which would say how its images are prepared"
    elif differing:
        reason = f"the weights of it that open_clip publishes differ in {' and '.join(differing)}"
    elif bool(found[0].get("quick_gelu")) != quick:
        reason = (
            f"all weights of it that open_clip publishes need {'GELU' if quick else 'QuickGELU'}, and it has the other"
        )
    else:
        return Preprocessing(size, *(found[0][name] for name in _PUBLISHED if name != "quick_gelu"))
    sibling = f"{architecture}-quickgelu"
    other = f"name {sibling} if they were trained with QuickGELU, or " if sibling in open_clip.list_models() else ""
    raise ModelError(
        f"the name {architecture} alone does not say how these weights compute: {reason}; {other}put them into a "
        f"folder as {WEIGHTS_FILE}, with an {CONFIG_FILE} that holds their model_cfg and preprocess_cfg"
    )


def save(
    directory: Path,
    model: "torch.nn.Module",
    config: Mapping[str, Any],
    classes: ClassList,
    *,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write an open_clip directory with its class list, whole or not at all.

    Args:
        directory: The directory to write; an older open_clip directory is replaced.
        model: An open_clip model.
        config: The content of `open_clip_config.json`: `model_cfg` and `preprocess_cfg`.
        classes: The class list, written to `classes.json`.
        extra: Further files, name → text, such as a record of the training.

    Raises:
        UsageError: `directory` contains something else.
    """
    from safetensors.torch import save_file

    with replace_directory(directory, marker=CONFIG_FILE) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / CLASSES_FILE).write_text(classes.to_json(), encoding="utf-8")
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS_FILE)


def _build(
    model_config: Mapping[str, Any],
    preprocessing: Preprocessing,
    path: Path,
    classes: Path | ClassList,
    *,
    source: str,
    device: str | None,
) -> "Classifier":
    import_open_clip()
    import torch

    from guard.classifiers.classifier import Classifier
    from guard.classifiers.weights import open_weights

    class_list = classes if isinstance(classes, ClassList) else ClassList.read(classes)
    target = pick_device(device)
    with open_weights([path]) as weights:
        try:
            # Without memory at first, so that a small file that promises a large model costs nothing.
            with quiet(), torch.device("meta"):
                expected = _model(model_config).state_dict()
            _rename(weights, expected)
            weights.check(expected)
            with quiet():
                model = _model(model_config)
            weights.fill(model.state_dict())
            tokenizer = _tokenizer(model_config["text_cfg"])
        except ModelError:
            raise
        except Exception as error:  # open_clip and timm can raise anything for settings that do not fit each other
            raise ModelError(f"{source} cannot be loaded by open_clip: {first_line(error)}") from error
    return Classifier(model, model_config, tokenizer, preprocessing, class_list, source=source, device=target)


def _model(config: Mapping[str, Any]) -> "torch.nn.Module":
    """The model of a configuration that was checked, with random weights.

    This is what `open_clip.create_model` builds; that function reads the configuration from its file again, and looks
    for weights by itself.
    """
    open_clip = import_open_clip()
    arguments = deepcopy(dict(config))
    if arguments["vision_cfg"].get("timm_model_name"):
        arguments["vision_cfg"]["timm_model_pretrained"] = False  # which would be fetched
    if arguments.get("multimodal_cfg", {}) is None:
        del arguments["multimodal_cfg"]
    if not arguments.pop("custom_text", False):
        return open_clip.CLIP(**arguments)  # type: ignore[no-any-return]
    kind = open_clip.CoCa if "multimodal_cfg" in arguments else open_clip.CustomTextCLIP
    return kind(**arguments)  # type: ignore[no-any-return]


def _rename(weights: "Weights", expected: Mapping[str, "torch.Tensor"]) -> None:
    """Names that open_clip itself writes for the same model: those of a parallel training, and of plain text towers."""
    if all(name.startswith(_PARALLEL) for name in weights.names):
        weights.rename(lambda name: name.removeprefix(_PARALLEL))
    if "positional_embedding" in weights.names and "text.positional_embedding" in expected:
        weights.rename(lambda name: f"text.{name}" if name.startswith(_TEXT) else name)


def _tokenizer(text_config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - open_clip publishes no types
    settings = dict(text_config.get("tokenizer_kwargs") or {})
    return import_open_clip().SimpleTokenizer(context_length=text_config.get("context_length", 77), **settings)
