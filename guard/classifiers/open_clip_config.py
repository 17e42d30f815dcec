"""What `open_clip_config.json` may say: every field that open_clip computes with, its type and its bounds.

The list is closed. A name that is not in it is refused, and so is every value that would make open_clip fetch a file,
run code that comes with a model, or ask for more memory than the weights themselves take.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from guard._documents import first_error, read_object
from guard.classifiers.files import MAX_CONFIG_BYTES, MAX_CONTEXT, MAX_LAYERS, MAX_PATCHES, MAX_SIZE
from guard.classifiers.preprocessing import Preprocessing
from guard.errors import ModelError

T = TypeVar("T")
_Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
_Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
_Side = Annotated[int, Field(ge=1, le=4096)]
_Context = Annotated[int, Field(ge=1, le=MAX_CONTEXT)]
_Id = Annotated[int, Field(ge=-1, le=MAX_SIZE)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Number = Annotated[float, Field(ge=-1000, le=1000)]
_Ratio = Annotated[float, Field(gt=0, le=64)]
_Sides = _Side | tuple[_Side, _Side]
_closed = with_config(ConfigDict(extra="forbid"))


def _only(*names: str) -> Callable[[Any], Any]:
    """Refuse every other value, however it is written: null and the empty text say the same as no value."""

    def check(value: Any) -> Any:  # noqa: ANN401 - any value of JSON
        if value and value not in names:
            raise ValueError(f"guard does not support {str(value)[:80]!r}; it would be loaded from elsewhere")
        return value

    return check


@_closed
@dataclass(frozen=True)
class _Activation:
    approximate: Literal["none", "tanh"] = "none"


@_closed
@dataclass(frozen=True)
class _Norm:
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5


@_closed
@dataclass(frozen=True)
class _Cleaning:
    """What a configuration may say about CLIP's own tokenizer; its other settings drop tokens at random."""

    clean: Literal["lower", "whitespace", "canonicalize"] = "lower"


