"""Second opinions in the checker itself: with a reference model that answers what a test wants."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from guard.classifiers import Classifier, ExportedClassifier, Preprocessing
from guard.profiles import Profile
from guard.profiles.calibrating import ask
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.screening import ReferenceAnswers
from guard.sidecar import Settings
from guard.sidecar.decisions.checking import Checker
from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.loading import Loaded, make_detector
from guard.sidecar.decisions.opinions import SecondOpinions
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.policy import Decision, Outcome, Reason
from guard.sidecar.telemetry.metrics import Metrics
from tests.conftest import SIZE, random_images, tiny_model

Run = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]


class Reference:
    """Stands for an exported reference model."""

    text = None

    def __init__(self, classifier: Classifier, preprocessing: Preprocessing) -> None:
        self._classifier, self.preprocessing, self.seen = classifier, preprocessing, 0
        self.spoil: Callable[[ReferenceAnswers], None] = lambda _: None

    def run(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.seen += len(images)
        pixels = np.round(self.preprocessing.restore(images) * 255).astype(np.uint8)
        import torch

        answers = ask(self._classifier, torch.from_numpy(pixels))
        self.spoil(answers)
        return answers.embeddings, answers.logits


@pytest.fixture(scope="module")
def base(classifier: Classifier) -> Classifier:
    """The same architecture with other weights."""
    return Classifier(
        tiny_model(seed=1), classifier.config, classifier.tokenizer, classifier.preprocessing, classifier.classes,
        source="base", device=classifier.device,
    )  # fmt: skip


@pytest.fixture(scope="module")
def asking(profile: Profile, classifier: Classifier, images: Tensor, base: Classifier) -> Profile:
    return profile.calibrate(classifier, images, 0.02, reference=base)


class Bench:
    """A checker and what it is made of."""

    def __init__(self, asking: Profile, base: Classifier, exported: Path, rule: str, **more: Any) -> None:
        settings = Settings.load(None, profile=exported, model=exported, second_opinion=rule, **more)
        self.metrics, self.workers = Metrics(), Workers(2, 8)
        # Another normalisation than that of the suspect.
        self.reference = Reference(base, Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.5,) * 3))
        own, model = settings.served[0], ExportedClassifier(exported, threads=1, gpu=False)
        opinions = SecondOpinions(self.reference, model.preprocessing, rule)  # type: ignore[arg-type] # stands for one
        detector = make_detector(asking, own, opinions)
        shared = Shared(settings, self.workers, Recorder(settings, self.metrics))
        loaded = Loaded(asking, detector, model, opinions)
        self.model, self.detector, self.preprocessing = model, detector, model.preprocessing
        self.checker = Checker(loaded, own, self.metrics.of(own), shared, None)

    def check(self, images: Tensor) -> Outcome:
        values = self.preprocessing.normalise(images.numpy())
        return asyncio.run(self.checker.infer(request(values), "")).outcome

    def opinions(self, result: str) -> float:
        labels = {"model": "classifier", "version": "", "result": result}
        return self.metrics.registry.get_sample_value("guard_second_opinions_total", labels) or 0.0


@pytest.fixture
def bench(asking: Profile, base: Classifier, exported: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(rule: str = "all", **more: Any) -> Bench:
        made.append(Bench(asking, base, exported, rule, **more))
        return made[-1]

    yield make
    for each in made:
        each.workers.close()


def request(values: NDArray[np.float32]) -> ModelInferRequest:
    tensor = ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=values.shape)
    return ModelInferRequest(model_name="classifier", inputs=[tensor], raw_input_contents=[values.tobytes()])


def test_a_reference_model_with_another_normalisation_sees_the_same_pixels(
    bench: Callable[..., Bench], asking: Profile, classifier: Classifier, base: Classifier
) -> None:
    images = random_images(40, seed=8)
    expected = asking.detector().score(classifier.embed(images).numpy(), ask(base, images))
    outcome = bench().check(images)
    assert outcome.residuals is not None
    assert outcome.p_values is not None
    np.testing.assert_allclose(outcome.residuals, expected.scores.parts["residual"], rtol=1e-3)
    np.testing.assert_allclose(outcome.p_values, expected.p_values, atol=0.01)


def test_near_asks_about_the_images_near_the_threshold_alone(bench: Callable[..., Bench]) -> None:
    made, images = bench("near"), random_images(60, seed=8)
    embeddings, _ = made.model.run(made.preprocessing.normalise(images.numpy()))
    near = made.detector.screen.near(made.detector.screen.score_samples(embeddings))
    outcome = made.check(images)
    assert 0 < made.reference.seen == near.sum() < 60
    assert [bool(answer) for answer in outcome.answers] == near.tolist()
    assert made.opinions("not_near") == 60 - near.sum()


def test_an_answer_that_is_not_finite_leaves_its_own_image_unchecked(bench: Callable[..., Bench]) -> None:
    # At random some images are flagged; these eight are not.
    made, images = bench(), random_images(8, seed=1)
    assert made.check(images).decision is Decision.PASS

    def overflow(answers: ReferenceAnswers) -> None:
        answers.logits[3] = np.inf

    made.reference.spoil = overflow
    outcome = made.check(images)
    assert (outcome.decision, outcome.reason) == (Decision.UNCHECKED, Reason.INPUT_UNREADABLE)
    assert [row for row, each in enumerate(outcome.decisions) if each is Decision.UNCHECKED] == [3]
    assert outcome.answers[3] == ""
    assert made.opinions("failed") == 1


def test_answers_of_another_shape_are_an_error_and_no_pass(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.reference.run = lambda images: (np.ones((len(images), 3), np.float32), np.ones((len(images), 2), np.float32))  # type: ignore[method-assign]
    outcome = made.check(random_images(4, seed=8))
    assert (outcome.decision, outcome.reason) == (Decision.UNCHECKED, Reason.ERROR)
    assert set(outcome.decisions) == {Decision.UNCHECKED}


def test_a_reference_model_that_hangs_leaves_the_answer_and_what_comes_late_counts_once(
    bench: Callable[..., Bench],
) -> None:
    made, gate, ended = bench(timeout=0.05), threading.Event(), threading.Event()

    def wait(_: ReferenceAnswers) -> None:
        gate.wait(30)
        ended.set()

    made.reference.spoil = wait

    async def check() -> Outcome:
        values = made.preprocessing.normalise(random_images(3, seed=8).numpy())
        inference = await made.checker.infer(request(values), "")
        gate.set()
        assert len(inference.logits) == 3
        return inference.outcome

    outcome = asyncio.run(check())
    assert ended.wait(30)
    made.workers.close(30)
    assert (outcome.decision, outcome.reason) == (Decision.UNCHECKED, Reason.TIMEOUT)
    assert set(outcome.decisions) == {Decision.UNCHECKED}
    assert made.opinions("failed") == 3
    assert made.metrics.registry.get_sample_value("guard_p_value_count", {"model": "classifier", "version": ""}) == 3


def test_requests_without_a_second_opinion_are_not_seen_by_its_streams(bench: Callable[..., Bench]) -> None:
    made = bench()
    scores = made.detector.screen.score_samples(
        made.model.run(made.preprocessing.normalise(random_images(2, seed=8).numpy()))[0]
    )
    assert {stream.name for stream in made.detector.streams()} >= {"divergence", "residual"}
    assert all({"divergence", "residual"}.isdisjoint(each) for each in made.detector.observations(scores))


@pytest.mark.parametrize("share", ["0.25", "0.9"])
def test_a_share_is_drawn_anew_for_each_request(share: str, bench: Callable[..., Bench]) -> None:
    opinions = bench(share).checker.opinions
    assert opinions is not None
    drawn = np.mean([opinions.drawn() for _ in range(4000)])
    assert abs(drawn - float(share)) < 0.05  # seven standard deviations
