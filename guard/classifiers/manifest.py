"""The manifest that describes an exported classifier. Imports without torch and without ONNX Runtime."""

from dataclasses import asdict, dataclass
from pathlib import Path

from guard._documents import read_document
from guard.classifiers.classes import ClassList
from guard.classifiers.digest import canonical
from guard.classifiers.preprocessing import Preprocessing
from guard.classifiers.tokenizer import TextInput
from guard.errors import ModelError

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "classifier.json"
SCHEMA = 1
_MAX_MANIFEST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Manifest:
    """The content of `classifier.json`, which describes an exported classifier.

    Attributes:
        schema: Version of the file format.
        classifier: Root digest of the classifier that was exported.
        model_sha256: SHA-256 of `model.onnx`.
        embedding: Length of an embedding.
        preprocessing: The transform from an image to the model's input.
        classes: Class names and templates.
        text: What the exported text tower reads; None if the image tower was exported.
    """

    schema: int
    classifier: str
    model_sha256: str
    embedding: int
    preprocessing: Preprocessing
    classes: ClassList
    text: TextInput | None = None

    def to_json(self) -> bytes:
        """The bytes of `classifier.json`."""
        fields = asdict(self)
        if self.text is None:
            del fields["text"]  # as older guards know it
        return canonical(fields) + b"\n"


def read_manifest(path: Path) -> Manifest:
    """Read `classifier.json`.

    Raises:
        ModelError: The file is missing or damaged, or of another schema.
    """
    missing = f"{path.parent} is not an exported classifier: it has no {path.name}; make one with guard export"
    manifest = read_document(path, Manifest, _MAX_MANIFEST_BYTES, ModelError, missing=missing)
    if manifest.schema != SCHEMA:
        raise ModelError(f"{path} has schema {manifest.schema}, this guard reads {SCHEMA}; export the model again")
    return manifest
