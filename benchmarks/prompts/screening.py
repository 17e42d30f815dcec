"""How many requests to a prompt learner are flagged, over random choices of calibration images and requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guard._types import Floats
from guard.classifiers import Classifier
from guard.demo.data import DemoData
from guard.evaluation.zoo import KnownAttack
from guard.profiles.calibrating import Calibrated, Rules, ask, calibrate
from guard.profiles.document import InputKind
from guard.screening import Detector, ReferenceAnswers, Screen
from guard.vetting import ReconstructedTrigger, Vetting

ALPHA, DRAWS = 0.01, 10
RENDERINGS, CALIBRATION_DIGITS = 2, 500
"""Pictures of each digit; and the number of digits, of 797, whose pictures calibrate. The others are requests."""


@dataclass(frozen=True, eq=False)
class _Embedded:
    """Pictures of digits, embedded in advance (`guard.profiles.calibrating.Samples`).

    Attributes:
        clean: Their embeddings, shape [N, D].
        triggered: For each reconstructed trigger the class that it leads to, and their embeddings with it.
        answers: What the reference model answers to them; None without one.
    """

    clean: Floats
    triggered: Mapping[str, tuple[int, Floats]]
    answers: ReferenceAnswers | None
    kind: InputKind = "images"

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: NDArray[np.bool_]) -> "_Embedded":
        moved = {name: (target, bank[rows]) for name, (target, bank) in self.triggered.items()}
        return _Embedded(self.clean[rows], moved, None if self.answers is None else self.answers[rows])

    def embed(self) -> Floats:
        """See `Samples`."""
        return self.clean

    def stamped(self, rows: NDArray[np.int64], say: object) -> dict[str, tuple[int, Floats]]:  # noqa: ARG002 - as called
        """See `Samples`."""
        return {name: (target, bank[rows]) for name, (target, bank) in self.triggered.items()}

    def ask(self, reference: Classifier) -> ReferenceAnswers:  # noqa: ARG002 - asked in advance
        """See `Samples`."""
        if self.answers is None:
            raise AssertionError("there was a reference model")
        return self.answers


def screened(
    classifier: Classifier,
    opinions: Mapping[str, Classifier],
    vetting: Vetting,
    planted: KnownAttack,
    user: DemoData,
    seed: int,
) -> dict[str, Any]:
    """Count clean and triggered requests that each way to screen flags, draw by draw.

    Args:
        classifier: The suspect.
        opinions: Who gives second opinions, by name: its towers with the `hand-written` prompts, and with others.
        vetting: What vetting found.
        planted: The attacker's trigger.
        user: Its sets for calibration and requests.
        seed: Seed of the draws.
    """
    known = _groups(user)
    count = RENDERINGS * len(np.unique(known))
    pixels = torch.cat([user.calibration.pixels[:count], user.requests.pixels])
    labels = torch.cat([user.calibration.labels[:count], user.requests.labels]).numpy()
    digits = np.arange(len(user.requests)) % (len(user.requests) // RENDERINGS)
    groups = np.concatenate([known[:count], 10_000 + digits])
    stamped = planted.trigger.stamp(pixels)
    towers = opinions["hand-written"]
    of_learner = {
        name: (_embedded(classifier, vetting.triggers, each, pixels), _embedded(classifier, (), each, stamped))
        for name, each in opinions.items()
    }
    plain = of_learner["hand-written"]
    attacked = plain[1]
    of_towers = _embedded(towers, vetting.triggers, None, pixels), _embedded(towers, (), None, stamped)
    # Only triggered requests that do lead to the target are counted.
    hit = (classifier.predict(torch.from_numpy(attacked.clean)) == planted.target).numpy() & (labels != planted.target)
    ways = {
        **{
            f"token, answer and second opinion ({name} prompts)": (classifier, of_learner[name], each)
            for name, each in opinions.items()
        },
        "token and answer": (classifier, plain, None),
        "image embedding alone": (towers, of_towers, None),
    }
    found: dict[str, Any] = {name: [] for name in ways}
    for draw in range(DRAWS):
        rng = np.random.default_rng([seed, draw])
        chosen = np.isin(groups, rng.permutation(np.unique(groups))[:CALIBRATION_DIGITS])
        for name, (model, (clean, moved), opinion) in ways.items():
            detector = _detector(clean[chosen], model, opinion, groups[chosen], seed + draw)
            counts: list[int] = []
            for samples in (clean[~chosen], moved[~chosen & hit]):
                flags = detector.score(samples.clean, samples.answers if opinion else None).flags
                counts += [int(flags.sum()), len(flags)]
            found[name].append(counts)
    return found


def _groups(user: DemoData) -> NDArray[np.int64]:
    if user.groups is None:
        raise AssertionError("several pictures show one digit")
    return user.groups


def _embedded(
    model: Classifier, triggers: Sequence[ReconstructedTrigger], opinion: Classifier | None, pixels: torch.Tensor
) -> _Embedded:
    triggered = {each.id: (each.target, model.embed(each.trigger.stamp(pixels)).numpy()) for each in triggers}
    return _Embedded(model.embed(pixels).numpy(), triggered, None if opinion is None else ask(opinion, pixels))


def _detector(
    samples: _Embedded, model: Classifier, opinion: Classifier | None, groups: NDArray[np.int64], seed: int
) -> Detector:
    found: Calibrated = calibrate(
        samples,
        model,
        Rules(ALPHA, per_class=False, seed=seed),
        k=None,
        names=None,
        groups=groups,
        reference=opinion,
        kind="base",
        say=lambda _: None,
    )
    count = sum(item.part == "calibration" for item in found.record.left_out)
    return Detector(Screen(found.reference.banks), found.reference.clean, ALPHA, left_out=np.full(count, -1))
