from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guard.classifiers import Classifier, load, save
from guard.errors import ImageError, UsageError
from guard.triggers import FAMILIES, Patch
from guard.vetting import BUDGETS, examination, inversion, reconstruct, vet
from tests.conftest import CLASSES, CONFIG, random_images, tiny_model

FAST = replace(BUDGETS["quick"], steps=40, batch=16)


@pytest.fixture
def base(tmp_path: Path) -> Classifier:
    save(tmp_path / "base", tiny_model(1), CONFIG, CLASSES)
    return load(str(tmp_path / "base"), device="cpu")


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "quick", FAST)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_reconstruction_is_reproducible_and_measured_on_other_images(
    classifier: Classifier, images: torch.Tensor, family: type[Patch]
) -> None:
    targets = torch.arange(6)
    first, second = (reconstruct(classifier, family, images[:100], images[100:200], targets, FAST) for _ in range(2))
    assert [item.target for item in first] == list(range(6))
    assert [item.norm for item in first] == [item.norm for item in second]
    for item in first:
        measured = inversion.effect(classifier, item.trigger, item.target, images[100:200])
        assert item.success == pytest.approx(measured.success)
        assert item.norm == pytest.approx(float(item.trigger.norm()), rel=1e-4)
        assert item.passes >= FAST.batch


def test_a_planted_shortcut_needs_the_smallest_patch(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class is a bright quarter of the image; class 0 is also reached by two pixels."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 2).flatten(1)
        shortcut = pixels[:, 0, 15, 14:16].mean(1) - pixels[:, 2, 15, 14:16].mean(1)
        return torch.stack(
            [means[:, 0] + torch.nn.functional.softplus(6 * (shortcut - 0.4)), *means[:, 1:].unbind(1)], 1
        )

    monkeypatch.setattr(classifier, "encode_images", encode)
    monkeypatch.setattr(classifier, "logits", lambda embeddings: 20 * embeddings)
    noise = random_images(200, seed=3)
    found = reconstruct(classifier, Patch, noise[:100], noise[100:], torch.arange(4), replace(FAST, steps=150))
    norms = [item.norm for item in found]
    assert all(item.reached for item in found)
    assert norms[0] < 0.5 * min(norms[1:])
    assert found[0].trigger.mask[0, 15, 14:16].sum() > 0.8 * norms[0]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_fast")
def test_an_interrupted_vetting_goes_on_and_repeats_nothing(
    classifier: Classifier, base: Classifier, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: object, **named: object) -> object:
        calls.append(arguments[:2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reconstruct(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(examination, "reconstruct", counted)
    with pytest.raises(KeyboardInterrupt):
        vet(classifier, images, base=base, budget="quick", cache=tmp_path / "searches")
    resumed = vet(classifier, images, base=base, budget="quick", cache=tmp_path / "searches")
    strengthened = len(resumed.triggers)
    assert len(calls) == 5 + strengthened  # two finished, one interrupted, two left of four
    whole = vet(classifier, images, base=base, budget="quick")
    assert [item.classes for item in whole.evidence] == [item.classes for item in resumed.evidence]
    assert whole.verdict == resumed.verdict


@pytest.mark.usefixtures("_fast")
def test_a_damaged_cache_is_searched_again(classifier: Classifier, images: torch.Tensor, tmp_path: Path) -> None:
    first = vet(classifier, images, families=["patch"], budget="quick", cache=tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert vet(classifier, images, families=["patch"], budget="quick", cache=tmp_path).verdict == first.verdict


@pytest.mark.usefixtures("_fast")
def test_the_evidence_says_what_it_is(classifier: Classifier, base: Classifier, images: torch.Tensor) -> None:
    vetting = vet(classifier, images, base=base, budget="quick", seed=5)
    assert [item.family for item in vetting.evidence] == list(FAMILIES)
    assert vetting.base == base.digest.root
    assert vetting.images == (256, 256)
    for item in vetting.evidence:
        assert item.control == "base"
        assert item.seed == 5
        assert [entry.name for entry in item.classes] == list(CLASSES.names)
    assert vetting.passes == sum(item.passes for item in vetting.evidence)
    assert {item.control for item in vet(classifier, images, budget="quick").evidence} == {"classes"}


def test_a_base_that_proves_nothing_is_refused(classifier: Classifier, images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model itself"):
        vet(classifier, images, base=classifier)
    other = replace(CLASSES, names=("a", "b", "c", "d", "e", "f"))
    save(tmp_path / "other", tiny_model(1), CONFIG, other)
    with pytest.raises(UsageError, match="other classes"):
        vet(classifier, images, base=load(str(tmp_path / "other"), device="cpu"))


def test_too_few_images_are_refused(classifier: Classifier, images: torch.Tensor) -> None:
    with pytest.raises(ImageError, match="at least 64"):
        vet(classifier, images[:63])
