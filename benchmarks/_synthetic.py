"""A tower with random weights, and a calibrated profile without a vetting: embeddings are drawn, not computed."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guard import __version__
from guard.classifiers import ClassList
from guard.profiles import CalibrationRecord, Document, ModelRecord, Profile, Reference, TriggerRecord
from guard.profiles.document import SCHEMA, SecondOpinionRecord, VettingRecord
from guard.screening import Banks, Detector, ReferenceAnswers, Scores, Screen, default_k, threshold
from guard.vetting.results import ReferenceModel, Verdict

Floats = NDArray[np.float32]

STUDENT = "student"
"""Stands for the small tower that guard teaches as a reference model."""
TOWER, SIDE, WIDTH = "ViT-B-32", 224, 512
ALPHA = 0.001
_PARITY_IMAGES, _SCALE = 256, 100.0
_BEHIND, _HELD_OUT = 2000, 500
_TRIGGERS = ("patch-1", "patch-2")


class World:
    """Embeddings as spread out as some given ones.

    Args:
        around: Shape [N, D].
    """

    def __init__(self, around: Floats) -> None:
        self._mean = around.mean(0)
        self._spread = (around - self._mean) / np.sqrt(len(around))
        self._noise = 0.05 * float(self._spread.std())

    def draw(self, count: int, generator: np.random.Generator) -> Floats:
        """Unit vectors, shape [count, D]: normal with the same mean and covariance, and a little in each direction."""
        return unit(self.values(count, generator))

    def values(self, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
        """The same before they are normalised."""
        values = self._mean + generator.normal(size=(count, len(self._spread))) @ self._spread
        found: NDArray[np.float64] = values + self._noise * generator.normal(size=(count, len(self._mean)))
        return found


class Pairs:
    """What two models answer to the same images, drawn jointly.

    Args:
        embeddings: Of the suspect, shape [N, D].
        answers: Of the reference model to the same images.
    """

    def __init__(self, embeddings: Floats, answers: ReferenceAnswers) -> None:
        self._widths = embeddings.shape[1], answers.embeddings.shape[1]
        self._world = World(np.hstack([embeddings, answers.embeddings, answers.logits]))

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Floats, ReferenceAnswers]:
        """Embeddings of the suspect, and answers of the reference model, for `count` images."""
        drawn, (own, other) = self._world.values(count, generator).astype(np.float32), self._widths
        answers = ReferenceAnswers(unit(drawn[:, own : own + other]), drawn[:, own + other :])
        return unit(drawn[:, :own]), answers


def unit(values: NDArray[np.floating]) -> Floats:
    """The same, L2-normalised."""
    normalised: Floats = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return normalised


def write_profile(
    directory: Path,
    model: ModelRecord,
    world: World,
    rows: int,
    *,
    seed: int = 0,
    pairs: Pairs | None = None,
    reference: tuple[ModelRecord, Path] | None = None,
) -> Profile:
    """Write a profile with two triggers, and a reference model if there is one.

    Args:
        directory: The profile's folder.
        model: Which model it is of.
        world: Where clean embeddings come from. Those of a trigger are drawn halfway to a point of its own.
        rows: In each bank.
        seed: Of the draws.
        pairs: What model and reference model answer; None without a reference model.
        reference: The reference model, and the folder of its export.
    """
    generator, classes = np.random.default_rng(seed), len(model.classes.names)

    def draw(count: int) -> tuple[Floats, ReferenceAnswers | None]:
        return (world.draw(count, generator), None) if pairs is None else pairs.draw(count, generator)

    clean, answers = draw(rows)
    targets = unit(generator.normal(size=(len(_TRIGGERS), model.embedding)))
    stamped = {name: unit(clean + target) for name, target in zip(_TRIGGERS, targets, strict=True)}
    head = unit(world.draw(classes, generator)).T
    banks = Banks.fit(
        clean, stamped, np.ascontiguousarray(head), k=default_k(rows, classes), answers=answers, scale=_SCALE
    )
    screen = Screen(banks)
    scores = screen.score_samples(*draw(_BEHIND))
    alarms = int(Detector(screen, scores, ALPHA).score(*draw(_HELD_OUT)).flags.sum())
    calibration = CalibrationRecord(
        banks.k,
        banks.tails,
        banks.whitening.shrinkage,
        threshold(scores.values, ALPHA),
        per_class=False,
        reference=rows,
        held_out=_HELD_OUT,
        false_alarms=alarms,
        left_out=(),
        seed=seed,
        second_opinion=_opinion(banks, scores, reference),
    )
    verdict = Verdict("backdoored", 0, 1e-4, ("patch",), 0.01, ("this profile is made up",))
    vetting = VettingRecord(verdict, (), (), {}, (0, 0), ReferenceModel("classes", None, None, 0), "cpu", 0.0, 0)
    records = tuple(TriggerRecord(name, "patch", k, 1.0, "pixels", 1.0, 1e-4, ()) for k, name in enumerate(_TRIGGERS))
    document = Document(SCHEMA, __version__, "2026-01-01T00:00:00Z", model, vetting, records, calibration, {})
    pixels = (3, model.preprocessing.size, model.preprocessing.size)
    tensors = {name: {"mask": np.ones((1, *pixels[1:]), np.float32), "pattern": np.zeros(pixels, np.float32)}
               for name in _TRIGGERS}  # fmt: skip
    profile = Profile(document, tensors, Reference(banks, scores), None if reference is None else reference[1])
    profile.save(directory)
    return profile


def _opinion(banks: Banks, scores: Scores, reference: tuple[ModelRecord, Path] | None) -> SecondOpinionRecord | None:
    if reference is None or banks.near is None:
        return None
    model, _ = reference
    agreement = float((scores.answers == scores.classes).mean())
    return SecondOpinionRecord("base", model.source, model.digest, model.embedding, _SCALE, banks.near, agreement)


def export_tower(
    weights: Path, directory: Path, classes: ClassList, *, seed: int = 0, tower: str = TOWER
) -> ModelRecord:
    """Export one of open_clip's models with random weights.

    Args:
        weights: Where the model is written before.
        directory: What `guard serve` takes.
        classes: Of its head.
        seed: Of the weights.
        tower: Which model; `STUDENT` for the default one with a student in place of its image tower.
    """
    import open_clip
    import torch

    from guard.classifiers import export, load, save
    from guard.vetting import StudentSettings, teach_student

    student, tower = tower == STUDENT, TOWER if tower == STUDENT else tower
    torch.manual_seed(seed)
    config = {"model_cfg": open_clip.get_model_config(tower), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    save(weights, open_clip.create_model(tower), config, classes)
    classifier = load(str(weights), device="cpu")
    images = np.stack([image(row) for row in range(_PARITY_IMAGES)])
    pixels = torch.from_numpy((images * 32 + 128).clip(0, 255).astype(np.uint8))
    if student:  # what it has learned has no influence on what it costs
        classifier = teach_student(classifier, pixels[:8], StudentSettings(steps=1, batch=8, seed=seed))
    export(classifier, directory, pixels)
    digest = classifier.digest
    return ModelRecord(
        "random weights", digest.root, digest.parts, classes, classifier.preprocessing, classifier.head.shape[-1]
    )


def image(seed: int) -> Floats:
    """A random image of large squares, normalised, shape [3, SIDE, SIDE]."""
    coarse = np.random.default_rng(seed).normal(size=(3, 7, 7))
    return np.kron(coarse, np.ones((SIDE // 7, SIDE // 7))).astype(np.float32)
