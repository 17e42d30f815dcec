"""ONNX export of a text tower, kept only if a parity check passes, and the tokenizer that goes with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.classifiers.exported import LENGTH, ExportedClassifier
from guard.classifiers.exporting import MIN_PARITY_IMAGES, ExportParity, Shown, parity, written
from guard.classifiers.text_tower import TextTower
from guard.classifiers.tokenizer import Cleaning, TextInput, Tokenizer
from guard.errors import ExportError, ModelError, UsageError

_BATCH = 64


class _Tower(torch.nn.Module):
    """Text tower and head as one graph: the head is a constant."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.tower, self.model = TextTower(classifier), classifier.model
        bias = getattr(classifier.model, "logit_bias", None)
        self.bias = 0.0 if bias is None else float(bias)
        self.head: Tensor
        self.register_buffer("head", classifier.logit_scale * classifier.head.cpu().T)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        # Not by `embed`: a torch.nn.Embedding becomes a value named "embedding", as the output is.
        hidden = self.tower.table[text] + self.tower.positions(text.shape[1])
        embedding = self.tower.pooled(self.tower.features(hidden), self.tower.ends(text))
        return embedding, embedding @ self.head + self.bias


def export_text(classifier: Classifier, directory: Path | str, texts: Sequence[str]) -> ExportParity:
    """Export the text tower of a classifier to ONNX; the directory appears only if it agrees with the model.

    Args:
        classifier: A classifier on any device; it is moved to the CPU for the export, and back.
        directory: The directory to write, whole or not at all; an older export is replaced.
        texts: At least 256 different texts; tokenizers and towers are compared on them.

    Raises:
        ExportError: The exported tower, or its tokenizer, computes different values.
        ModelError: The text tower or its tokenizer is of a kind that guard cannot serve.
        UsageError: There are too few texts for the comparison.
        MissingDependencyError: ftfy or regex is not installed.
    """
    if classifier.prompts_per_image:
        raise ModelError(
            f"{classifier.source} has a CoCoOp prompt learner, whose prompts follow from an image, so that texts have "
            "no class scores; export its towers without the learner"
        )
    texts = list(dict.fromkeys(texts))
    if len(texts) < MIN_PARITY_IMAGES:
        raise UsageError(f"the parity check needs at least {MIN_PARITY_IMAGES} different texts, there are {len(texts)}")
    form = text_input(classifier)
    tokenizer = Tokenizer(form)
    expected = classifier.tokenizer(texts)
    if not (torch.from_numpy(tokenizer.read(texts)) == expected).all():
        raise ExportError(f"guard's tokenizer gives other ids than that of {classifier.source}")
    example = expected[:2]
    dynamic = {0: torch.export.Dim("batch")}
    if form.trimmed:
        dynamic[1] = torch.export.Dim(LENGTH, max=form.context)

    def compared(exported: ExportedClassifier) -> ExportParity:
        parts = [exported.run(part.numpy()) for part in expected.split(_BATCH)]
        return parity(classifier, TextTower(classifier).encode(texts).cpu(), parts)

    shown = Shown("text", example, dynamic, _Tower(classifier), text=form)
    return written(classifier, Path(directory), shown, compared)


def text_input(classifier: Classifier) -> TextInput:
    """What the text tower of a classifier reads.

    Raises:
        ModelError: The tower or its tokenizer is of a kind that guard cannot serve.
    """
    tower, tokenizer = TextTower(classifier), cast("Any", classifier.tokenizer)
    settings = classifier.config.get("text_cfg", {}).get("tokenizer_kwargs") or {}
    cleaning, ranks = settings.get("clean", "lower"), getattr(tokenizer, "bpe_ranks", {})
    known = bool(ranks) and cleaning in get_args(Cleaning) and len(tokenizer.encoder) <= len(tower.table)
    if not known or not tower.read_at_end:
        raise ModelError(
            f"the text tower of {classifier.source} has another tokenizer than CLIP's, or is not read at the end of a "
            "text; guard serves no such tower"
        )
    merges = tuple(" ".join(pair) for pair in sorted(ranks, key=ranks.__getitem__))
    return TextInput(tower.context, tower.trimmed, cleaning, merges)
