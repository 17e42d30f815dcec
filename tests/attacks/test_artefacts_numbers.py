"""Numbers that are not finite: one line says so, wherever they are, and no process dies of them."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guard.classifiers import Classifier, Preprocessing, export, exporting, load, save_hugging_face
from guard.errors import ExportError, ModelError
from guard.triggers import Warp
from guard.vetting import vet
from tests.conftest import random_images
from tests.toy import toy

NAN, INF = math.nan, math.inf


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def put(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[0].fill_(value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name",
    [
        "visual.proj",
        "visual.transformer.resblocks.0.ln_1.bias",
        "text_projection",
        "token_embedding.weight",
        "logit_scale",
    ],
)
def test_a_weight_that_is_not_finite_is_refused(model_directory: Path, tmp_path: Path, name: str, value: float) -> None:
    copy = Path(shutil.copytree(model_directory, tmp_path / "model"))
    edit(copy / "open_clip_model.safetensors", put(name, value))
    with pytest.raises(ModelError, match=f"computes no finite numbers: its tensor '{name}'") as caught:
        load(str(copy), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["visual_projection.weight", "text_projection.weight", "logit_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_so_is_one_of_a_hugging_face_directory(
    classifier: Classifier, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    save_hugging_face(tmp_path / "model", classifier)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        put(name, NAN)(tensors)
        tensors.update({key: value.to(dtype) for key, value in tensors.items()})

    edit(tmp_path / "model" / "model.safetensors", change)
    with pytest.raises(ModelError, match="computes no finite numbers"):
        load(str(tmp_path / "model"), device="cpu")


@pytest.mark.parametrize("scale", [88.8, 200.0, 1e30])
def test_a_scale_that_overflows_is_refused(model_directory: Path, tmp_path: Path, scale: float) -> None:
    copy = Path(shutil.copytree(model_directory, tmp_path / "model"))
    edit(copy / "open_clip_model.safetensors", put("logit_scale", scale))
    with pytest.raises(ModelError, match=r"exp\(logit_scale\) overflows"):
        load(str(copy), device="cpu")


@pytest.mark.parametrize("scale", [40.0, 88.0, -100.0])
def test_finite_extremes_are_loaded(model_directory: Path, tmp_path: Path, scale: float) -> None:
    copy = Path(shutil.copytree(model_directory, tmp_path / "model"))
    edit(copy / "open_clip_model.safetensors", put("logit_scale", scale))
    loaded = load(str(copy), device="cpu")
    assert loaded.logits(loaded.embed(random_images(2))).isfinite().all()


def huge(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].fill_(3e38)


def test_finite_weights_whose_embeddings_overflow_are_refused(model_directory: Path, tmp_path: Path) -> None:
    for name, what in (("visual.proj", "images"), ("text_projection", "prompts")):
        copy = Path(shutil.copytree(model_directory, tmp_path / name))
        edit(copy / "open_clip_model.safetensors", huge(name))
        loaded = load(str(copy), device="cpu")
        with pytest.raises(ModelError, match=f"embeddings of {what} overflow"):
            _ = loaded.embed(random_images(4)) if what == "images" else loaded.head


class _Steep(torch.autograd.Function):
    """Finite values with gradients that are not."""

    @staticmethod
    def forward(_: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, torch.nan)


def test_gradients_that_are_not_finite_end_a_vetting_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    suspect = toy()
    whole = suspect.model.encode_image
    steep: Any = _Steep.apply
    monkeypatch.setattr(suspect.model, "encode_image", lambda pixels: steep(whole(pixels)))
    with pytest.raises(ModelError, match="gradients of its scores overflow"):
        vet(suspect, random_images(64), derive=False, families=("warp",), budget="quick")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_warp_to_nowhere_stays_within_its_memory(value: float) -> None:
    field = torch.full((2, 8, 8), value, requires_grad=True)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    Warp(field).apply(images).sum().backward()  # it wrote outside of its memory
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("difference", [NAN, INF])
def test_a_difference_that_is_no_number_fails_the_parity_check(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: float
) -> None:
    monkeypatch.setattr(exporting, "_write", lambda *_: None)
    monkeypatch.setattr(exporting, "ExportedClassifier", lambda *_, **__: None)
    monkeypatch.setattr(exporting, "compare", lambda *_: exporting.ExportParity(256, difference, 1.0))
    with pytest.raises(ExportError, match="differs"):
        export(classifier, tmp_path / "out", random_images(256))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((NAN, 0.5, 0.5), (1.0, 1.0, 1.0)),
        ((INF, 0.5, 0.5), (1.0, 1.0, 1.0)),
        ((1e39, 0.5, 0.5), (1.0, 1.0, 1.0)),
        ((0.5, 0.5, 0.5), (NAN, 1.0, 1.0)),
        ((0.5, 0.5, 0.5), (0.0, 1.0, 1.0)),
        ((0.5, 0.5, 0.5), (1e-300, 1.0, 1.0)),
        ((0.5, 0.5, 0.5), (1e-40, 1.0, 1.0)),
        ((0.5,), (1.0,)),
        ((0.5,) * 4, (1.0,) * 4),
    ],
)
def test_a_normalisation_that_does_not_give_numbers_is_refused(mean: Any, std: Any) -> None:
    with pytest.raises(ValueError, match=r"finite|positive|three"):
        Preprocessing(16, mean, std)
