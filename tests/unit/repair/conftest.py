"""A tiny classifier that has learned its images, and a backdoored copy of it."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from guard.attacks import LabelledImages, Planted, TrainingSettings, poisoned, train, train_base
from guard.classifiers import Classifier, load, save
from guard.repair import Case, Images, TargetedTrigger
from guard.triggers import Patch
from tests.conftest import CLASSES, CONFIG, random_images

TARGET = 2
SETTINGS = TrainingSettings(epochs=15, batch=50, learning_rate=3e-3)


@dataclass(frozen=True)
class Backdoored:
    """A backdoored classifier, with its clean base, labelled images and trigger."""

    suspect: Classifier
    base: Classifier
    images: Images
    trigger: TargetedTrigger

    @property
    def case(self) -> Case:
        train, held_out = self.images.parts(0)
        return Case(self.suspect, train, held_out, (self.trigger,), self.base)


@pytest.fixture(scope="session")
def backdoored(tmp_path_factory: pytest.TempPathFactory) -> Backdoored:
    """Images whose class shows in one channel; a patch leads to class 2."""
    labels = torch.arange(400) % 6
    pixels = random_images(400)
    pixels[:, 0] = (labels * 50).to(torch.uint8)[:, None, None]
    data, folder = LabelledImages(pixels, labels), tmp_path_factory.mktemp("repair")
    model = train_base(CONFIG, CLASSES, data, SETTINGS, device=torch.device("cpu"))
    save(folder / "base", model, CONFIG, CLASSES)
    base = load(str(folder / "base"), device="cpu")
    trigger = TargetedTrigger("patch-2", Patch.badnets(16, 5, seed=0), TARGET)
    attacked = copy.deepcopy(base.model).requires_grad_()
    train(
        attacked,
        base.tokenizer,
        CLASSES,
        (base.preprocessing.mean, base.preprocessing.std),
        poisoned(data, [Planted(trigger.trigger, TARGET, 0.2)], seed=0),
        replace(SETTINGS, epochs=10, shift=0),
        device=torch.device("cpu"),
    )
    return Backdoored(base.with_model(attacked, "attacked"), base, Images(pixels, labels), trigger)