@_closed
@dataclass(frozen=True)
class _Vision:
    layers: _Layers | tuple[_Layers, _Layers, _Layers, _Layers] = 12
    width: _Size = 768
    head_width: _Size = 64
    mlp_ratio: _Ratio = 4.0
    patch_size: _Sides | None = 16  # a ResNet has none
    image_size: _Sides = 224
    ls_init_value: _Number | None = None
    patch_dropout: _Share = 0.0
    attentional_pool: bool | Literal["parallel", "cascade"] = False
    attn_pooler_queries: _Size = 256
    attn_pooler_heads: _Size = 8
    no_ln_pre: bool = False
    pos_embed_type: Literal["learnable", "sin_cos_2d"] = "learnable"
    final_ln_after_pool: bool = False
    pool_type: Literal["tok", "avg", "none"] = "tok"
    output_tokens: bool = False
    act_kwargs: _Activation | None = None
    norm_kwargs: _Norm | None = None
    block_type: Literal["default", "custom"] | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False
    # A name of timm's own list of architectures: others could be fetched, or loaded from a folder.
    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: Literal["", "avg", "avgmax", "max", "token", "map", "abs_attn", "rot_attn"] | None = "avg"
    timm_proj: Literal["", "linear", "mlp", "none"] | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: _Share = 0.0
    timm_drop_path: _Share | None = None

    def __post_init__(self) -> None:
        sides, patches = _pair(self.image_size), _pair(self.patch_size or MAX_SIZE)
        if max(side // patch for side, patch in zip(sides, patches, strict=True)) > MAX_PATCHES:
            raise ValueError(f"an image of {sides} in patches of {patches} has more than {MAX_PATCHES} along a side")


@_closed
@dataclass(frozen=True)
class _Text:
    context_length: _Context = 77
    vocab_size: _Size = 49408
    hf_tokenizer_name: Annotated[str | None, AfterValidator(_only())] = None
    tokenizer_mode: Annotated[str | None, AfterValidator(_only())] = None
    tokenizer_kwargs: _Cleaning | None = None
    width: _Size = 512
    heads: _Size = 8
    layers: _Layers = 12
    mlp_ratio: _Ratio = 4.0
    ls_init_value: _Number | None = None
    embed_cls: bool = False
    pad_id: _Id = 0
    eos_id: _Id = 2
    no_causal_mask: bool = False
    final_ln_after_pool: bool = False
    pool_type: Literal["first", "last", "argmax", "eos", "none"] = "argmax"
    proj_bias: bool = False
    proj_type: Literal["linear", "none"] = "linear"
    output_tokens: bool = False
    act_kwargs: _Activation | None = None
    norm_kwargs: _Norm | None = None
    block_type: Literal["default", "custom"] | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False
    hf_model_name: Annotated[str | None, AfterValidator(_only())] = None
    hf_model_pretrained: bool = False
    hf_proj_type: str | None = None
    hf_pooler_type: str | None = None


@_closed
@dataclass(frozen=True)
class _Decoder(_Text):
    """The text decoder of a CoCa, which is loaded and never run."""

    dim_head: _Size = 64
    n_queries: _Size = 256
    attn_pooler_heads: _Size = 8


@_closed
@dataclass(frozen=True)
class OpenClipConfig:
    """The fields of `model_cfg`."""

    embed_dim: _Size
    vision_cfg: _Vision
    text_cfg: _Text
    quick_gelu: bool = False
    custom_text: bool = False
    init_logit_scale: _Number = 0.0
    init_logit_bias: _Number | None = None
    nonscalar_logit_scale: bool = False
    multimodal_cfg: _Decoder | None = None

    def __post_init__(self) -> None:
        if self.multimodal_cfg is None and (self.vision_cfg.output_tokens or self.text_cfg.output_tokens):
            raise ValueError("output_tokens is for a CoCa; the towers of a CLIP give one embedding")
        if self.multimodal_cfg is not None and not self.custom_text:
            raise ValueError("multimodal_cfg is for a CoCa, which has custom_text")


@_closed
@dataclass(frozen=True)
class OpenClipPreprocessing:
    """The fields of `preprocess_cfg`. Where one is missing, its default is open_clip's; it cannot be null."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    size: _Sides | None = None
    mode: Literal["RGB"] = "RGB"
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    fill_color: int | tuple[int, ...] = 0  # of the resize mode `longest`, which is not supported


@_closed
@dataclass(frozen=True)
class _Document:
    model_cfg: OpenClipConfig
    preprocess_cfg: OpenClipPreprocessing = OpenClipPreprocessing()


def read_config(path: Path) -> tuple[dict[str, Any], Preprocessing]:
    """Read `open_clip_config.json`: its `model_cfg` as it is written, and the preprocessing.

    Raises:
        ModelError: The file is damaged, or asks for something that guard does not do.
    """
    document = read_object(path, MAX_CONFIG_BYTES, ModelError)
    # Names beside these two describe where a model comes from, such as its licence.
    parts = {name: document[name] for name in ("model_cfg", "preprocess_cfg") if name in document}
    checked = _validated(path, _Document, parts)
    _check_tower(path, checked.model_cfg)
    return dict(document["model_cfg"]), _preprocessing(path, checked.preprocess_cfg, checked.model_cfg)


def check_config(source: str, config: Mapping[str, Any]) -> int:
    """Make sure that guard can build a `model_cfg`.

    Returns:
        Side of the image tower's input, in pixels.

    Raises:
        ModelError: It asks for something that guard does not do.
    """
    checked = _validated(source, OpenClipConfig, dict(config))
    _check_tower(source, checked)
    return _side(source, checked)


def _validated(source: object, form: type[T], value: object) -> T:
    try:
        # Strictly, and as JSON: only there a list may stand for a tuple.
        return TypeAdapter(form).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:  # not necessarily damaged: it may be a model that guard does not support
        raise ModelError(f"{source} is refused: {_bound(error) or first_error(error)}") from error


def _bound(error: ValidationError) -> str | None:
    """The first number that is out of its bounds: where several forms are possible, the other errors say less."""
    for each in error.errors(include_url=False):
        for name, words in (("le", "at most"), ("ge", "at least")):
            if name in (bounds := each.get("ctx", {})):
                where = ".".join(part for part in each["loc"] if isinstance(part, str) and part.isidentifier())
                return f"{where} is {str(each['input'])[:40]}; {words} {bounds[name]} is accepted"
    return None


def _check_tower(path: object, config: OpenClipConfig) -> None:
    if (name := config.vision_cfg.timm_model_name) is None:
        return
    import timm

    if name not in timm.list_models():
        raise ModelError(
            f"{path} takes its image tower from {name[:80]!r}, which is none of the architectures that timm has by "
            "itself; refused"
        )


def _preprocessing(path: Path, found: OpenClipPreprocessing, config: OpenClipConfig) -> Preprocessing:
    side = _side(path, config)
    if found.size is not None and _pair(found.size) != (side, side):
        raise ModelError(
            f"{path} contradicts itself: preprocess_cfg.size is {found.size}, and the image tower's image_size {side}"
        )
    # open_clip documents that "random" means bicubic at inference.
    interpolation = "bicubic" if found.interpolation == "random" else found.interpolation
    try:
        return Preprocessing(side, found.mean, found.std, interpolation, found.resize_mode)
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: preprocess_cfg: {error}") from error


def _side(source: object, config: OpenClipConfig) -> int:
    height, width = _pair(config.vision_cfg.image_size)
    if height != width:
        raise ModelError(f"{source} describes images of {height}×{width} pixels; guard supports square ones")
    return height


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
