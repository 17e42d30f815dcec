"""ONNX export of image tower and zero-shot head, kept only if a parity check passes."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guard._files import replace_directory
from guard._types import Floats
from guard.classifiers.classifier import Classifier
from guard.classifiers.digest import sha256
from guard.classifiers.exported import ExportedClassifier
from guard.classifiers.manifest import MANIFEST_FILE, MODEL_FILE, SCHEMA, Manifest
from guard.classifiers.prompts import PromptedClassifier
from guard.classifiers.prompts.learner import FRAME
from guard.classifiers.tokenizer import TextInput
from guard.errors import ExportError, ImageError, first_line

MIN_PARITY_IMAGES = 256
TOLERANCE = 1e-4
"""Largest difference of any component of a normalised embedding, in float32."""


@dataclass(frozen=True)
class ExportParity:
    """How an exported model compares with the model that it was exported from.

    Attributes:
        images: Number of images, or of texts, compared.
        max_difference: Largest absolute difference of an embedding's component.
        agreement: Share of them with the same top class.
    """

    images: int
    max_difference: float
    agreement: float


class _Tower(torch.nn.Module):
    """Image tower and zero-shot head as one graph: the head is a constant, so no text tower is exported."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.visual = classifier.model.visual
        bias = getattr(classifier.model, "logit_bias", None)
        self.bias = 0.0 if bias is None else float(bias)
        self.head: Tensor
        self.register_buffer("head", classifier.logit_scale * classifier.head.cpu().T)
        self.frame: Tensor | None = None
        if isinstance(classifier, PromptedClassifier) and FRAME in classifier.learner.tensors:
            self.frame = classifier.learner.tensors[FRAME].cpu()
        preprocessing = classifier.preprocessing
        self.mean, self.std = (torch.tensor(each).view(3, 1, 1) for each in (preprocessing.mean, preprocessing.std))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.embedded(image)
        return embedding, embedding @ self.head + self.bias

    def embedded(self, image: Tensor) -> Tensor:
        """What the image tower gives, of length 1."""
        found = self.visual(self.framed(image))
        # The tower of a CoCa gives its tokens too.
        return torch.nn.functional.normalize(found[0] if isinstance(found, tuple) else found, dim=-1)

    def framed(self, image: Tensor) -> Tensor:
        """The input with the visual prompt, if there is one."""
        if self.frame is None:
            return image
        pixels = (image * self.std + self.mean + self.frame).clamp(0, 1)
        return (pixels - self.mean) / self.std


class _Prompted(torch.nn.Module):
    """Image tower, meta-net and text tower as one graph: each image has prompts of its own."""

    def __init__(self, classifier: PromptedClassifier) -> None:
        super().__init__()
        self.tower = _Tower(classifier)
        self.text = classifier.model
        self.classifier = classifier
        _ = classifier.words  # made once, and not in the graph: a tokenizer cannot be traced

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = self.tower.embedded(image)
        token = self.classifier.learner.token(images)
        embedding = self.classifier.extended(images, token)
        return embedding, embedding @ self.tower.head + self.tower.bias, token


def export(classifier: Classifier, directory: Path | str, images: Tensor) -> ExportParity:
    """Export a classifier to ONNX; the directory appears only if it agrees with the model on real images.

    Args:
        classifier: A classifier on any device; it is moved to the CPU for the export, and back.
        directory: The directory to write, whole or not at all; an older export is replaced.
        images: uint8, shape [N, 3, H, W], N ≥ 256; both models are compared on them.

    Raises:
        ExportError: The exported model computes different values.
        ImageError: There are too few images for the comparison.
    """
    directory = Path(directory)
    if len(images) < MIN_PARITY_IMAGES:
        raise ImageError(f"the parity check needs at least {MIN_PARITY_IMAGES} images, there are {len(images)}")
    size = classifier.preprocessing.size
    graph, outputs = _graph(classifier)
    shown = Shown("image", torch.zeros(2, 3, size, size), {0: torch.export.Dim("batch")}, graph, tuple(outputs))
    return written(classifier, directory, shown, lambda exported: compare(classifier, exported, images))


