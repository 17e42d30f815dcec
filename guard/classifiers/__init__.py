"""Load, encode, classify, digest, and export CLIP classifiers.

What a sidecar needs (preprocessing, images, the exported classifier) imports without torch; the rest loads torch and
open_clip on first use.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.classifiers.classes import ClassList
from guard.classifiers.digest import ClassifierDigest
from guard.classifiers.exported import ExportedClassifier
from guard.classifiers.images import ImageFolder, decode
from guard.classifiers.loading import load
from guard.classifiers.open_clip import save
from guard.classifiers.preprocessing import Preprocessing

if TYPE_CHECKING:
    from guard.classifiers.classifier import Classifier
    from guard.classifiers.exporting import ExportParity, export
    from guard.classifiers.hugging_face.weights import save_hugging_face

__all__ = [
    "ClassList",
    "Classifier",
    "ClassifierDigest",
    "ExportParity",
    "ExportedClassifier",
    "ImageFolder",
    "Preprocessing",
    "decode",
    "export",
    "load",
    "save",
    "save_hugging_face",
]

__getattr__ = lazy(
    __name__,
    {
        "Classifier": "classifier",
        "ExportParity": "exporting",
        "export": "exporting",
        "save_hugging_face": "hugging_face.weights",
    },
)
