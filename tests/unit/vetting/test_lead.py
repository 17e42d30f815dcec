import pytest
import torch

from guard.classifiers import Classifier
from guard.classifiers.prompts import Kind, PromptedClassifier
from guard.triggers import FAMILIES, InvertibleTrigger
from guard.vetting import InspectionSettings, Inspector, Lead, memory
from guard.vetting.lead import margin
from tests.conftest import random_images
from tests.toy import checkerboard, toy
from tests.unit.classifiers.test_prompts import learner

IMAGES = random_images(40)
INDEX = torch.arange(40)
TARGETS = torch.tensor([3, 5])


def stamped(lead: Lead, strength: float) -> torch.Tensor:
    """A checkerboard on every image, for both targets."""
    return (lead.pixels(INDEX) + strength * checkerboard())[None].expand(2, -1, -1, -1, -1)


def test_the_margin_by_hand() -> None:
    logits = torch.tensor([[[1.0, 4.0, 2.0], [0.0, 5.0, 7.0]]]).expand(2, -1, -1)
    torch.testing.assert_close(margin(logits, torch.tensor([0, 1])), torch.tensor([[3.0, 7.0], [-2.0, 2.0]]))


def test_a_distance_is_in_units_of_the_answers_own_margin() -> None:
    suspect = toy(target=3)
    lead = Lead(suspect, IMAGES)
    logits = suspect.logits(suspect.embed(IMAGES))
    top = logits.topk(2).values
    expected = margin(logits.expand(2, -1, -1), TARGETS) / (top[:, 0] - top[:, 1]).median()
    torch.testing.assert_close(lead.distance(stamped(lead, 0), INDEX, TARGETS), expected)
    own = lead.distance(lead.pixels(INDEX)[:, None], INDEX[:1], suspect.predict(suspect.embed(IMAGES)))
    assert float((-own).median()) == pytest.approx(1)


@pytest.mark.parametrize("controlled", [False, True])
def test_untouched_images_are_where_they_are_without_a_trigger(*, controlled: bool) -> None:
    lead = Lead(toy(target=3), IMAGES, toy(jitter=0.1) if controlled else None)
    index = INDEX[5:20]
    distance = lead.distance(lead.pixels(index)[None].expand(2, -1, -1, -1, -1), index, TARGETS)
    torch.testing.assert_close(lead.untouched(index, TARGETS), distance, rtol=1e-4, atol=1e-5)


def test_it_means_the_same_for_every_logit_scale() -> None:
    distances = [
        lead.distance(stamped(lead, 0.05), INDEX, TARGETS)
        for lead in (
            Lead(toy(target=3, scale=scale), IMAGES, toy(scale=1 / scale) if controlled else None)
            for controlled in (False, True)
            for scale in (1.0, 100.0)
        )
    ]
    torch.testing.assert_close(distances[0], distances[1])
    torch.testing.assert_close(distances[2], distances[3])


def test_what_moves_both_models_alike_gains_nothing() -> None:
    """With the suspect as its own reference model the way to the target is as long as without a trigger."""
    suspect = toy(target=3)
    alone, twinned = Lead(suspect, IMAGES), Lead(suspect, IMAGES, suspect)
    untouched = alone.distance(stamped(alone, 0), INDEX, TARGETS)
    moved = alone.distance(stamped(alone, 0.05), INDEX, TARGETS)
    assert (moved[0] < untouched[0]).all()
    torch.testing.assert_close(twinned.distance(stamped(alone, 0.05), INDEX, TARGETS)[0], untouched[0])


def test_a_control_that_the_trigger_does_not_move_changes_nothing() -> None:
    suspect, base = toy(target=3), toy()
    alone, compared = Lead(suspect, IMAGES), Lead(suspect, IMAGES, base)
    moved = alone.distance(stamped(alone, 0.05), INDEX, TARGETS)
    gain = float((alone.distance(stamped(alone, 0), INDEX, TARGETS) - moved)[0].mean())
    assert gain > 3
    torch.testing.assert_close(
        compared.distance(stamped(alone, 0.05), INDEX, TARGETS)[0], moved[0], rtol=0, atol=0.05 * gain
    )


