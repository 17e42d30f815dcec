"""`config.json` and `preprocessor_config.json` of a Hugging Face `CLIPModel`, converted from and to open_clip's."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from guard._documents import first_error, read_object
from guard.classifiers.files import MAX_CONFIG_BYTES, MAX_LAYERS, MAX_SIZE
from guard.classifiers.open_clip import import_open_clip
from guard.classifiers.preprocessing import RESAMPLING, Preprocessing
from guard.errors import ModelError

HF_CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
_END_OF_TEXT: Literal[49407] = 49407
_EPSILON = 1e-5

_PROCESSOR_DEFAULTS: Mapping[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": None,
    "image_std": None,
}
"""Fields of an image processor that change an image, and transformers' values where they are missing."""

_Size = Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE)]
_Layers = Annotated[int, Field(strict=True, ge=1, le=MAX_LAYERS)]
_Epsilon = Annotated[float, Field(gt=0, lt=1)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Channels = tuple[_Finite, _Finite, _Finite]
_Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True)
class TextConfig:
    """The fields of `text_config` that affect the computation; the defaults are those of transformers."""

    hidden_size: _Size = 512
    intermediate_size: _Size = 2048
    num_hidden_layers: _Layers = 12
    num_attention_heads: _Size = 8
    max_position_embeddings: _Size = 77
    # open_clip's tokenizer, which guard uses, has no other vocabulary.
    vocab_size: Literal[49408] = 49408
    hidden_act: _Activation = "quick_gelu"
    layer_norm_eps: _Epsilon = _EPSILON
    # Which position gives the text's embedding: with 2, the old form, that of the largest id; otherwise that of the
    # first end of text. With this tokenizer both are the same position, which is the one that open_clip uses.
    eos_token_id: Literal[2, 49407] = _END_OF_TEXT


@dataclass(frozen=True)
class VisionConfig:
    """The fields of `vision_config` that affect the computation; the defaults are those of transformers."""

    hidden_size: _Size = 768
    intermediate_size: _Size = 3072
    num_hidden_layers: _Layers = 12
    num_attention_heads: _Size = 12
    num_channels: Literal[3] = 3
    image_size: _Size = 224
    patch_size: _Size = 32
    hidden_act: _Activation = "quick_gelu"
    layer_norm_eps: _Epsilon = _EPSILON