@dataclass(frozen=True, eq=False)
class Shown:
    """What is exported, and what torch is shown to trace it with.

    Attributes:
        name: Name of the input.
        example: An input.
        dynamic: The dimensions of the input that may differ.
        graph: What is exported.
        outputs: Names of its outputs.
        text: What the tower reads if it is one of texts.
    """

    name: str
    example: Tensor
    dynamic: dict[int, Any]
    graph: torch.nn.Module
    outputs: tuple[str, ...] = ("embedding", "logits")
    text: TextInput | None = None


def written(
    classifier: Classifier, directory: Path, shown: Shown, compared: Callable[[ExportedClassifier], ExportParity]
) -> ExportParity:
    """Write an export whole or not at all, and only if it agrees with the model.

    Args:
        classifier: The model; it is moved to the CPU for the export, and back.
        directory: The directory to write.
        shown: What is exported.
        compared: Compares the export with the model.

    Raises:
        ExportError: The exported model computes different values, or cannot be exported.
    """
    device = classifier.device
    classifier.to(torch.device("cpu"))
    try:
        with replace_directory(directory, marker=MANIFEST_FILE) as temporary:
            _write(classifier, temporary, shown)
            parity = compared(ExportedClassifier(temporary, gpu=False))
            # Written so that a difference that is no number is not below the tolerance.
            if not (parity.max_difference <= TOLERANCE and parity.agreement >= 1):
                raise ExportError(
                    f"the exported model differs: embeddings by up to {parity.max_difference:.2g} (allowed "
                    f"{TOLERANCE:g}), top class equal on {parity.agreement:.2%} of {parity.images}"
                )
    finally:
        classifier.to(device)
    return parity


def _graph(classifier: Classifier) -> tuple[torch.nn.Module, list[str]]:
    """What is exported, and the names of its outputs."""
    if isinstance(classifier, PromptedClassifier) and classifier.learner.kind == "cocoop":
        return _Prompted(classifier), ["embedding", "logits", "token"]
    return _Tower(classifier), ["embedding", "logits"]


def _write(classifier: Classifier, directory: Path, shown: Shown) -> None:
    import onnxscript  # noqa: F401 - torch's exporter needs it, and fails late and at length without it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        for name in ("torch.onnx", "onnxscript"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                shown.graph.eval(),
                (shown.example,),
                directory / MODEL_FILE,
                input_names=[shown.name],
                output_names=list(shown.outputs),
                dynamic_shapes={shown.name: shown.dynamic},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises dozens of types
            raise ExportError(f"torch cannot export {classifier.source}: {first_line(error)}") from error
    manifest = Manifest(
        SCHEMA,
        classifier.digest.root,
        sha256((directory / MODEL_FILE).read_bytes()),
        classifier.head.shape[-1],
        classifier.preprocessing,
        classifier.classes,
        shown.text,
    )
    (directory / MANIFEST_FILE).write_bytes(manifest.to_json())


def compare(classifier: Classifier, exported: ExportedClassifier, images: Tensor) -> ExportParity:
    """Compare an export with the model that it was made from.

    Args:
        classifier: The model.
        exported: Its export.
        images: uint8, shape [N, 3, H, W], at their resolution.

    Raises:
        ExportError: The export computes a number that is not finite.
    """
    parts = [exported.run(exported.preprocessing.normalise(part.numpy())) for part in images.split(64)]
    return parity(classifier, classifier.embed(images), parts)


def parity(classifier: Classifier, expected: Tensor, parts: Sequence[tuple[Floats, Floats]]) -> ExportParity:
    """Compare what an export computed with the embeddings of the model, shape [N, D].

    Raises:
        ExportError: The export computed a number that is not finite.
    """
    embeddings = np.concatenate([part[0] for part in parts])
    logits = np.concatenate([part[1] for part in parts])
    if not np.isfinite(logits).all():
        raise ExportError("the exported model computes scores that are not finite")
    top = logits.argmax(-1)
    return ExportParity(
        len(expected),
        float(np.abs(embeddings - expected.numpy()).max()),
        float((top == classifier.predict(expected).numpy()).mean()),
    )
