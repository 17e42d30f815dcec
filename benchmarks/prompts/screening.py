"""How many requests to a prompt learner are flagged, over random choices of calibration images and requests."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guard._types import Floats
from guard.classifiers import Classifier
from guard.demo.data import DemoData
from guard.evaluation.zoo import KnownAttack
from guard.profiles import Profile
from guard.profiles.calibrating import Calibrated, Rules, ask, calibrate
from guard.profiles.document import InputKind
from guard.screening import Detector, ReferenceAnswers, Screen
from guard.vetting import Vetting

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
    classifier: Classifier, towers: Classifier, vetting: Vetting, planted: KnownAttack, user: DemoData, seed: int
) -> dict[str, Any]:
    """Count clean and triggered requests that each way to screen flags, draw by draw.

    Args:
        classifier: The suspect.
        towers: Its towers with the hand-written prompts.
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
    # Only triggered requests that do lead to the target are counted.
    hit = (classifier.predict(classifier.embed(stamped)) == planted.target).numpy() & (labels != planted.target)
    found: dict[str, Any] = {}
    for way, (model, used, opinion, grouped) in {
        "token, answer and second opinion": (classifier, vetting, towers, True),
        "token and answer": (classifier, vetting, None, True),
        "image embedding alone": (towers, _of_towers(vetting, towers), None, True),
        "token, answer and second opinion, every picture a group of its own": (classifier, vetting, towers, False),
    }.items():
        clean = _embedded(model, used, opinion, pixels)
        attacked = model.embed(stamped).numpy(), None if opinion is None else ask(opinion, stamped)
        draws = []
        for draw in range(DRAWS):
            rng = np.random.default_rng([seed, draw])
            chosen = np.isin(groups, rng.permutation(np.unique(groups))[:CALIBRATION_DIGITS])
            detector = _detector(clean[chosen], model, opinion, groups[chosen] if grouped else None, seed + draw)
            asked, left = ~chosen, ~chosen & hit
            alarms = detector.score(clean.clean[asked], None if clean.answers is None else clean.answers[asked]).flags
            caught = detector.score(attacked[0][left], None if attacked[1] is None else attacked[1][left]).flags
            draws.append([int(alarms.sum()), len(alarms), int(caught.sum()), len(caught)])
        found[way] = draws
    return found


def _groups(user: DemoData) -> NDArray[np.int64]:
    if user.groups is None:
        raise AssertionError("several pictures show one digit")
    return user.groups


def _embedded(model: Classifier, vetting: Vetting, opinion: Classifier | None, pixels: torch.Tensor) -> _Embedded:
    profile = Profile.build(model, vetting)
    targets = {record.id: record.target for record in profile.document.triggers}
    triggered = {
        name: (targets[name], model.embed(trigger.stamp(pixels)).numpy())
        for name, trigger in profile.load_triggers().items()
    }
    return _Embedded(model.embed(pixels).numpy(), triggered, None if opinion is None else ask(opinion, pixels))


def _detector(
    samples: _Embedded, model: Classifier, opinion: Classifier | None, groups: NDArray[np.int64] | None, seed: int
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


def _of_towers(vetting: Vetting, towers: Classifier) -> Vetting:
    """The same triggers, with the part of their features that the image tower gives."""
    width = towers.head.shape[1]
    return replace(vetting, triggers=tuple(replace(each, feature=each.feature[:width]) for each in vetting.triggers))
