"""A tiny classifier that has learned its training images."""

import pytest
import torch

from guard.attacks import LabelledImages, TrainingSettings, train_base
from guard.attacks.generators import natural_generator
from guard.attacks.optimised import OPTIMISED
from guard.classifiers import Classifier, load, save
from tests.conftest import CLASSES, CONFIG, random_images

SETTINGS = TrainingSettings(epochs=15, batch=50, learning_rate=3e-3)


@pytest.fixture(scope="session")
def data() -> LabelledImages:
    """300 images whose class shows in one channel."""
    labels = torch.arange(300) % 6
    pixels = random_images(300)
    pixels[:, 0] = (labels * 50).to(torch.uint8)[:, None, None]
    return LabelledImages(pixels, labels)


@pytest.fixture(scope="session")
def base(data: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """Trained on them."""
    directory = tmp_path_factory.mktemp("attacks") / "base"
    model = train_base(CONFIG, CLASSES, data, SETTINGS, device=torch.device("cpu"))
    save(directory, model, CONFIG, CLASSES)
    return load(str(directory), device="cpu")


@pytest.fixture
def quick_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes with a generator start from one that was hardly pretrained."""
    monkeypatch.setitem(
        OPTIMISED,
        "natural-generator",
        lambda classifier, images, _target, seed: natural_generator(classifier, images, seed=seed, steps=5),
    )
