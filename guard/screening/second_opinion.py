"""A second opinion on a request: what a reference model answers to the same image. numpy only.

A backdoor is a difference between the suspect and a model that was not attacked: the trusted base, or what guard makes
of the suspect by teaching another model its answers to clean images. On clean requests the two agree, up to what
fine-tuning changed; on a triggered request the suspect goes to the attacker's class and the reference model does not.
That needs no reconstructed trigger.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.errors import RequestError
from guard.screening.neighbours import Embeddings
from guard.screening.whitening import MIN_SHRINKAGE, oas

DIVERGENCE = "divergence"
"""Name of the score that compares the predicted distributions."""
RESIDUAL = "residual"
"""Name of the score that compares the embeddings."""
OPINIONS = (DIVERGENCE, RESIDUAL)
"""Names of the scores of a second opinion."""
_TEMPERATURE = 2.0
"""Both distributions are softened by it: a model trained with a large logit scale is sure of nearly everything."""
_SAME = 1e-7
"""Share of the variance of embeddings below which a residual is only rounding."""
_RIDGES = tuple(10.0**power for power in range(-6, 2))
"""Candidates for the ridge of the map, relative to the mean variance of the reference model's embeddings."""


@dataclass(frozen=True, eq=False)
class ReferenceAnswers:
    """What a reference model computed for some images.

    Attributes:
        embeddings: L2-normalised, float32, shape [N, R].
        logits: Class scores, float32, shape [N, C]; the classes are those of the suspect, in the same order.
    """

    embeddings: Embeddings
    logits: Floats

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Which answers consist of finite numbers, shape [N]."""
        finite: NDArray[np.bool_] = np.isfinite(np.hstack([self.embeddings, self.logits]))
        return np.asarray(finite.all(axis=1), bool)

    def __getitem__(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> "ReferenceAnswers":
        """The answers to some of the images."""
        return ReferenceAnswers(self.embeddings[rows], self.logits[rows])

    def checked(self, width: int, classes: int) -> Self:
        """The same answers, after a check of their shapes and values.

        Raises:
            RequestError: They are not answers to images of a reference model with embeddings of length `width`.
        """
        if self.embeddings.shape[1:] != (width,) or self.logits.shape != (len(self.embeddings), classes):
            raise RequestError(
                f"answers of shapes {self.embeddings.shape} and {self.logits.shape} are not those of the reference "
                f"model, which has embeddings of {width} and {classes} classes"
            )
        if not (np.isfinite(self.embeddings).all() and np.isfinite(self.logits).all()):
            raise RequestError("an answer of the reference model is not finite")
        return self


@dataclass(frozen=True, eq=False)
class SecondOpinion:
    """Measures how far the suspect departs from the reference model on one and the same image.

    Two scores, which see different attacks:

    - the *divergence* of the predicted distributions, softened by a temperature of 2: Jeffreys's, that is
      KL(suspect ‖ reference) + KL(reference ‖ suspect). It is large where each of the two is sure of a class that the
      other finds unlikely; where one of them is unsure, clean images make them differ as well. BDetCLIP (Niu et al.,
      2024) and others compare predictions of one model under several prompts; here two models answer to one prompt set;
    - the *residual*: the length of f(x) − A·r(x), whitened by its covariance over clean images, where f and r are the
      embeddings of the two models and A is the linear map between them. It also sees a trigger that moves both models
      towards the attacker's class, such as a patch that was optimised on the clean model, because it need not move them
      alike. Fine-tuning to match the activations of an anchor, with the residual as the score of an input, is the idea
      of activation-matched fine-tuning (2026); here the map is linear and needs no training.

    Made by `SecondOpinion.fit`, stored in a profile.

    Attributes:
        scale: Factor between cosine and logit of the suspect; larger than 0.
        head: Class embeddings of the suspect, shape [D, C].
        centre: Mean embedding of the reference model, shape [R].
        offset: Mean embedding of the suspect, shape [D].
        matrix: The map A from centred embeddings of the reference model, applied from the right, shape [R, D].
        whitening: Whitens the residual, applied from the right, shape [D, D].
    """

    scale: float
    head: Embeddings
    centre: Embeddings
    offset: Embeddings
    matrix: Embeddings
    whitening: Embeddings

    @classmethod
    def fit(
        cls, embeddings: Embeddings, answers: ReferenceAnswers, head: Embeddings, scale: float
    ) -> tuple[Self, dict[str, NDArray[np.float32]]]:
        """Learn the map and the spread of its residuals from clean images.

        The map is a ridge regression; its strength is the one with the smallest error on left-out images (PRESS, Allen
        1974). The residuals of the images themselves are computed as if each had been left out, so that their spread is
        that of requests: in-sample residuals would be too short, the more so the fewer images there are.

        Args:
            embeddings: Embeddings of the suspect, shape [N, D], L2-normalised.
            answers: What the reference model computed for the same images.
            head: Class embeddings of the suspect, shape [D, C].
            scale: Factor between cosine and logit of the suspect.

        Returns:
            The fitted comparison, and the scores of the images themselves by name, shape [N] each.

        Raises:
            ValueError: The numbers of images differ, there are fewer than three, the reference model gives one
                embedding to all images, or the two are the same model.
        """
        if len(embeddings) != len(answers) or len(embeddings) < 3:
            raise ValueError(
                f"{len(embeddings)} embeddings and {len(answers)} answers of the reference model make none"
            )
        centre, offset = answers.embeddings.mean(0), embeddings.mean(0)
        matrix, residuals = _ridge(answers.embeddings - centre, embeddings - offset)
        found = cls(
            float(scale),
            np.ascontiguousarray(head),
            centre.astype(np.float32),
            offset.astype(np.float32),
            matrix.astype(np.float32),
            _whitening(residuals, float(embeddings.var(axis=0).mean())).astype(np.float32),
        )
        lengths = np.linalg.norm(residuals.astype(np.float32) @ found.whitening, axis=1).astype(np.float32)
        divergence = found.divergence(embeddings, answers)
        if not (found.whitening.any() or divergence.max() > _SAME):
            raise ValueError(
                "the reference model answers every image exactly as the suspect does: it is the same model"
            )
        return found, {DIVERGENCE: divergence, RESIDUAL: lengths}

    def score(self, embeddings: Embeddings, answers: ReferenceAnswers) -> dict[str, NDArray[np.float32]]:
        """Both scores by name, shape [N] each; larger is more suspicious.

        Args:
            embeddings: Embeddings of the suspect, shape [N, D], L2-normalised.
            answers: What the reference model computed for the same images.

        Raises:
            RequestError: The answers have other shapes, or are not finite.
        """
        answers = answers.checked(*self.form)
        return {DIVERGENCE: self.divergence(embeddings, answers), RESIDUAL: self.residual(embeddings, answers)}

    @property
    def form(self) -> tuple[int, int]:
        """Length of the reference model's embeddings, and number of classes."""
        return len(self.centre), self.head.shape[1]

    def divergence(self, embeddings: Embeddings, answers: ReferenceAnswers) -> NDArray[np.float32]:
        """Jeffreys's divergence of the two softened distributions, in nats, at least 0; shape [N]."""
        ours = _log_softmax(self.scale / _TEMPERATURE * (embeddings @ self.head))
        theirs = _log_softmax(answers.logits / _TEMPERATURE)
        found: NDArray[np.float64] = ((np.exp(ours) - np.exp(theirs)) * (ours - theirs)).sum(axis=1)
        return found.astype(np.float32)

    def residual(self, embeddings: Embeddings, answers: ReferenceAnswers) -> NDArray[np.float32]:
        """Length of the whitened residual, shape [N]; about √D for clean images."""
        expected = self.offset + (answers.embeddings - self.centre) @ self.matrix
        found: NDArray[np.float32] = np.linalg.norm((embeddings - expected) @ self.whitening, axis=1)
        return found.astype(np.float32, copy=False)


