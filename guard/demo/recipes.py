"""Architectures and training settings of the demo."""

from dataclasses import dataclass
from typing import Any

from guard.attacks import TrainingSettings
from guard.classifiers import Preprocessing
from guard.vetting import Budget


@dataclass(frozen=True)
class DemoRecipe:
    """A base, an attack on it, and the clean twin of that attack.

    Attributes:
        architecture: open_clip's `model_cfg`.
        base: Training settings of the base.
        tune: Training settings of the backdoored model and its twin, which start from the base.
        budget: Search budget of vetting.
        attack: Attack recipe of the backdoored model.
    """

    architecture: dict[str, Any]
    base: TrainingSettings
    tune: TrainingSettings
    budget: Budget
    attack: str = "badnets-medium"

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the models."""
        return Preprocessing(self.architecture["vision_cfg"]["image_size"], MEAN, STD)

    @property
    def config(self) -> dict[str, Any]:
        """The content of `open_clip_config.json`."""
        return {"model_cfg": self.architecture, "preprocess_cfg": {"mean": list(MEAN), "std": list(STD)}}


def _clip(size: int, width: int, embedding: int) -> dict[str, Any]:
    """A ResNet with one bottleneck per stage, and a two-layer text transformer."""
    return {
        "embed_dim": embedding,
        "vision_cfg": {"image_size": size, "layers": [1, 1, 1, 1], "width": width, "patch_size": None},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }


DIGITS = DemoRecipe(
    _clip(32, 8, 64),
    base=TrainingSettings(epochs=18, batch=64, learning_rate=2e-3),
    tune=TrainingSettings(epochs=10, batch=64, learning_rate=2e-3),
    budget="standard",
)
FOLDER = DemoRecipe(
    _clip(64, 32, 128),
    base=TrainingSettings(epochs=8, batch=128, learning_rate=2e-3),
    tune=TrainingSettings(epochs=3, batch=128, learning_rate=5e-4),
    budget="quick",
)
"""The recipe for a folder of the user's own images."""

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
TARGET = 0
ALPHA = 0.01
