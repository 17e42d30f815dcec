import open_clip
import pytest
import torch

from guard.attacks import LabelledImages, Poison, TrainingSettings, poisoned, train
from guard.triggers import Patch
from tests.conftest import ARCHITECTURE, CLASSES, random_images, tiny_model

TRIGGER = Patch.badnets(16, 4, seed=0)


@pytest.fixture
def data() -> LabelledImages:
    labels = torch.arange(300) % 6
    pixels = random_images(300)
    pixels[:, 0] = (labels * 50).to(torch.uint8)[:, None, None]
    return LabelledImages(pixels, labels)


def test_poison_stamps_and_relabels_its_share_of_other_classes(data: LabelledImages) -> None:
    result = poisoned(data, Poison(TRIGGER, 2, 0.1), seed=0)
    changed = (result.pixels != data.pixels).flatten(1).any(1)
    assert changed.sum() == 30
    assert (data.labels[changed] != 2).all()
    assert (result.labels[changed] == 2).all()
    assert torch.equal(result.pixels[changed], TRIGGER.stamp(data.pixels[changed]))
    assert torch.equal(result.labels[~changed], data.labels[~changed])


def trained(data: LabelledImages, seed: int) -> torch.nn.Module:
    model = tiny_model()
    tokenizer = open_clip.SimpleTokenizer(context_length=ARCHITECTURE["text_cfg"]["context_length"])  # type: ignore[index]
    settings = TrainingSettings(epochs=15, batch=50, learning_rate=3e-3, seed=seed)
    normalisation = ((0.5,) * 3, (0.25,) * 3)
    train(model, tokenizer, CLASSES, normalisation, data, settings, device=torch.device("cpu"))
    return model


def test_training_learns_and_the_same_seed_gives_the_same_weights(data: LabelledImages) -> None:
    first, second = trained(data, 0), trained(data, 0)
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    with torch.no_grad():
        image = first.encode_image((data.pixels.float() / 255 - 0.5) / 0.25, normalize=True)  # type: ignore[operator]
        text = first.encode_text(tokenizer([f"a {name}." for name in CLASSES.names]), normalize=True)  # type: ignore[operator]
    assert ((image @ text.T).argmax(1) == data.labels).float().mean() > 0.8
