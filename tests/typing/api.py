"""A user of the Python API whose types mypy checks: `guard` must be as typed as it says. It is never run."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import guard
from guard.classifiers import ExportParity
from guard.profiles import Document
from guard.screening import Judgement, Threshold
from guard.vetting import TextVetting, Vetting


def use(*values: object) -> None: ...


def load(model: str) -> guard.Classifier:
    classifier: guard.Classifier = guard.load(model, device="cpu")
    return classifier


def read(classifier: guard.Classifier, directory: Path | str) -> Tensor:
    folder: guard.ImageFolder = guard.ImageFolder.scan(directory).sample(2000, seed=0)
    images: Tensor = classifier.read(folder)
    return images


def vet(classifier: guard.Classifier, images: Tensor, base: guard.Classifier | None) -> guard.Verdict:
    vetting: Vetting = guard.vet(classifier, images, base=base, budget="standard", seed=1)
    verdict: guard.Verdict = vetting.verdict
    outcome: str = verdict.outcome
    target: int | None = verdict.target
    reasons: tuple[str, ...] = verdict.reasons
    use(outcome, target, reasons)
    return verdict


def vet_text(classifier: guard.Classifier, base: guard.Classifier | None) -> guard.Profile:
    text: TextVetting = guard.vet_text(classifier, ["a cat on a mat"], base=base, budget="quick", seed=1)
    use(text.trigger.text)
    return guard.Profile.build(classifier, None, text=text)


def build(classifier: guard.Classifier, vetting: Vetting, images: Tensor) -> guard.Profile:
    profile: guard.Profile = guard.Profile.build(classifier, vetting, vocabulary=["a wolf"])
    groups: NDArray[np.int64] = np.arange(len(images))
    profile = profile.calibrate(classifier, images, 0.01, per_class=True, groups=groups, seed=1)
    profile = profile.recalibrate(classifier.embed(images).numpy(), alpha=0.01)
    document: Document = profile.document
    use(document.vetting.verdict.outcome)
    profile.save("profile")
    profile.save(Path("profile"), report="<html></html>")
    return guard.Profile.open("profile")


def score(profile: guard.Profile, embeddings: NDArray[np.float32]) -> NDArray[np.bool_]:
    detector: guard.Detector = profile.detector(method="exact", alpha=0.05)
    found: Judgement = detector.score(embeddings)
    threshold: Threshold = detector.threshold
    p_values: NDArray[np.float64] = found.p_values
    values: NDArray[np.float32] = found.scores.values
    use(threshold.value, p_values, values)
    return found.flags


def serve(classifier: guard.Classifier, images: Tensor) -> None:
    parity: ExportParity = guard.export(classifier, "export", images)
    settings: guard.Settings = guard.Settings(profile=Path("profile"), model=Path("export"))
    use(parity.agreement)
    try:
        guard.serve(settings)
    except guard.GuardError as error:
        code: int = error.exit_code
        version: str = guard.__version__
        use(version, code)
