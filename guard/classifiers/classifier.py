"""A CLIP classifier in memory."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers.classes import ClassList
from guard.classifiers.digest import ClassifierDigest, canonical, sha256
from guard.classifiers.images import ImageFolder
from guard.classifiers.preprocessing import Preprocessing
from guard.errors import ClassListError, ModelError, UsageError

ENCODE_BATCH = 256
_TOKENIZER_PROBE = ("a photo of a cat.", "Zażółć gęślą jaźń 123 !?", "the quick brown fox jumps over the lazy dog")


class Classifier:
    """A CLIP model with everything that makes it a classifier.

    Images enter as pixels in [0, 1], before normalisation, because that is the space in which triggers live; the
    normalisation is part of `encode_images`. Weights are frozen: gradients flow to the pixels only.

    Args:
        model: An open_clip `CLIP` or `CustomTextCLIP`.
        config: The `model_cfg` that it was built from.
        tokenizer: A function from a list of texts to token ids.
        preprocessing: The transform that the image tower expects.
        classes: Class names and templates.
        source: Where the classifier was loaded from, as given by the user.
        device: The device that it runs on.

    Raises:
        ModelError: A weight is not finite, or the logit scale is too large for a finite score.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: Mapping[str, Any],
        tokenizer: Callable[[list[str]], Tensor],
        preprocessing: Preprocessing,
        classes: ClassList,
        *,
        source: str,
        device: torch.device,
    ) -> None:
        self.model: Any = model.eval().requires_grad_(requires_grad=False)
        self.config = config
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.classes = classes
        self.source = source
        self._check_weights()
        self.to(device)

    def _check_weights(self) -> None:
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ModelError(
                    f"{self.source} computes no finite numbers: its tensor {name!r} has a value that is not finite"
                )
        if not math.isfinite(self.logit_scale):
            raise ModelError(
                f"{self.source} computes no finite numbers: exp(logit_scale) overflows for a logit_scale of "
                f"{float(self.model.logit_scale):g}"
            )

    def check_comparable(self, base: "Classifier") -> None:
        """Make sure that this classifier can be compared with another one that serves as its reference model.

        Raises:
            UsageError: The other one is this model itself, or has other classes or another input size.
        """
        if base.digest.root == self.digest.root:
            raise UsageError("the base model is the model itself; comparing a model with itself shows nothing")
        if base.classes.names != self.classes.names:
            raise UsageError("the base model has other classes than the model; give both the same list with --classes")
        if base.image_shape != self.image_shape:
            raise UsageError(
                f"the base model takes images of {base.image_shape[1:]}, the model takes images of "
                f"{self.image_shape[1:]}"
            )

    def with_model(self, model: torch.nn.Module, source: str, config: Mapping[str, Any] | None = None) -> "Classifier":
        """A classifier with another model, and otherwise with the parts of this one.

        Its head is computed when it is first needed. Where the text tower is the same, `head` may be set to that of
        this one instead, since that of 1,000 classes takes minutes on a CPU.

        Args:
            model: The model.
            source: Where it comes from, for people.
            config: The `model_cfg` that it was built from; by default that of this classifier.
        """
        return Classifier(
            model,
            self.config if config is None else config,
            self.tokenizer,
            self.preprocessing,
            self.classes,
            source=source,
            device=self.device,
        )

    def to(self, device: torch.device) -> None:
        """Move to a device, in place."""
        self.device = device
        # With channels last, convolutions are faster (by a third on a CPU) and compute the same values.
        self.model.to(device, memory_format=torch.channels_last)
        self._mean = torch.tensor(self.preprocessing.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(self.preprocessing.std, device=device).view(3, 1, 1)
        for name in ("head", "meanings", "distinct"):  # computed again on the new device when they are next needed
            self.__dict__.pop(name, None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the image tower's input."""
        return 3, self.preprocessing.size, self.preprocessing.size

    def read(self, folder: ImageFolder, progress: Callable[[str, int, int], None] = lambda *_: None) -> Tensor:
        """Read all images of a folder at the resolution of this classifier.

        Args:
            folder: The images.
            progress: Called with a description, the number of images read, and the number of all images.

        Returns:
            uint8, shape [N, 3, H, W], in the order of `folder.files`.

        Raises:
            ImageError: A file cannot be decoded; the error names it.
        """
        return torch.from_numpy(folder.pixels(self.preprocessing, progress))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """L2-normalised image embeddings.

        Args:
            pixels: Float, shape [N, 3, H, W], values in [0, 1], before normalisation.

        Returns:
            Shape [N, D].
        """
        return self.answered(self.tower_embeddings(pixels))

    def tower_embeddings(self, pixels: Tensor) -> Tensor:
        """What the image tower gives, L2-normalised; otherwise as `encode_images`."""
        return normalize(self.project_images(pixels), dim=-1)

    def answered(self, images: Tensor) -> Tensor:
        """The embeddings of this classifier for what its image tower gives; the same, where prompts are fixed."""
        return images

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised text embeddings, shape [N, D]."""
        return normalize(self.project_texts(texts), dim=-1)

    def project_images(self, pixels: Tensor) -> Tensor:
        """Image embeddings as the tower gives them, of any length; otherwise as `encode_images`."""
        projected: Tensor = self.model.encode_image((pixels - self._mean) / self._std).float()
        return projected

    def project_texts(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings as the tower gives them, of any length; shape [N, D]."""
        projected: Tensor = self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float()
        return projected

    @cached_property
    def head(self) -> Tensor:
        """The zero-shot head: one unit vector per class, the normalised mean over its templates; shape [C, D].

        Raises:
            ModelError: An embedding is not finite.
        """
        with torch.no_grad():
            rows = [self.encode_texts(self.classes.prompts(name)).mean(0) for name in self.classes.names]
            return self.check_finite(normalize(torch.stack(rows), dim=-1), "prompts")

    @cached_property
    def meanings(self) -> Tensor:
        """A text embedding of length 1 for each class, shape [C, D], by which classes can be compared."""
        return self.head

    @cached_property
    def distinct(self) -> Tensor | None:
        """Which classes are the first of those that have one and the same row of the head: bool, shape [C].

        None where all rows differ. Classes with the same row always have the same score, whatever the image: none of
        them ever leads the other, and `predict` answers with the first.

        Raises:
            ClassListError: All rows are the same.
        """
        return self.first_of_same(self.meanings)

    def first_of_same(self, head: Tensor) -> Tensor | None:
        """See `distinct`, of any rows of one class each."""
        rows = head.unique(dim=0, return_inverse=True)[1].cpu()
        places = {row: place for place, row in reversed(list(enumerate(rows.tolist())))}
        first = [places[row] == place for place, row in enumerate(rows.tolist())]
        if sum(first) < 2:
            raise ClassListError(
                f"all prompts of the classes mean the same to {self.source}; nothing can be classified"
            )
        return None if all(first) else torch.tensor(first, device=self.device)

    @cached_property
    def logit_scale(self) -> float:
        """The factor by which cosines are multiplied to give logits."""
        return float(self.model.logit_scale.exp())

    def logits(self, embeddings: Tensor) -> Tensor:
        """Class scores, shape [N, C]: scaled cosine to the head (plus the bias that SigLIP models have)."""
        return self.scored(embeddings @ self.head.T)

    prompts_per_image = False
    """Whether each image is compared with prompts of its own, so that each class costs a pass of the text tower."""

    def scores_of(self, images: Tensor, classes: Tensor) -> Tensor:
        """Scores of some classes only, which saves work where each image has prompts of its own.

        Args:
            images: As `tower_embeddings` gives them, shape [N, D].
            classes: Indices of the classes of each image, int64, shape [N, M].

        Returns:
            Shape [N, M]; differentiable.
        """
        return self.logits(self.answered(images)).gather(1, classes)

    def scored(self, cosines: Tensor) -> Tensor:
        """Class scores from cosines, of any shape."""
        logits = self.logit_scale * cosines
        bias = getattr(self.model, "logit_bias", None)
        return logits if bias is None else logits + bias

    @torch.no_grad()
    def embed(
        self, images: Iterable[np.ndarray[Any, np.dtype[np.uint8]]] | Tensor, batch: int = ENCODE_BATCH
    ) -> Tensor:
        """Embeddings of many images, batch by batch, on the CPU.

        Args:
            images: uint8, shape [N, 3, H, W], as `Preprocessing.pixels` gives them.
            batch: Images per forward pass.

        Returns:
            Float32, shape [N, D].

        Raises:
            ModelError: An embedding is not finite.
        """
        stacked = images if isinstance(images, Tensor) else torch.from_numpy(np.stack(list(images)))
        with self.autocast():
            parts = [self.encode_images(part.to(self.device).float() / 255).cpu() for part in stacked.split(batch)]
        return self.check_finite(torch.cat(parts), "images")

    def check_finite(self, embeddings: Tensor, what: str) -> Tensor:
        """Refuse embeddings that overflowed: whatever is computed from them says nothing."""
        if not embeddings.isfinite().all():
            raise ModelError(f"{self.source} computes no finite numbers: its embeddings of {what} overflow")
        return embeddings

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> Tensor:
        """The class index of each embedding, shape [N], on the CPU."""
        return self.logits(embeddings.to(self.device)).argmax(-1).cpu()

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 on a GPU; float32 on a CPU, where lower precision is rarely faster."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def _tensors(self) -> Mapping[str, Tensor]:
        """Every tensor that answers depend on, by name."""
        return self.model.state_dict()  # type: ignore[no-any-return]

    @cached_property
    def digest(self) -> ClassifierDigest:
        """Digest of weights, architecture, preprocessing, tokenizer, class names and templates.

        Tensors are hashed as they are in memory, so that the same weights have the same digest whatever file they were
        read from. The tokenizer is hashed by its behaviour: its vocabulary where it has a public one, and its token ids
        for every prompt of the head and for a few fixed texts.
        """
        prompts = [prompt for name in self.classes.names for prompt in self.classes.prompts(name)]
        ids = self.tokenizer([*prompts, *_TOKENIZER_PROBE])
        return ClassifierDigest(
            {
                "architecture": sha256(canonical(self.config)),
                "weights": _weights_digest(self._tensors()),
                "preprocessing": sha256(canonical(asdict(self.preprocessing))),
                "tokenizer": sha256(canonical({"vocabulary": _vocabulary(self.tokenizer), "probe": ids.tolist()})),
                "classes": sha256(canonical(self.classes.document())),
            }
        )


def _vocabulary(tokenizer: object) -> dict[str, int]:
    """The token → id table of one of open_clip's tokenizers; empty for a tokenizer without a public one."""
    if isinstance(encoder := getattr(tokenizer, "encoder", None), dict):
        return encoder
    read = getattr(getattr(tokenizer, "tokenizer", None), "get_vocab", None)
    return dict(read()) if callable(read) else {}


def _weights_digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
        # A byte view works for every dtype, bfloat16 included, which numpy does not know.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
