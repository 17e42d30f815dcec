"""From a path or a hub tag to a classifier. The files are untrusted until this module has looked at them."""

import json
import logging
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.classifiers.classes import ClassList
from guard.classifiers.preprocessing import Preprocessing
from guard.errors import MissingDependencyError, ModelError

if TYPE_CHECKING:
    import torch

    from guard.classifiers.classifier import Classifier

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
CLASSES_FILE = "classes.json"
HUB_PREFIX = "hf-hub:"
MAX_LAYERS, MAX_SIZE = 256, 2**20
"""Largest number of layers, and largest of any other number, in the configuration of a tower."""
_OPEN_CLIP_FILES = [CONFIG_FILE, WEIGHTS_FILE, CLASSES_FILE, "tokenizer*.json", "special_tokens_map.json"]
_HUGGING_FACE_FILES = [
    "config.json", "model*.safetensors", "model.safetensors.index.json", "*processor_config.json", CLASSES_FILE,
    "tokenizer*.json", "vocab.json", "merges.txt", "added_tokens.json",
]  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000
_MAX_CONFIG_BYTES = 1_000_000


def import_open_clip() -> Any:  # noqa: ANN401 - open_clip publishes no types
    """Import open_clip, and explain the way in which that usually fails.

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
    """The device to run on: the one named, else a GPU if torch can use one, else the CPU."""
    import_open_clip()
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def load(model: str, *, classes: Path | ClassList | None = None, device: str | None = None) -> "Classifier":
    """Load a classifier.

    Args:
        model: An open_clip directory (`open_clip_config.json` and `open_clip_model.safetensors`), a Hugging Face
            `CLIPModel` directory (`config.json`, `preprocessor_config.json` and `model.safetensors`, whole or in
            shards), `ARCH::FILE` for a safetensors file of an architecture that open_clip knows by name, or a hub tag
            `hf-hub:OWNER/NAME`, optionally with `@REVISION`, of either kind of directory.
        classes: Class list, or a file of one (`ClassList.read`); default is the `classes.json` beside the weights.
        device: torch device; default is a GPU if there is one.

    Raises:
        ModelError: The model is missing, damaged, a pickle, or asks to run code of its own.
        ClassListError: The class list is missing or unusable.
        ModuleNotFoundError: torch or open_clip is not installed.
        MissingDependencyError: torchvision does not fit torch.
    """
    if model.startswith(HUB_PREFIX):
        return _load_directory(_download(model.removeprefix(HUB_PREFIX)), model, classes, device)
    if "::" in model:
        architecture, _, file = model.partition("::")
        return _load_file(architecture, Path(file), model, classes, device)
    path = Path(model)
    if path.is_dir():
        return _load_directory(path, model, classes, device)
    if path.exists():
        check_weights_file(path)
        raise ModelError(f"{path} is a file; give its architecture too, as ARCH::{path}")
    raise ModelError(f"there is no model {model}: not a directory, not ARCH::FILE, not {HUB_PREFIX}OWNER/NAME")


def check_weights_file(path: Path, *, wanted: str = WEIGHTS_FILE) -> None:
    """Refuse anything that is not a whole safetensors file, judged by its bytes and not by its name.

    Args:
        path: The file.
        wanted: The name that a converted pickle should get.

    Raises:
        ModelError: The file is missing, a pickle, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start[:2] == b"PK" or start[:1] == b"\x80":
                raise ModelError(
                    f"{path} is a pickle, which can run code when it is loaded; convert it on a machine that you can "
                    "throw away: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
                    f"'{wanted}')"
                )
            header_size = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < header_size <= min(_MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"{path} is not a safetensors file, or it is truncated ({size} bytes)")
            header = json.loads(file.read(header_size))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
        expected = 8 + header_size + max(ends, default=0)
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file: its header is damaged") from error
    if expected != size:
        raise ModelError(f"{path} is truncated or has a tail: it has {size} bytes, its header promises {expected}")


def _download(tag: str) -> Path:
    """Fetch the files of a hub model that guard reads, and no others; a file in the cache is not fetched again."""
    import_open_clip()
    from huggingface_hub import snapshot_download

    repository, _, revision = tag.partition("@")
    try:
        # Many repositories hold both forms; the second is fetched only where the first is not there.
        for patterns in (_OPEN_CLIP_FILES, _HUGGING_FACE_FILES):
            directory = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
            if (directory / CONFIG_FILE).is_file():
                break
    except Exception as error:  # the hub client raises dozens of types, all of which mean this
        raise ModelError(f"cannot fetch {HUB_PREFIX}{tag}: {error}") from error
    return directory


