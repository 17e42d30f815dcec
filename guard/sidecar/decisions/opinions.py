"""Second opinions: which requests a reference model is asked about, and what it answers."""

from dataclasses import dataclass
from random import SystemRandom

import numpy as np
from numpy.typing import NDArray

from guard.classifiers import ExportedClassifier, Preprocessing
from guard.screening import ReferenceAnswers, Scores, Screen
from guard.sidecar.decisions.inputs import Values


@dataclass(frozen=True, eq=False)
class Answered:
    """What a reference model answered to images of a request.

    Attributes:
        answers: Its answers, M of them; all are finite.
        rows: The numbers of their images in the request, shape [M].
        trouble: Why the first of the other images that were asked about has no answer; "" if all have one.
    """

    answers: ReferenceAnswers
    rows: NDArray[np.int64]
    trouble: str = ""


class SecondOpinions:
    """Asks a reference model about images that the suspect model answers too.

    A pass through the reference model follows the pass through the suspect on the same worker thread. A pass uses
    all processors that guard may use, so two passes at the same time would share them, and a second pool of threads
    would have to be bounded too.

    Args:
        model: The reference model.
        suspect: Preprocessing of the suspect, which images are given with.
        rule: Which requests are asked about, see `ModelSettings.opinions`; not `off`.

    Attributes:
        model: As given.
        rule: As given.
    """

    def __init__(self, model: ExportedClassifier, suspect: Preprocessing, rule: str) -> None:
        self.model, self.rule, self._suspect = model, rule, suspect
        normalised = (suspect.mean, suspect.std) == (model.preprocessing.mean, model.preprocessing.std)
        self._same_input = normalised or model.text is not None
        self._share = 1.0 if rule in {"all", "near"} else float(rule)
        # Without a seed, so that nobody can predict which requests are asked about.
        self._random = SystemRandom().random

    @property
    def near_only(self) -> bool:
        """Whether only images that other scores put near the threshold are asked about."""
        return self.rule == "near"

    @property
    def answer_bytes(self) -> int:
        """Bytes of the answer to one image."""
        return 4 * (self.model.manifest.embedding + len(self.model.classes.names))

    def drawn(self) -> bool:
        """Whether a request is to be asked about, by chance where only a share is."""
        return self._share >= 1 or self._random() < self._share

    def wanted(self, screen: Screen, scores: Scores) -> NDArray[np.bool_]:
        """Which images of a request that was drawn are to be asked about, shape [N].

        Args:
            screen: What computed the scores.
            scores: The scores of the images without a second opinion.
        """
        return screen.near(scores) if self.near_only else np.ones(len(scores.values), bool)

    def ask(self, images: Values, rows: NDArray[np.int64]) -> Answered:
        """Ask about images or texts.

        Args:
            images: Preprocessed for the suspect, shape [M, 3, S, S]; or token ids, shape [M, L].
            rows: Their numbers in the request, shape [M].
        """
        if not self._same_input:
            images = self.model.preprocessing.normalise(self._suspect.restore(images.astype(np.float32, copy=False)))
        answers = ReferenceAnswers(*self.model.run(images))
        finite = answers.finite
        if finite.all():
            return Answered(answers, rows)
        return Answered(answers[finite], rows[finite], "the reference model's answer is not finite")
