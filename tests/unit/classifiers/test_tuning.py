"""Fine-tuning: the same gradient in parts, and the same weights after a kill."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from guard.classifiers.checkpoints import Checkpoint
from guard.classifiers.tuning import SCHEDULES, Inputs, TuningSettings, tune

COUNT = 24
SETTINGS = TuningSettings(steps=12, batch=8, learning_rate=1e-2, seed=3)


class KilledError(Exception):
    """Stands for a kill."""


class Contrast:
    """A loss that couples all images of a batch, as the contrastive one does."""

    def __init__(self, model: nn.Module, until: int | None = None) -> None:
        self.model, self.until = model, until
        self.sizes: list[int] = []
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(COUNT, 5, generator=generator)
        self.steps = 0

    def inputs(self, index: Tensor, generator: torch.Generator) -> Inputs:
        if self.steps == self.until:
            raise KilledError
        self.steps += 1
        return self.points[index] + 0.1 * torch.randn(len(index), 5, generator=generator), self.points[index]

    def embed(self, inputs: Inputs) -> Inputs:
        self.sizes.append(len(inputs[0]))
        first, second = (normalize(self.model(each), dim=1) for each in inputs)
        return first, second

    def loss(self, embeddings: Inputs, inputs: Inputs, done: float) -> Tensor:  # noqa: ARG002 - as an objective has them
        logits = 5 * embeddings[0] @ embeddings[1].T
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 4))


def trained(settings: TuningSettings = SETTINGS, **more: object) -> tuple[nn.Module, Contrast]:
    model = network()
    objective = Contrast(model)
    tune(model, list(model.parameters()), objective, COUNT, settings, **more)  # type: ignore[arg-type]
    return model, objective


def weights(model: nn.Module) -> Tensor:
    return torch.cat([each.flatten() for each in model.parameters()]).detach()


def test_a_batch_in_parts_gives_the_same_weights_as_a_whole_one() -> None:
    whole, _ = trained()
    parts, objective = trained(replace(SETTINGS, forward_batch=3))
    assert max(objective.sizes) == 3
    assert torch.allclose(weights(whole), weights(parts), atol=1e-5)
    assert not torch.allclose(weights(whole), weights(network()), atol=1e-2)


def test_a_run_that_was_killed_and_begun_again_gives_the_same_weights(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    model = network()
    with pytest.raises(KilledError):
        tune(model, list(model.parameters()), Contrast(model, 7), COUNT, SETTINGS,
             checkpoint=Checkpoint(path, "mine", every=0))  # fmt: skip
    assert path.exists()
    continued = network()
    objective = Contrast(continued)
    cost = tune(continued, list(continued.parameters()), objective, COUNT, SETTINGS,
                checkpoint=Checkpoint(path, "mine", every=0))  # fmt: skip
    assert cost.resumed == 7
    assert objective.steps == SETTINGS.steps - 7
    assert torch.equal(weights(continued), weights(trained()[0]))
    finished = network()
    cost = tune(finished, list(finished.parameters()), Contrast(finished, 0), COUNT, SETTINGS,
                checkpoint=Checkpoint(path, "mine", every=0))  # fmt: skip
    assert cost.resumed == SETTINGS.steps
    assert torch.equal(weights(finished), weights(continued))


@pytest.mark.parametrize("damage", ["another training", "damaged"])
def test_what_another_training_left_is_not_taken_up(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "training.safetensors"
    model = network()
    with pytest.raises(KilledError):
        tune(model, list(model.parameters()), Contrast(model, 7), COUNT, SETTINGS,
             checkpoint=Checkpoint(path, "theirs", every=0))  # fmt: skip
    if damage == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    identity = "mine" if damage == "another training" else "theirs"
    found, _ = trained(checkpoint=Checkpoint(path, identity, every=0))
    assert torch.equal(weights(found), weights(trained()[0]))


def test_the_course_of_par_is_the_published_one() -> None:
    course = SCHEDULES["perturb-recover"]
    rates = [3e-5 * course(done) for done in (0, 0.25, 0.5, 1)]
    assert rates == pytest.approx([3e-5, 1.65e-5, 3e-6, 1e-9], rel=1e-6)