def _log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def _ridge(inputs: Floats, outputs: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The map of a ridge regression without intercept, and the residual of each row as if it had been left out."""
    left, values, right = np.linalg.svd(inputs.astype(np.float64), full_matrices=False)
    wanted = outputs.astype(np.float64)
    projected, unit = left.T @ wanted, float((values**2).mean())
    if not unit > 0:
        raise ValueError("the reference model gives the same embedding to every image")
    best: tuple[float, NDArray[np.float64], NDArray[np.float64]] | None = None
    for ridge in _RIDGES:
        shrunk = values**2 / (values**2 + ridge * unit)
        # A mean was subtracted from both sides, which is one more parameter for each row.
        leverage = (left**2) @ shrunk + 1 / len(inputs)
        residuals = (wanted - left @ (shrunk[:, None] * projected)) / np.maximum(1 - leverage, 1e-3)[:, None]
        error = float((residuals**2).sum())
        if best is None or error < best[0]:
            solution = right.T @ ((values / (values**2 + ridge * unit))[:, None] * projected)
            best = error, solution, residuals
    if best is None:
        raise AssertionError("there are candidates for the ridge")
    return best[1], best[2]


def _whitening(residuals: NDArray[np.float64], spread: float) -> NDArray[np.float64]:
    """The matrix that gives residuals a covariance of one, shrunk like that of `guard.screening.whitening`.

    It is zero where the reference model predicts every embedding exactly: then the two have the same image tower, as a
    prompt learner and its hand-written prompts do, and residuals say nothing.

    Args:
        residuals: Shape [N, D].
        spread: Mean variance of the embeddings that they are the residuals of.
    """
    covariance = residuals.T @ residuals / len(residuals)
    scale = float(np.trace(covariance)) / len(covariance)
    if not scale > _SAME * spread:
        return np.zeros_like(covariance)
    shrinkage = max(MIN_SHRINKAGE, oas(covariance, len(residuals)))
    covariance = (1 - shrinkage) * covariance + shrinkage * scale * np.eye(len(covariance))
    variances, directions = np.linalg.eigh(covariance)
    found: NDArray[np.float64] = directions / np.sqrt(variances)
    return found