@dataclass(frozen=True)
class HuggingFaceConfig:
    """The fields of `config.json` that affect the computation.

    Raises:
        ValueError: The parts do not fit each other.
    """

    projection_dim: _Size = 512
    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    model_type: Literal["clip"] = "clip"

    def __post_init__(self) -> None:
        for tower in (self.text_config, self.vision_config):
            if tower.hidden_size % tower.num_attention_heads:
                raise ValueError(
                    f"a width of {tower.hidden_size} cannot be divided among {tower.num_attention_heads} heads"
                )
        if self.vision_config.patch_size > self.vision_config.image_size:
            raise ValueError("patches are larger than the image")
        if self.text_config.hidden_act != self.vision_config.hidden_act:
            raise ValueError("the towers differ in hidden_act, which open_clip cannot express")

    @classmethod
    def read(cls, path: Path) -> "HuggingFaceConfig":
        """Read `config.json`.

        Raises:
            ModelError: The file is damaged, or describes a model that open_clip cannot compute.
        """
        document = read_object(path, MAX_CONFIG_BYTES, ModelError)
        model_type, architectures = document.get("model_type"), document.get("architectures")
        if model_type != "clip" or architectures not in (None, ["CLIPModel"]):
            raise ModelError(
                f"{path} describes a model of type {str(model_type)[:40]!r}, architectures {str(architectures)[:80]}; "
                "of Hugging Face's models, guard loads CLIPModel, type 'clip'"
            )
        if document.get("auto_map"):
            raise ModelError(f"{path} names code of its own (auto_map); refused")
        for name in ("text_config", "vision_config"):
            # The form of the first releases: where it is present, transformers uses it and its defaults.
            older = document.get(f"{name}_dict")
            document[name] = (document.get(name) or {}) if older is None else older
        try:
            return TypeAdapter(cls).validate_python(document)
        except ValidationError as error:  # not necessarily damaged: it may be a model that guard does not support
            raise ModelError(f"{path} cannot be used: {first_error(error)}") from error

    def to_document(self) -> dict[str, Any]:
        """The content of `config.json`, as transformers reads it."""
        document = asdict(self) | {"architectures": ["CLIPModel"]}
        for name in ("text_config", "vision_config"):
            document[name] |= {"model_type": f"clip_{name.removesuffix('_config')}_model"}
            document[name] |= {"projection_dim": self.projection_dim}
        document["text_config"] |= {"bos_token_id": _END_OF_TEXT - 1, "pad_token_id": _END_OF_TEXT}
        return document

    def to_open_clip(self) -> dict[str, Any]:
        """open_clip's `model_cfg`; values that are open_clip's defaults are left out, as in its own configurations."""
        text, vision = self.text_config, self.vision_config
        head_width = vision.hidden_size // vision.num_attention_heads
        return {
            "embed_dim": self.projection_dim,
            "vision_cfg": {
                "image_size": vision.image_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                **({"head_width": head_width} if head_width != 64 else {}),
                "patch_size": vision.patch_size,
                **_optional(vision),
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                **_optional(text),
            },
            **({"quick_gelu": True} if text.hidden_act == "quick_gelu" else {}),
        }

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> "HuggingFaceConfig":
        """The Hugging Face configuration of an open_clip model.

        Args:
            config: The `model_cfg` of a model that was built.

        Raises:
            ModelError: `CLIPModel` cannot express the model, because its towers are not plain transformers.
        """
        open_clip = import_open_clip()
        vision, text = open_clip.CLIPVisionCfg(**config["vision_cfg"]), open_clip.CLIPTextCfg(**config["text_cfg"])
        known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}
        foreign = [name for name, value in config.items() if name not in known and value]
        foreign += _foreign(vision, {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"})
        foreign += _foreign(text, {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"})
        if not isinstance(vision.layers, int):
            foreign.append("layers of a ResNet")
        if foreign:
            raise ModelError(f"CLIPModel has plain transformers only, and cannot express this model: {foreign[0]}")
        act: _Activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
        try:
            return TypeAdapter(cls).validate_python(
                {
                    "projection_dim": config["embed_dim"],
                    "text_config": {
                        "hidden_size": text.width,
                        "intermediate_size": int(text.width * text.mlp_ratio),
                        "num_hidden_layers": text.layers,
                        "num_attention_heads": text.heads,
                        "max_position_embeddings": text.context_length,
                        "vocab_size": text.vocab_size,
                        "hidden_act": act,
                        "layer_norm_eps": (text.norm_kwargs or {}).get("eps", _EPSILON),
                    },
                    "vision_config": {
                        "hidden_size": vision.width,
                        "intermediate_size": int(vision.width * vision.mlp_ratio),
                        "num_hidden_layers": vision.layers,
                        "num_attention_heads": vision.width // vision.head_width,
                        "image_size": _side(vision.image_size),
                        "patch_size": _side(vision.patch_size),
                        "hidden_act": act,
                        "layer_norm_eps": (vision.norm_kwargs or {}).get("eps", _EPSILON),
                    },
                    "model_type": "clip",
                }
            )
        except ValidationError as error:
            raise ModelError(f"CLIPModel cannot express this model: {first_error(error)}") from error


def _optional(tower: TextConfig | VisionConfig) -> dict[str, Any]:
    """The settings that both towers have, where they are not open_clip's defaults."""
    ratio = tower.intermediate_size / tower.hidden_size
    if int(tower.hidden_size * ratio) < tower.intermediate_size:  # open_clip multiplies and rounds down
        ratio = math.nextafter(ratio, math.inf)
    settings: dict[str, Any] = {}
    if ratio != 4:
        settings["mlp_ratio"] = ratio
    if tower.layer_norm_eps != _EPSILON:
        settings["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return settings


def _foreign(tower: Any, expressed: set[str]) -> list[str]:  # noqa: ANN401 - a dataclass of open_clip's
    """Settings that `CLIPModel` cannot express and that are not open_clip's defaults."""
    # They matter in training only, or with other settings that are refused here.
    unused = {"patch_dropout", "pad_id", "eos_id"}
    foreign = []
    for setting in fields(tower):
        value = getattr(tower, setting.name)
        plain = setting.name in expressed | unused or (value or None) == (setting.default or None)
        if setting.name == "norm_kwargs":
            plain = not set(value or {}) - {"eps"}
        if not plain:
            foreign.append(f"{setting.name} {str(value)[:80]!r}")
    return foreign


def _side(size: object) -> object:
    """The side of a square that may be given as two numbers; anything else is left for the validation to refuse."""
    return size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size


def _image_processor(directory: Path) -> tuple[Path, dict[str, Any]]:
    """What a directory says about its image processor, and the file that says so.

    transformers has written it to a file of its own, later to the file of the whole processor, and reads the latter
    first. A file that is left over from before a tuning says something else; which of the two the model was trained
    with, the directory does not say.

    Raises:
        ModelError: There is no image processor, or there are two that differ.
    """
    old, new = directory / PREPROCESSOR_FILE, directory / PROCESSOR_FILE
    found: dict[Path, Any] = {}
    if new.is_file():
        whole = read_object(new, MAX_CONFIG_BYTES, ModelError)
        if "image_processor" in whole:
            found[new] = whole["image_processor"]
    if old.is_file():
        found[old] = read_object(old, MAX_CONFIG_BYTES, ModelError)
    if not found:
        raise ModelError(
            f"{directory} has no {PREPROCESSOR_FILE}, which says how images are scaled and normalised; copy the one of "
            "the model that this was tuned from"
        )
    for path, document in found.items():
        if not isinstance(document, dict):
            raise ModelError(f"{path} does not describe an image processor")
    if len(found) > 1 and _effective(found[old]) != _effective(found[new]):
        raise ModelError(
            f"{directory} has two image processors that differ, in {old.name} and {new.name}; delete the one that "
            "is not the model's"
        )
    return next(iter(found.items()))


def _effective(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change an image, with the values that they have where they are missing."""
    return {name: document.get(name, default) for name, default in _PROCESSOR_DEFAULTS.items()}


def read_preprocessing(directory: Path, size: int) -> Preprocessing:
    """The preprocessing of a `CLIPModel` directory.

    guard computes it as open_clip does (`Preprocessing`). transformers' own processor rounds the corner of the centre
    crop down where open_clip rounds it to even, converts to RGB before it resizes, and in its newest form resizes with
    torch instead of Pillow; on the same photograph, pixels can therefore differ slightly.

    Args:
        directory: It contains `preprocessor_config.json`, or `processor_config.json` with an `image_processor`.
        size: Side of the image tower's input.

    Raises:
        ModelError: Neither file exists, they differ, or they ask for preprocessing that guard does not reproduce.
    """
    path, document = _image_processor(directory)
    square, default = {"height": size, "width": size}, {"height": 224, "width": 224}
    crops = document.get("do_center_crop", True)
    cropped = crops and document.get("crop_size", default) in (size, square)
    scaled = document.get("size", {"shortest_edge": 224})
    mode: Literal["shortest", "squash"] | None = None
    if cropped and scaled in (size, {"shortest_edge": size}):
        mode = "shortest"
    elif scaled == square and (cropped or not crops):
        mode = "squash"
    filters = [name for name, number in RESAMPLING.items() if number == document.get("resample", 3)]
    whole = all(document.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize"))
    if mode is None or not filters or not whole or not _is_byte(document.get("rescale_factor", 1 / 255)):
        raise ModelError(
            f"{path} asks for preprocessing that is not supported; guard supports a resize (bicubic or bilinear) to "
            f"the tower's {size} pixels, a crop to the same size, a division by 255 and a normalisation"
        )
    try:
        mean, std = (TypeAdapter(_Channels).validate_python(document.get(name)) for name in ("image_mean", "image_std"))
        return Preprocessing(size, mean, std, filters[0], mode)
    except ValueError as error:
        raise ModelError(
            f"{path} needs image_mean and image_std of three finite numbers each, and every std above 0"
        ) from error


def _is_byte(factor: object) -> bool:
    return isinstance(factor, int | float) and math.isclose(factor, 1 / 255)


def preprocessor_document(preprocessing: Preprocessing) -> dict[str, Any]:
    """The content of `preprocessor_config.json`."""
    square = {"height": preprocessing.size, "width": preprocessing.size}
    squash = preprocessing.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": preprocessing.size},
        "resample": RESAMPLING[preprocessing.interpolation],
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing.mean,
        "image_std": preprocessing.std,
    }
