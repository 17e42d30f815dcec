"""A classifier whose prompts were learned."""

from collections.abc import Mapping
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
    of its own, classes × images of them. They go through the text tower `TEXT_BATCH` at a time, whatever the numbers of
    images and classes, and only as far as the longest prompt reaches: attention is causal, so that what comes behind
    the end of a text changes nothing. Where gradients are needed, each part is computed again in the backward pass, so
    that the memory is that of one part: with a text tower of ViT-B/16's size (width 512, 12 layers) and prompts of 16
    tokens in float32, 1,024 prompts take 5.3 GB with gradients and 0.7 GB without (extrapolated from 128 and 256 on a
    CPU). The public code keeps all prompts of all images, of 77 tokens each.

    A visual prompt is added to the pixels, in [0, 1] and clipped, before normalisation.

    Args:
        towers: The classifier with hand-written prompts whose towers it uses.
        learner: The prompt learner.
        source: Where it comes from; None for that of the towers.

    Raises:
        ModelError: The learner does not fit the towers or the classes, or the text tower is of another kind.
    """

    def __init__(self, towers: Classifier, learner: PromptLearner, *, source: str | None = None) -> None:
        self.towers, self.learner = towers, learner
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
        self.learner = self.learner.to(device)
        self.__dict__.pop("_words", None)

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

    @cached_property
    def head(self) -> Tensor:
        """One unit vector per class, shape [C, D]; with CoCoOp, that of an image whose embedding is zero.

        CoCoOp has no head that holds for all images: `logits` is what it answers.
        """
        if self.learner.kind == "visual":
            return self.towers.head
        with torch.no_grad():
            return self.check_finite(self.class_features(self._average_token()), "prompts")

    def _average_token(self) -> Tensor | None:
        if self.learner.kind != "cocoop":
            return None
        return self.learner.token(torch.zeros(1, self.learner.depth, device=self.device))

    def logits(self, embeddings: Tensor) -> Tensor:
        """See `Classifier.logits`; with CoCoOp, each embedding is compared with prompts of its own."""
        if self.learner.kind != "cocoop":
            return super().logits(embeddings)
        rows = max(1, TEXT_BATCH // len(self.classes.names))
        parts = []
        for part in embeddings.split(rows):
            if torch.is_grad_enabled() and (part.requires_grad or self.learner.tensors[CONTEXT].requires_grad):
                parts.append(checkpoint(self._conditioned, part, use_reentrant=False))
            else:
                parts.append(self._conditioned(part))
        return torch.cat(parts)

    def _conditioned(self, embeddings: Tensor) -> Tensor:
        return self.conditioned(embeddings, self.learner.token(embeddings))

    def conditioned(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        """Class scores of embeddings, shape [N, C], under prompts that are shifted by these tokens, in one pass."""
        texts = self.class_features(tokens).unflatten(0, (-1, len(self.classes.names)))
        return self.scored(torch.einsum("nd,ncd->nc", embeddings, texts))

    def class_features(self, tokens: Tensor | None = None) -> Tensor:
        """Text embeddings of length 1 of the learned prompts.

        Args:
            tokens: What is added to the context, for each of N images: shape [N, width]; None for nothing.

        Returns:
            Shape [C, D], or [N · C, D], image by image.
        """
        words, ends = self._words
        count, length = len(words), self.learner.length
        context = self.learner.tensors[CONTEXT].expand(count, length, -1)[None]
        if tokens is not None:
            context = context + tokens[:, None, None, :]
        images = context.shape[0]  # not its length, which an export would take for a constant
        rest = words[None].expand(images, -1, -1, -1)
        prompts = torch.cat([rest[:, :, :1], context, rest[:, :, 1 + length :]], dim=2).flatten(0, 1)
        return self._encode(prompts, ends.repeat(images))

    @cached_property
    def _words(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the tokens of each class's prompt, shape [C, L, width], and the place of its end, shape [C]."""
        ids = _prompt_ids(self.towers, self.learner.length).to(self.device)
        ends = ids.argmax(1)
        with torch.no_grad():
            return self.model.token_embedding(ids[:, : int(ends.max()) + 1]).float(), ends

    def _encode(self, prompts: Tensor, ends: Tensor) -> Tensor:
        """Text embeddings of prompts that are embedded already, shape [P, L, width]."""
        model, length = self.model, prompts.shape[1]
        hidden = prompts + model.positional_embedding[:length]
        with self.autocast():
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
