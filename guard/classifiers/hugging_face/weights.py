"""Hugging Face `CLIPModel` directories: the same weights under other names, without transformers.

The names and shapes are those of transformers' `models/clip/modeling_clip.py`; a test compares the computed values with
those of that code.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from guard._documents import read_document
from guard._files import replace_directory
from guard.classifiers.classes import ClassList
from guard.classifiers.classifier import Classifier
from guard.classifiers.files import CLASSES_FILE, missing_weights
from guard.classifiers.hugging_face.config import (
    HF_CONFIG_FILE,
    PREPROCESSOR_FILE,
    HuggingFaceConfig,
    preprocessor_document,
    read_preprocessing,
)
from guard.classifiers.hugging_face.tokenizer import check_tokenizer, tokenizer_files
from guard.classifiers.open_clip import import_open_clip, pick_device, quiet
from guard.classifiers.weights import open_weights
from guard.errors import ModelError, first_line

HF_WEIGHTS_FILE = "model.safetensors"
HF_INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES, _MAX_SHARDS = 16_000_000, 200
_BUFFERS = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
"""0, 1, 2, …: stored by old releases, never read."""

_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # the typing error is theirs
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


@dataclass(frozen=True)
class _Index:
    """`model.safetensors.index.json`: which file each tensor is in."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def load_hugging_face(directory: Path, source: str, classes: Path | ClassList | None, device: str | None) -> Classifier:
    """Load a `CLIPModel` directory; see `guard.classifiers.load`.

    Raises:
        ModelError: The model is missing, damaged, a pickle, or one that open_clip would compute differently.
    """
    files = _weights_files(directory)
    config = HuggingFaceConfig.read(directory / HF_CONFIG_FILE)
    preprocessing = read_preprocessing(directory, config.vision_config.image_size)
    check_tokenizer(directory)
    class_list = classes if isinstance(classes, ClassList) else ClassList.read(classes or directory / CLASSES_FILE)
    target = pick_device(device)
    model_config = config.to_open_clip()
    open_clip = import_open_clip()
    with open_weights(files, ignored=_BUFFERS) as weights:
        try:
            # Without memory at first, so that a small file that promises a large model costs nothing.
            with quiet(), torch.device("meta"):
                expected = dict(_views(open_clip.CLIP(**model_config).state_dict()))
            weights.check(expected)
            with quiet():
                model: torch.nn.Module = open_clip.CLIP(**model_config)
            weights.fill(dict(_views(model.state_dict())))
        except ModelError:
            raise
        except Exception as error:  # a hostile configuration can make open_clip raise anything
            raise ModelError(f"{source} cannot be loaded by open_clip: {first_line(error)}") from error
    tokenizer = open_clip.SimpleTokenizer(context_length=config.text_config.max_position_embeddings)
    return Classifier(model, model_config, tokenizer, preprocessing, class_list, source=source, device=target)


def save_hugging_face(directory: Path, classifier: Classifier) -> None:
    """Write a classifier as a `CLIPModel` directory with its class list, whole or not at all.

    `transformers.CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` load it, and so does `load`, with the
    same digest. Tensors are written in float32.

    Args:
        directory: The directory to write; an older directory of this kind is replaced.
        classifier: Its towers must be plain transformers; `CLIPModel` cannot express a ResNet or a timm tower.

    Raises:
        ModelError: `CLIPModel` cannot express the model.
        UsageError: `directory` contains something else.
    """
    config = HuggingFaceConfig.from_open_clip(classifier.config)
    documents = {
        HF_CONFIG_FILE: config.to_document(),
        PREPROCESSOR_FILE: preprocessor_document(classifier.preprocessing),
    }
    texts = {name: json.dumps(document, indent=2) + "\n" for name, document in documents.items()}
    texts |= tokenizer_files(config.text_config.max_position_embeddings)
    texts[CLASSES_FILE] = classifier.classes.to_json()
    # A copy of each, because safetensors refuses tensors that share memory.
    tensors = {
        name: view.to("cpu", torch.float32, copy=True).contiguous()
        for name, view in _views(classifier.model.state_dict())
    }
    with replace_directory(directory, marker=PREPROCESSOR_FILE) as temporary:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        save_file(tensors, temporary / HF_WEIGHTS_FILE, metadata={"format": "pt"})


def _views(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an open_clip `CLIP` as Hugging Face names and shapes them.

    They are views: copying into one changes the model.

    Raises:
        ModelError: The model has a tensor that `CLIPModel` does not have.
    """
    for name, tensor in state.items():
        if name in {"text_projection", "visual.proj"}:  # open_clip multiplies from the other side
            yield _NAMES[name], tensor.T
        elif name in _NAMES:
            yield _NAMES[name], tensor
        elif match := _BLOCK.fullmatch(name):
            tower, layer, part, kind = match.groups()
            prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}"
            if part == "attn.in_proj":
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{prefix}.self_attn.{letter}_proj.{kind}", third
            elif part in _PARTS:
                yield f"{prefix}.{_PARTS[part]}.{kind}", tensor
            else:
                raise ModelError(f"CLIPModel cannot express this model: it has no place for {name}")
        else:
            raise ModelError(f"CLIPModel cannot express this model: it has no place for {name}")


def _weights_files(directory: Path) -> list[Path]:
    """The safetensors files: one file, or the shards that an index names."""
    if (directory / HF_WEIGHTS_FILE).is_file():
        files = [directory / HF_WEIGHTS_FILE]
    elif (directory / HF_INDEX_FILE).is_file():
        index = directory / HF_INDEX_FILE
        names = sorted(set(read_document(index, _Index, _MAX_INDEX_BYTES, ModelError).weight_map.values()))
        if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ModelError(f"{index} names {outside[0][:80]!r}, which is not a safetensors file beside it; refused")
        if len(names) > _MAX_SHARDS:
            raise ModelError(f"{index} names {len(names)} files; at most {_MAX_SHARDS} are accepted")
        files = [directory / name for name in names]
    else:
        raise missing_weights(directory, HF_WEIGHTS_FILE)
    return files