def _load_directory(directory: Path, source: str, classes: Path | ClassList | None, device: str | None) -> "Classifier":
    if not (directory / CONFIG_FILE).is_file():
        if (directory / "config.json").is_file():
            import_open_clip()
            from guard.classifiers.hugging_face.weights import load_hugging_face

            return load_hugging_face(directory, source, classes, device)
        raise ModelError(
            f"{directory} is no model: it has neither the {CONFIG_FILE} of open_clip nor the config.json of a CLIPModel"
        )
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


def missing_weights(directory: Path, name: str) -> ModelError:
    """The error for a directory without its weights.

    Raises:
        ModelError: It has them as a pickle.
    """
    pickles = sorted(path for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        check_weights_file(pickles[0], wanted=name)
    return ModelError(f"{directory} has no {name}")


def _load_file(
    architecture: str, weights: Path, source: str, classes: Path | ClassList | None, device: str | None
) -> "Classifier":
    config = import_open_clip().get_model_config(architecture)
    if config is None:
        raise ModelError(f"open_clip knows no architecture {architecture!r}; `open_clip.list_models()` lists them")
    if classes is None:
        classes = weights.parent / CLASSES_FILE
    return _build(architecture, config, {}, weights, classes, source=source, device=device)


def read_text(path: Path, limit: int = _MAX_CONFIG_BYTES) -> str:
    """An untrusted text file of at most `limit` bytes.

    Raises:
        ModelError: It cannot be read, is larger, or is no UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ModelError(f"{path} is larger than {limit} bytes")
        return data.decode()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is damaged: it is no UTF-8") from error


def read_json(path: Path, limit: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """An untrusted file that holds one JSON object.

    Raises:
        ModelError: As for `read_text`, or it holds something else.
    """
    try:
        document = json.loads(read_text(path, limit))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: it is no JSON") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path} is damaged: it holds no JSON object")
    return document


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    try:
        model_config = config["model_cfg"]
        towers = dict(model_config["vision_cfg"]), dict(model_config["text_cfg"])
        dict(config.get("preprocess_cfg", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no open_clip configuration (model_cfg with vision_cfg and text_cfg)") from error
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
    """From the preprocessing that open_clip resolved for the built model.

    Raises:
        ModelError: It is of a kind that guard does not reproduce exactly.
    """
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode, interpolation = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    # open_clip documents that "random" means bicubic at inference.
    interpolation = "bicubic" if interpolation == "random" else interpolation
    if height != width or mode not in {"shortest", "squash"} or interpolation not in {"bicubic", "bilinear"}:
        raise ModelError(
            f"the model's preprocessing is not supported: size {height}×{width}, resize mode {mode!r}, interpolation "
            f"{interpolation!r}; square inputs with shortest or squash, bicubic or bilinear, are"
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
    except Exception as error:  # whatever a hostile configuration makes open_clip raise
        raise ModelError(f"{source} cannot be loaded by open_clip: {first_line(error)}") from error
    return Classifier(model, model_config, tokenizer, preprocessing, class_list, source=source, device=target)


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip warns on the root logger that no weights were loaded, which is what guard asks of it."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def first_line(error: Exception) -> str:
    """What a foreign error says, short enough for one line."""
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])[:300] if lines else type(error).__name__


def save(
    directory: Path,
    model: "torch.nn.Module",
    config: Mapping[str, Any],
    classes: ClassList,
    *,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write an open_clip directory with its class list; whole or not at all.

    Args:
        directory: Created; replaced if it exists.
        model: An open_clip model.
        config: The document of `open_clip_config.json`: `model_cfg` and `preprocess_cfg`.
        classes: Written as `classes.json`.
        extra: Further files, name → text, such as a record of the training.

    Raises:
        UsageError: `directory` holds something else.
    """
    from safetensors.torch import save_file

    from guard._files import replace_directory

    with replace_directory(directory, marker=CONFIG_FILE) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / CLASSES_FILE).write_text(classes.to_json(), encoding="utf-8")
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS_FILE)
