"""Load, encode, classify, digest, and export CLIP classifiers.

The package imports none of torch, open_clip, ONNX Runtime and Pillow; each is loaded when a name that needs it is first
used. Preprocessing, images and the exported classifier, which a sidecar uses, never load torch.
"""

from typing import TYPE_CHECKING

from guard._lazy import lazy
from guard.classifiers.classes import ClassList
from guard.classifiers.digest import ClassifierDigest
from guard.classifiers.loading import load
from guard.classifiers.open_clip import save
from guard.classifiers.preprocessing import Preprocessing

if TYPE_CHECKING:
    from guard.classifiers.classifier import Classifier
    from guard.classifiers.exported import ExportedClassifier
    from guard.classifiers.exporting import ExportParity, export
    from guard.classifiers.hugging_face.weights import save_hugging_face
    from guard.classifiers.images import ImageFolder, decode, decode_unambiguous, encode
    from guard.classifiers.text_exporting import export_text
    from guard.classifiers.text_tower import TextTower
    from guard.classifiers.tokenizer import MAX_TEXT, TextInput, Tokenizer

__all__ = [
    "MAX_TEXT",
    "ClassList",
    "Classifier",
    "ClassifierDigest",
    "ExportParity",
    "ExportedClassifier",
    "ImageFolder",
    "Preprocessing",
    "TextInput",
    "TextTower",
    "Tokenizer",
    "decode",
    "decode_unambiguous",
    "encode",
    "export",
    "export_text",
    "load",
    "save",
    "save_hugging_face",
]

__getattr__ = lazy(
    __name__,
    {
        "Classifier": "classifier",
        "ExportParity": "exporting",
        "ExportedClassifier": "exported",
        "ImageFolder": "images",
        "TextTower": "text_tower",
        **dict.fromkeys(("MAX_TEXT", "TextInput", "Tokenizer"), "tokenizer"),
        "decode": "images",
        "decode_unambiguous": "images",
        "encode": "images",
        "export": "exporting",
        "export_text": "text_exporting",
        "save_hugging_face": "hugging_face.weights",
    },
)
