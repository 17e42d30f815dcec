import pytest
import torch
from torch import Tensor

from guard.classifiers import Classifier
from guard.classifiers.tuning import falling
from guard.vetting import StudentSettings, teach_student
from guard.vetting.disturbances import DISTURBANCES, _Draw, augmented, disturbed
from guard.vetting.teaching import teach


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("change", [augmented, disturbed])
def test_changed_images_are_images_and_depend_on_the_seed_alone(change: object, images: Tensor) -> None:
    pixels = images[:40].float() / 255
    assert callable(change)
    state = torch.random.get_rng_state()
    changed = change(pixels, seeded())
    assert changed.shape == pixels.shape
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert torch.equal(changed, change(pixels, seeded()))
    assert not torch.equal(changed, change(pixels, seeded(1)))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(DISTURBANCES))
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 33, 47)])
def test_every_disturbance_changes_an_image_and_leaves_its_content(name: str, shape: tuple[int, int, int]) -> None:
    """Content: the changed image is nearer to its own original than to any other image."""
    pixels = torch.rand(6, 3, 4, 4, generator=seeded())
    pixels = torch.nn.functional.interpolate(pixels, size=shape[1:], mode="bicubic").clamp(0, 1)
    changed = DISTURBANCES[name](pixels.clone(), pixels, _Draw(seeded(3)))
    assert changed.shape == pixels.shape
    assert (changed - pixels).abs().max() > 1e-3
    distances = torch.cdist(changed.clamp(0, 1).flatten(1), pixels.flatten(1))
    assert (distances.argmin(1) == torch.arange(6)).all()


def test_a_pupil_learns_the_answers_to_undisturbed_images(classifier: Classifier, images: Tensor) -> None:
    """The teacher is never asked about a changed image: what only a change brings out of it cannot be taught."""
    asked: list[Tensor] = []

    class Watched(Classifier):
        def encode_images(self, pixels: Tensor) -> Tensor:
            asked.append(pixels.cpu())
            return super().encode_images(pixels)

    teacher = Watched(
        classifier.model, classifier.config, classifier.tokenizer, classifier.preprocessing, classifier.classes,
        source="watched", device=classifier.device,
    )  # fmt: skip
    pupil = teach_student(classifier, images[:50], StudentSettings(steps=1))
    teach(
        pupil, teacher, images[:50], steps=5, batch=16, learning_rate=1e-3, weight_decay=0.0, schedule=falling,
        generator=seeded(),
    )  # fmt: skip
    seen = torch.cat(asked)
    assert len(seen) == 50
    assert torch.equal((seen * 255).round().to(torch.uint8), images[:50])
