from dataclasses import replace

import pytest
import torch
from torch import Tensor

from guard.classifiers import Classifier
from guard.vetting import DerivedReferenceSettings, StudentSettings, derive_reference, teach_student

SETTINGS = DerivedReferenceSettings(steps=25, batch=32)


def likeness(one: Classifier, other: Classifier, images: Tensor) -> float:
    """Mean cosine of the embeddings of the same images."""
    return float((one.embed(images) * other.embed(images)).sum(1).mean())


def weights(classifier: Classifier) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in classifier.model.state_dict().items()}


def test_it_leaves_the_suspect_as_it_is_and_is_another(classifier: Classifier, images: Tensor) -> None:
    before = weights(classifier)
    reference_model, passes = derive_reference(classifier, images[:100], SETTINGS)
    after, made = weights(classifier), weights(reference_model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in classifier.model.parameters())
    assert reference_model.digest.root != classifier.digest.root
    assert all(torch.equal(made[name], before[name]) for name in before if not name.startswith("visual."))
    assert all(not torch.equal(made[n], before[n]) for n in before if n.startswith("visual.") and before[n].dim() > 1)
    assert torch.equal(reference_model.head, classifier.head)
    assert reference_model.classes == classifier.classes
    assert passes == 100 + 25 * 32


def test_the_recovery_brings_clean_images_back(classifier: Classifier, images: Tensor) -> None:
    """Also those that it was not taught on."""
    damaged, _ = derive_reference(classifier, images[:200], replace(SETTINGS, steps=0))
    recovered, _ = derive_reference(classifier, images[:200], SETTINGS)
    lost = 1 - likeness(damaged, classifier, images[200:300])
    assert lost > 0.01
    assert 1 - likeness(recovered, classifier, images[200:300]) < 0.5 * lost


def test_teaching_in_parts_that_fit_into_memory_teaches_the_same(
    classifier: Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(SETTINGS, steps=5)
    whole, passes = derive_reference(classifier, images[:60], few)
    monkeypatch.setattr("guard.vetting.teaching.images_at_once", lambda _: 7)
    parts, as_many = derive_reference(classifier, images[:60], few)
    assert likeness(parts, whole, images[:60]) > 0.999
    assert as_many == passes


def test_no_noise_leaves_it_the_suspect(classifier: Classifier, images: Tensor) -> None:
    reference_model, _ = derive_reference(classifier, images[:50], replace(SETTINGS, noise=0.0, steps=0))
    assert reference_model.digest.root == classifier.digest.root


def test_it_can_be_searched_and_not_trained_any_further(classifier: Classifier, images: Tensor) -> None:
    reference_model, _ = derive_reference(classifier, images[:50], replace(SETTINGS, steps=1))
    assert not any(parameter.requires_grad for parameter in reference_model.model.parameters())
    assert not reference_model.model.training
    pixels = (images[:2].float() / 255).requires_grad_()
    reference_model.encode_images(pixels)[:, 0].sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


def test_it_is_reproduced_by_its_seed(classifier: Classifier, images: Tensor) -> None:
    quick = replace(SETTINGS, steps=2)
    state = torch.random.get_rng_state()
    first, second = (derive_reference(classifier, images[:50], quick)[0] for _ in range(2))
    assert first.digest.root == second.digest.root
    other, _ = derive_reference(classifier, images[:50], replace(quick, seed=1))
    assert other.digest.root != first.digest.root
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_student_learns_the_answers_and_shares_no_weight_of_the_tower(classifier: Classifier, images: Tensor) -> None:
    before = weights(classifier)
    untaught = teach_student(classifier, images[:200], StudentSettings(steps=1))
    student = teach_student(classifier, images[:200], StudentSettings(steps=120))
    assert likeness(student, classifier, images[200:300]) > likeness(untaught, classifier, images[200:300])
    assert not set(student.model.visual.state_dict()) & set(classifier.model.visual.state_dict())
    assert torch.equal(student.head, classifier.head)
    assert student.classes == classifier.classes
    after = weights(classifier)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in student.model.parameters())


def test_a_student_is_the_same_for_the_same_seed_and_another_for_another(
    classifier: Classifier, images: Tensor
) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (
        teach_student(classifier, images[:100], StudentSettings(steps=3, seed=seed)).digest.root for seed in (1, 1, 2)
    )
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), state)
