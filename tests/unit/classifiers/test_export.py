import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from guard.classifiers import Classifier, ExportedClassifier, export, exporting
from guard.errors import ExportError, ImageError, ModelError


def test_one_pass_gives_the_models_embedding_and_scores(
    exported: Path, classifier: Classifier, images: torch.Tensor
) -> None:
    model = ExportedClassifier(exported, gpu=False)
    embeddings, logits = model.run(model.preprocessing.normalise(images[:7].numpy()))
    expected = classifier.embed(images[:7])
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(logits, classifier.logits(expected).numpy(), atol=1e-3)
    assert model.digest == classifier.digest.root
    assert model.classes == classifier.classes
    assert model.provider == "CPUExecutionProvider"


def test_an_export_that_differs_is_an_error_and_leaves_nothing(
    classifier: Classifier, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    with pytest.raises(ExportError, match="differs"):
        export(classifier, tmp_path / "out", images)
    assert not list(tmp_path.iterdir())


def test_parity_needs_enough_images(classifier: Classifier, images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="at least 256"):
        export(classifier, tmp_path / "out", images[:255])


@pytest.mark.parametrize("file", ["model.onnx", "classifier.json"])
def test_missing_damaged_or_swapped_files_are_refused(exported: Path, tmp_path: Path, file: str) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    path = copy / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ModelError, match=file.replace(".", r"\.")):
        ExportedClassifier(copy)
    path.unlink()
    with pytest.raises(ModelError, match=file.replace(".", r"\.")):
        ExportedClassifier(copy)