def test_a_control_adds_what_the_trigger_takes_there_and_never_less_than_nothing() -> None:
    suspect, base = toy(), toy(target=3)
    alone, compared, there = Lead(suspect, IMAGES), Lead(suspect, IMAGES, base), Lead(base, IMAGES)
    for strength in (-0.05, 0.05):
        taken = there.distance(stamped(there, 0), INDEX, TARGETS) - there.distance(
            stamped(there, strength), INDEX, TARGETS
        )
        expected = alone.distance(stamped(alone, strength), INDEX, TARGETS) + taken.clamp(min=0)
        torch.testing.assert_close(compared.distance(stamped(compared, strength), INDEX, TARGETS), expected)
        assert (taken[0] > 0).all() == (strength > 0)


def test_images_of_the_class_on_either_model_say_nothing() -> None:
    suspect, base = toy(), toy(jitter=0.5)
    there, here = (model.predict(model.embed(IMAGES)) for model in (base, suspect))
    assert (there != here).any()
    for target in range(10):
        targets = torch.tensor([target])
        away = Lead(suspect, IMAGES).eligible(INDEX, targets)
        assert torch.equal(away[0].bool(), here != target)
        both = Lead(suspect, IMAGES, base).eligible(INDEX[5:20], targets)
        assert torch.equal(both[0].bool(), ((here != target) & (there != target))[5:20])


def test_towers_are_counted() -> None:
    assert Lead(toy(), IMAGES).towers == 1
    assert Lead(toy(), IMAGES, toy(jitter=0.1)).towers == 2


@pytest.mark.parametrize("at_once", [3, 45])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_search_in_parts_finds_what_it_finds_at_once(
    family: type[InvertibleTrigger], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 images at once divide the images of a class, 45 divide the classes."""

    def search() -> list[tuple[float, float]]:
        inspector = Inspector(Lead(toy(5, target=3), IMAGES, toy(5)), family, torch.arange(5), settings)
        return [(item.lead, item.success) for item in inspector.run(4, range(5))]

    settings = InspectionSettings(steps=4, batch=20)
    whole = search()
    monkeypatch.setattr("guard.vetting.lead.images_at_once", lambda _: at_once)
    torch.testing.assert_close(torch.tensor(search()), torch.tensor(whole), rtol=0.03, atol=0.03)


def test_what_a_backward_pass_needs_is_counted_in_bytes(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image takes more than its own pixels, in every tower; and one image at least goes through."""
    pixels = 4 * 3 * classifier.preprocessing.size**2
    monkeypatch.setattr(memory, "_ON_CPU", 1000 * pixels)
    alone, both = memory.images_at_once([classifier]), memory.images_at_once([classifier, classifier])
    assert 2 <= alone < 1000
    assert both == alone // 2
    monkeypatch.setattr(memory, "_ON_CPU", 1)
    assert memory.images_at_once([classifier]) == 1


@pytest.mark.parametrize("kind", ["coop", "cocoop", "visual"])
def test_a_prompt_learner_and_its_towers_share_what_the_image_tower_gives_only_where_it_is_the_same(
    kind: Kind, classifier: Classifier, images: torch.Tensor
) -> None:
    suspect = PromptedClassifier(classifier, learner(kind))
    apart = classifier.with_model(classifier.model, "the same towers, as another classifier")
    index, targets = torch.arange(12), torch.tensor([1, 4])
    together, separate = (Lead(suspect, images[:12], base) for base in (classifier, apart))
    assert (together.towers, separate.towers) == (2 if kind == "visual" else 1, 2)
    pixels = (together.pixels(index) * 0.8)[None].expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        found = together.distance(pixels, index, targets)
        torch.testing.assert_close(found, separate.distance(pixels, index, targets))


def test_among_rivals_a_distance_is_that_to_the_classes_that_were_strongest(
    classifier: Classifier, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspect, index, targets = PromptedClassifier(classifier, learner("cocoop")), torch.arange(12), torch.tensor([1, 4])
    pixels = (images[:12].float() / 255)[None].expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        monkeypatch.setattr("guard.vetting.lead.RIVALS", 5)  # all other classes
        exact = Lead(suspect, images[:12]).distance(pixels, index, targets)
        monkeypatch.setattr("guard.vetting.lead.RIVALS", 2)
        few = Lead(suspect, images[:12]).distance(pixels, index, targets)
        none = Lead(suspect, images[:12]).distance(pixels * 0, index, targets)
    # Without a trigger the strongest other class is among those that are looked at.
    torch.testing.assert_close(few, exact)
    assert not torch.allclose(none, exact)
