"""Read and write classifiers in open_clip's own forms. Imports without torch and open_clip until they are needed."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard._documents import read_object
from guard._files import replace_directory
from guard.classifiers.classes import ClassList
from guard.classifiers.files import (
    CLASSES_FILE,
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_LAYERS,
    MAX_SIZE,
    WEIGHTS_FILE,
    check_weights_file,
    missing_weights,
)
from guard.classifiers.preprocessing import Preprocessing
from guard.errors import MissingDependencyError, ModelError, first_line

if TYPE_CHECKING:
    import torch

    from guard.classifiers.classifier import Classifier


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
        ModelError: The model is missing, damaged, a pickle, or asks to run code of its own.
    """
    if not (directory / WEIGHTS_FILE).is_file():
        raise missing_weights(directory, WEIGHTS_FILE)
    config = _read_config(directory / CONFIG_FILE)
    return _build(
        f"local-dir:{directory}",
        config["model_cfg"],
        config.get("preprocess_cfg", {}),
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
        ModelError: The architecture is unknown, or the file is missing, damaged or a pickle.
    """
    config = import_open_clip().get_model_config(architecture)
    if config is None:
        raise ModelError(f"open_clip knows no architecture {architecture!r}; `open_clip.list_models()` lists them")
    return _build(
        architecture, config, {}, weights, classes or weights.parent / CLASSES_FILE, source=source, device=device
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


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path, MAX_CONFIG_BYTES, ModelError)
    try:
        model_config = config["model_cfg"]
        towers = dict(model_config["vision_cfg"]), dict(model_config["text_cfg"])
        dict(config.get("preprocess_cfg", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} has no model_cfg with vision_cfg and text_cfg, which open_clip needs") from error
    _refuse_foreign_code(path, towers)
    _refuse_absurd_sizes(path, towers)
    return config


def _refuse_foreign_code(path: Path, towers: tuple[Mapping[str, Any], ...]) -> None:
    """A configuration may name towers that are fetched from elsewhere, or code to run; guard follows neither."""
    for tower in towers:
        if tower.get("hf_model_name"):
            raise ModelError(f"{path} takes its text tower from {tower['hf_model_name']!r}; that is not supported")
        if str(tower.get("timm_model_name", "")).startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            raise ModelError(f"{path} takes its image tower from {tower['timm_model_name']!r}; refused")
        if set(tower.get("tokenizer_kwargs", {})) - {"clean", "reduction_mask", "additional_special_tokens"}:
            raise ModelError(f"{path} sets tokenizer_kwargs that can load other files or run code; refused")


def _refuse_absurd_sizes(path: Path, towers: tuple[Mapping[str, Any], ...]) -> None:
    """A configuration of a few bytes must not ask for more memory than any machine has."""
    for tower in towers:
        for name, value in tower.items():
            limit = MAX_LAYERS if name == "layers" else MAX_SIZE
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not 0 <= number <= limit:
                    raise ModelError(f"{path} sets {name} to {number}; at most {limit} is accepted")


def _preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing that open_clip resolved for the model that it built.

    Raises:
        ModelError: guard does not reproduce this kind of preprocessing exactly.
    """
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode, interpolation = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    # open_clip documents that "random" means bicubic at inference.
    interpolation = "bicubic" if interpolation == "random" else interpolation
    if height != width or mode not in {"shortest", "squash"} or interpolation not in {"bicubic", "bilinear"}:
        raise ModelError(
            f"the model's preprocessing is not supported: size {height}×{width}, resize mode {mode!r}, interpolation "
            f"{interpolation!r}; guard supports square inputs, shortest or squash, and bicubic or bilinear"
        )
    mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
    return Preprocessing(height, mean, std, interpolation, mode)  # type: ignore[arg-type]  # lengths checked by use


def _build(
    name: str,
    model_config: Mapping[str, Any],
    preprocess_config: Mapping[str, Any],
    weights: Path,
    classes: Path | ClassList,
    *,
    source: str,
    device: str | None,
) -> "Classifier":
    open_clip = import_open_clip()
    from guard.classifiers.classifier import Classifier

    check_weights_file(weights)
    class_list = classes if isinstance(classes, ClassList) else ClassList.read(classes)
    target = pick_device(device)
    try:
        with quiet():
            model = open_clip.create_model(
                name, load_weights=False, pretrained_text=False, force_preprocess_cfg=dict(preprocess_config)
            )
            open_clip.load_checkpoint(model, str(weights))
            tokenizer = open_clip.get_tokenizer(name)
        preprocessing = _preprocessing(open_clip.get_model_preprocess_cfg(model))
    except ModelError:
        raise
    except Exception as error:  # a hostile configuration can make open_clip raise anything
        raise ModelError(f"{source} cannot be loaded by open_clip: {first_line(error)}") from error
    return Classifier(model, model_config, tokenizer, preprocessing, class_list, source=source, device=target)
