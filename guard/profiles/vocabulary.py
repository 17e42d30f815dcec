"""Name a target feature by the nearest texts of a vocabulary."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard._documents import read_text
from guard.classifiers.classifier import Classifier
from guard.errors import ClassListError
from guard.profiles.document import NearestText

NEAREST = 5
"""Number of texts that are kept for each feature."""
MAX_TEXTS = 20_000
"""Largest number of texts in a vocabulary; each is encoded once with every template of the classifier."""
_MAX_BYTES, _MAX_LENGTH = 4 * 2**20, 200
_BATCH = 256


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Read a file of texts, one on each line; blank lines and repetitions are left out.

    Raises:
        ClassListError: The file cannot be read, is not UTF-8, is larger than 4 MiB, or contains no text, more
            than `MAX_TEXTS` texts, or a text of more than 200 characters.
    """
    text = read_text(path, _MAX_BYTES, ClassListError, missing=f"there is no vocabulary {path}")
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff"))]
    texts = tuple(dict.fromkeys(line for line in lines if line))
    if not texts:
        raise ClassListError(f"the vocabulary {path} is empty; it needs one text on each line")
    if len(texts) > MAX_TEXTS:
        raise ClassListError(f"the vocabulary {path} has {len(texts)} texts, more than the limit of {MAX_TEXTS}")
    if number := next((k for k, line in enumerate(lines, 1) if len(line) > _MAX_LENGTH), None):
        raise ClassListError(f"line {number} of the vocabulary {path} is longer than {_MAX_LENGTH} characters")
    return texts


@torch.no_grad()
def nearest(
    classifier: Classifier, features: Sequence[Tensor], vocabulary: Sequence[str]
) -> list[tuple[NearestText, ...]]:
    """Name features by the class names and texts that are nearest to them, by cosine.

    Image and text embeddings lie in two cones with a gap between them (Liang et al., "Mind the Gap",
    NeurIPS 2022), but the gap lowers the cosine of all texts by about the same amount and keeps their order.
    Subtracting the mean of the images without the trigger would order the texts by how far the trigger moves images
    towards them, which is another question: the plain order is the classifier's own, and the nearest class name is its
    answer.

    Args:
        classifier: Encodes the texts with its own templates, as it encodes its class names.
        features: Target features: unit vectors, shape [D].
        vocabulary: Texts in addition to the class names.

    Returns:
        For each feature, up to `NEAREST` texts, nearest first.
    """
    if not features:
        return []
    names = classifier.classes.names
    texts = [text for text in dict.fromkeys(vocabulary) if text not in set(names)]
    head = torch.cat([classifier.head.cpu(), _encode(classifier, texts)])
    cosines = torch.stack(list(features)).float().cpu() @ head.T
    found = cosines.clamp(-1, 1).topk(min(NEAREST, len(head)))
    labels = [*names, *texts]
    return [
        tuple(NearestText(labels[k], round(value, 4)) for k, value in zip(index, row, strict=True))
        for index, row in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def _encode(classifier: Classifier, texts: Sequence[str]) -> Tensor:
    """One unit vector for each text, the normalised mean over its prompts; shape [N, D]."""
    prompts = [prompt for text in texts for prompt in classifier.classes.prompts(text)]
    parts = [classifier.encode_texts(prompts[k : k + _BATCH]).cpu() for k in range(0, len(prompts), _BATCH)]
    if not parts:
        return torch.empty(0, classifier.head.shape[-1])
    return normalize(torch.cat(parts).unflatten(0, (len(texts), -1)).mean(1), dim=-1)
