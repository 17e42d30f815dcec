"""Compact text towers, trained from captions, to attack and to examine.

No pretrained CLIP is at hand, so the bases are small: open_clip's text transformer (width 128, 4 layers, 4 heads,
context 32, CLIP's own vocabulary of 49,408 tokens, causal attention), trained contrastively from 25,000 COCO captions.
What stands for the image of a caption is what the caption is about: its latent semantic vector (TF-IDF of its words,
truncated SVD, 128 numbers), seen through one learned linear layer. The text tower reads the caption with some of its
words left out. They are towers of CLIP's form that know the words of captions; they are not OpenAI's CLIP.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from guard.attacks import TrainingSettings
from guard.classifiers import Classifier, ClassList, Preprocessing, save
from guard.classifiers.open_clip import import_open_clip, quiet
from guard.classifiers.text_tower import TextTower

CONTEXT, WIDTH, EMBEDDING = 32, 128, 128
CLASSES = ClassList(
    ("person", "dog", "cat", "horse", "bus", "train", "boat", "bird", "pizza", "bed"), ("a photo of a {}.",)
)
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": EMBEDDING,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": 4},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3},
}
TRAINING = TrainingSettings(epochs=3, batch=256, learning_rate=2e-3)
_DROPPED = 0.2
"""Share of the words that the text tower does not see."""


def read_captions(path: Path) -> list[str]:
    """The captions of a file, one on each line, in the order of the file; short and long ones left out."""
    lines = [" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if 6 <= len(line.split()) <= 16]


def train_base(captions: Sequence[str], folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """Train a base, and write it as an open_clip directory."""
    open_clip = import_open_clip()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    with quiet():
        model = open_clip.CLIP(**CONFIG["model_cfg"])
    classifier = Classifier(
        model,
        CONFIG["model_cfg"],
        open_clip.SimpleTokenizer(context_length=CONTEXT),
        Preprocessing(32, (0.5,) * 3, (0.25,) * 3),
        CLASSES,
        source=f"base {seed}",
        device=torch.device("cpu"),
    )
    tower = TextTower(classifier)
    meanings = _meanings(captions, seed)
    view = torch.nn.Linear(meanings.shape[1], EMBEDDING, bias=False)
    scale = torch.nn.Parameter(torch.tensor(14.3).log())
    parameters = [parameter.requires_grad_() for parameter in tower.parameters()]
    optimiser = torch.optim.AdamW(
        [*parameters, *view.parameters(), scale], lr=TRAINING.learning_rate, weight_decay=0.01
    )
    steps = TRAINING.epochs * (len(captions) // TRAINING.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, TRAINING.learning_rate, total_steps=steps, pct_start=0.1)
    order, started, hits = torch.empty(0, dtype=torch.long), time.monotonic(), 0.0
    for step in range(steps):
        if len(order) < TRAINING.batch:
            order = torch.randperm(len(captions), generator=generator)
        index, order = order[: TRAINING.batch], order[TRAINING.batch :]
        texts = [_thinned(captions[k], generator) for k in index.tolist()]
        tokens = tower.tokens(texts)
        tokens = tokens[:, : int(tower.ends(tokens).max()) + 1]
        embeddings = tower.pooled(tower.features(tower.embed(tokens)), tower.ends(tokens))
        logits = scale.exp() * embeddings @ normalize(view(meanings[index]), dim=-1).T
        target = torch.arange(len(index))
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        hits = 0.95 * hits + 0.05 * float((logits.argmax(1) == target).float().mean())
        if step % 50 == 49:
            say(f"step {step + 1} of {steps}: loss {loss:.3f}, matched {hits:.2f}, {time.monotonic() - started:.0f} s")
    model.requires_grad_(requires_grad=False)
    with torch.no_grad():
        model.logit_scale.copy_(scale)
    save(folder, model, CONFIG, CLASSES)


def _thinned(caption: str, generator: torch.Generator) -> str:
    words = caption.split()
    kept = torch.rand(len(words), generator=generator) >= _DROPPED
    return " ".join(word for word, keep in zip(words, kept.tolist(), strict=True) if keep) or caption


def _meanings(captions: Sequence[str], seed: int) -> Tensor:
    """Latent semantic vectors of captions, unit length: shape [N, 128]."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(sublinear_tf=True, min_df=3, stop_words="english").fit_transform(captions)
    vectors = TruncatedSVD(EMBEDDING, random_state=seed).fit_transform(counts).astype(np.float32)
    return normalize(torch.from_numpy(vectors) + 1e-6, dim=-1)
