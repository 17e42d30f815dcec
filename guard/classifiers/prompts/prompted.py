"""A classifier whose prompts were learned."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from guard.classifiers.classifier import Classifier
from guard.classifiers.prompts.learner import CONTEXT, FRAME, PromptLearner
from guard.errors import ModelError

TEXT_BATCH = 1024
"""Prompts in one forward pass of the text tower."""


class PromptedClassifier(Classifier):
    """Frozen towers with a prompt learner: CoOp (Zhou et al., IJCV 2022), CoCoOp (Zhou et al., CVPR 2022) or a frame.

    A prompt is `[context] CLASS.`, with the class at the end as in the public code. With CoCoOp each image has prompts
    of its own, classes × images of them. They go through the text tower at most `TEXT_BATCH` at a time, whatever the
    numbers of images and classes, and only as far as the longest prompt reaches: attention is causal, so that what
    comes behind the end of a text changes nothing. Where gradients are needed, each part is computed again in the
    backward pass, so that the memory is that of one part: with a text tower of ViT-B/16's size (width 512, 12 layers)
    and prompts of 16 tokens in float32, 1,024 prompts take 5.3 GB with gradients and 0.7 GB without (extrapolated from
    128 and 256 on a CPU). The public code keeps all prompts of all images, of 77 tokens each.

    What CoCoOp answers does not follow from the embedding of the image tower, and a backdoor in its meta-net does not
    show there. The embedding of a classifier with CoCoOp is therefore longer: the image embedding; the meta-net's
    token, shortened to t / √(‖t‖² + c²), where c is the mean length of the context vectors that it is added to; the
    cosines of the image to its own class prompts; and what is missing to one length for all images, which is then
    scaled down to 1. So the classes are linear in it, as they are in the embedding of any other classifier, and what
    compares embeddings sees the image, the token and the answer.

    A visual prompt is added to the pixels, in [0, 1] and clipped, before normalisation.

    Args:
        towers: The classifier with hand-written prompts whose towers it uses.
        learner: The prompt learner.
        source: Where it comes from; None for that of the towers.

    Attributes:
        prompts_per_image: See `Classifier`: with CoCoOp.

    Raises:
        ModelError: The learner does not fit the towers or the classes, or the text tower is of another kind.
    """

    def __init__(self, towers: Classifier, learner: PromptLearner, *, source: str | None = None) -> None:
        self.towers, self.learner = towers, learner
        self._length = math.sqrt(len(towers.classes.names) + 2)
        """Length that the embeddings of a classifier with CoCoOp have before they are scaled down to 1."""
        self.prompts_per_image = learner.kind == "cocoop"
        super().__init__(
            towers.model,
            {**towers.config, "prompt_learner": learner.kind},
            towers.tokenizer,
            towers.preprocessing,
            towers.classes,
            source=source or f"{towers.source} with a prompt learner",
            device=towers.device,
        )
        _check_fit(towers, learner)

    def to(self, device: torch.device) -> None:
        """Move to a device, in place."""
        super().to(device)
        if self.towers.device != device:
            self.towers.to(device)
        self.learner = self.learner.to(device)
        if "words" in self.__dict__:  # a tokenizer cannot be traced, as an export would have to if they were forgotten
            words, ends = self.words
            self.words = words.to(device), ends.to(device)

    def with_model(
        self, model: torch.nn.Module, source: str, config: Mapping[str, Any] | None = None
    ) -> "PromptedClassifier":
        """See `Classifier.with_model`; the prompt learner stays."""
        plain = None if config is None else {key: value for key, value in config.items() if key != "prompt_learner"}
        return PromptedClassifier(self.towers.with_model(model, source, plain), self.learner, source=source)

    def project_images(self, pixels: Tensor) -> Tensor:
        """See `Classifier.project_images`; a visual prompt is added first."""
        if self.learner.kind == "visual":
            pixels = (pixels + self.learner.tensors[FRAME]).clamp(0, 1)
        return super().project_images(pixels)

    def answered(self, images: Tensor) -> Tensor:
        """See `Classifier.answered`; with CoCoOp longer than what the image tower gives."""
        if not self.prompts_per_image:
            return images
        parts = []
        for part in images.split(max(1, TEXT_BATCH // len(self.classes.names))):
            if torch.is_grad_enabled() and (part.requires_grad or self.learner.tensors[CONTEXT].requires_grad):
                parts.append(checkpoint(self._answered, part, use_reentrant=False))
            else:
                parts.append(self._answered(part))
        return torch.cat(parts)

    def _answered(self, images: Tensor) -> Tensor:
        with self._float32():
            return self.extended(images, self.learner.token(images))

    def _float32(self) -> AbstractContextManager[Any]:
        """No autocast: in bfloat16 a cosine is off by 0.01, which at CLIP's scale is a whole logit."""
        return torch.autocast(self.device.type, enabled=False)

    def extended(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The embeddings of this classifier for embeddings of the image tower and the tokens of the meta-net."""
        size = self.learner.tensors[CONTEXT].norm(dim=-1).mean()
        shortened = tokens / (tokens.square().sum(1, keepdim=True) + size.square()).sqrt()
        known = torch.cat([images, shortened, self._cosines(images, tokens)], dim=1)
        # The image's part has length 1, the token's less, and no cosine is above 1; rounding must not make a root of
        # less than nothing.
        rest = (self._length**2 - known.square().sum(1, keepdim=True)).clamp(min=1e-6).sqrt()
        return torch.cat([known, rest], dim=1) / self._length

    def _cosines(self, images: Tensor, tokens: Tensor, classes: Tensor | None = None) -> Tensor:
        texts = self.class_features(tokens, classes)
        return torch.einsum("nd,ncd->nc", images, texts.unflatten(0, (tokens.shape[0], -1)))

    def scores_of(self, images: Tensor, classes: Tensor) -> Tensor:
        """See `Classifier.scores_of`; with CoCoOp, prompts of other classes are left out."""
        if not self.prompts_per_image:
            return super().scores_of(images, classes)
        parts = []
        rows = max(1, TEXT_BATCH // classes.shape[1])
        for part, own in zip(images.split(rows), classes.split(rows), strict=True):
            if torch.is_grad_enabled() and part.requires_grad:
                parts.append(checkpoint(self._cosines_of, part, own, use_reentrant=False))
            else:
                parts.append(self._cosines_of(part, own))
        return self.scored(torch.cat(parts))

    def _cosines_of(self, images: Tensor, classes: Tensor) -> Tensor:
        with self._float32():
            return self._cosines(images, self.learner.token(images), classes)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """See `Classifier.encode_texts`; with CoCoOp as long as the head's rows, so that products are cosines again."""
        encoded = super().encode_texts(texts)
        if not self.prompts_per_image:
            return encoded
        return torch.nn.functional.pad(self._length * encoded, (0, self.head.shape[1] - encoded.shape[1]))

    @cached_property
    def head(self) -> Tensor:
        """See `Classifier.head`; with CoCoOp, vectors that pick the cosines out of the embeddings."""
        if self.learner.kind == "visual":
            return self.towers.head
        if not self.prompts_per_image:
            with torch.no_grad(), self._float32():
                return self.check_finite(self.class_features(), "prompts")
        before, count = self.learner.depth + self.learner.tensors[CONTEXT].shape[-1], len(self.classes.names)
        picked = torch.zeros(count, before + count + 1, device=self.device)
        picked[:, before : before + count].fill_diagonal_(self._length)
        return picked

    @cached_property
    def meanings(self) -> Tensor:
        """See `Classifier.meanings`; with CoCoOp those of the prompts of an image with an embedding of zero."""
        if not self.prompts_per_image:
            return super().meanings
        with torch.no_grad(), self._float32():
            return self.class_features(self.learner.token(torch.zeros(1, self.learner.depth, device=self.device)))

    def class_features(self, tokens: Tensor | None = None, classes: Tensor | None = None) -> Tensor:
        """Text embeddings of length 1 of the learned prompts.

        Args:
            tokens: What is added to the context, for each of N images: shape [N, width]; None for nothing.
            classes: Indices of some classes for each image, shape [N, M]; None for all classes. Needs tokens.

        Returns:
            Shape [C, D], or image by image [N · C, D] or [N · M, D].
        """
        words, ends = self.words
        length = self.learner.length
        context = self.learner.tensors[CONTEXT].expand(len(words), length, -1)[None]
        if tokens is not None:
            context = context + tokens[:, None, None, :]
        images = context.shape[0]  # not its length, which an export would take for a constant
        if classes is None:
            rest, last = words[None].expand(images, -1, -1, -1), ends.repeat(images)
        else:
            # With tokens all classes have the same context.
            rest, last = words[classes], ends[classes].flatten()
            context = context[:, :1].expand(-1, classes.shape[1], -1, -1)
        prompts = torch.cat([rest[:, :, :1], context, rest[:, :, 1 + length :]], dim=2).flatten(0, 1)
        return self._encode(prompts, last)

    @cached_property
    def words(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the tokens of each class's prompt, shape [C, L, width], and the place of its end, shape [C]."""
        ids = _prompt_ids(self.towers, self.learner.length).to(self.device)
        ends = ids.argmax(1)
        with torch.no_grad():
            return self.model.token_embedding(ids[:, : int(ends.max()) + 1]).float(), ends

    def _encode(self, prompts: Tensor, ends: Tensor) -> Tensor:
        """Text embeddings of prompts that are embedded already, shape [P, L, width], at most `TEXT_BATCH` at a time."""
        if torch.compiler.is_exporting() or prompts.shape[0] <= TEXT_BATCH:
            return self._encoded(prompts, ends)
        parts = zip(prompts.split(TEXT_BATCH), ends.split(TEXT_BATCH), strict=True)
        if torch.is_grad_enabled() and prompts.requires_grad:
            return torch.cat([checkpoint(self._encoded, *part, use_reentrant=False) for part in parts])
        return torch.cat([self._encoded(*part) for part in parts])

    def _encoded(self, prompts: Tensor, ends: Tensor) -> Tensor:
        model, length = self.model, prompts.shape[1]
        hidden = prompts + model.positional_embedding[:length]
        # Prompts that serve all images are few, and as exact as the hand-written ones that they are compared with.
        with self.autocast() if self.prompts_per_image else nullcontext():
            hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
        hidden = model.ln_final(hidden)[torch.arange(hidden.shape[0], device=hidden.device), ends].float()
        projection = model.text_projection
        if projection is not None:
            hidden = projection(hidden) if isinstance(projection, torch.nn.Linear) else hidden @ projection
        return normalize(hidden, dim=-1)

    def _tensors(self) -> Mapping[str, Tensor]:
        learned = {f"prompt_learner.{name}": tensor for name, tensor in self.learner.tensors.items()}
        return {**super()._tensors(), **learned}


def _prompt_ids(towers: Classifier, length: int) -> Tensor:
    """Token ids of `X X … CLASS.`, where each X stands for a context vector: shape [C, L].

    Raises:
        ModelError: The tokenizer does not make one token of each X, or a prompt is too long.
    """
    filler = " ".join(["X"] * length)
    prompts = [f"{filler} {name.replace('_', ' ')}." for name in towers.classes.words or towers.classes.names]
    ids = towers.tokenizer(prompts)
    if length and not (ids[:, 1 : 1 + length] == ids[0, 1]).all():
        raise ModelError(f"{towers.source} has a tokenizer that prompt learners were not made for")
    if (ids.argmax(1) == ids.shape[1] - 1).any():
        raise ModelError(f"a class name with {length} context vectors is as long as {towers.source} reads, or longer")
    return ids


def _check_fit(towers: Classifier, learner: PromptLearner) -> None:
    if learner.kind == "visual":
        if tuple(learner.tensors[FRAME].shape) != towers.image_shape:
            raise ModelError(
                f"the visual prompt is for images of {list(learner.tensors[FRAME].shape)}, {towers.source} takes "
                f"{list(towers.image_shape)}"
            )
        return
    model, context = towers.model, learner.tensors[CONTEXT]
    pooled = getattr(model, "text_pool_type", None)
    if pooled != "argmax" or getattr(model, "attn_mask", None) is None:
        raise ModelError(f"{towers.source} has a text tower that prompt learners were not made for")
    width = model.token_embedding.embedding_dim
    if context.shape[-1] != width:
        raise ModelError(f"the prompt learner has contexts of {context.shape[-1]}, the text tower takes {width}")
    if context.ndim == 3 and len(context) != len(towers.classes.names):
        raise ModelError(f"the prompt learner has {len(context)} classes, the model has {len(towers.classes.names)}")
    if learner.kind == "cocoop":
        made_for, found = learner.depth, towers.head.shape[1]
        if made_for != found:
            raise ModelError(f"the meta-net takes embeddings of {made_for}, those of {towers.source} have {found}")
    _prompt_ids(towers, learner.length)
