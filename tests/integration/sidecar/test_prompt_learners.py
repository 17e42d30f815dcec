"""A CoCoOp learner with a backdoor in its meta-net, from its files to a sidecar that blocks what triggers it."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from numpy.typing import NDArray

from guard.classifiers import Classifier, ExportedClassifier, load
from guard.classifiers.files import LEARNER_FILE
from guard.classifiers.prompts import PromptTuningSettings, save_prompt_learner, tune_prompts
from guard.classifiers.tuning import TuningSettings
from guard.profiles import Profile
from guard.testing import InferenceServer
from guard.triggers import Patch
from tests.compared import unfounded
from tests.conftest import random_images
from tests.integration.sidecar.conftest import Floats, Launcher, connected, decisions, infer_request
from tests.program import guard

TARGET = 3


@dataclass(frozen=True)
class Served:
    """What a sidecar is given, and images to send: preprocessed, shape [N, 3, H, W].

    Attributes:
        model: The exported learner.
        profile: A profile without any trigger, whose reference model is the hand-written prompts.
        clean: Images that it has not seen.
        triggered: Images that the learner takes for the attacker's class, and its towers for another.
    """

    model: Path
    profile: Path
    clean: Floats
    triggered: Floats


@pytest.fixture(scope="module")
def served(
    classifier: Classifier, model_directory: Path, image_folder: Path, trigger: Patch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:  # fmt: skip
    folder = tmp_path_factory.mktemp("learner")
    model, profile, exported = folder / "model", folder / "profile", folder / "exported"
    images = random_images(256, seed=2)
    pixels = torch.cat([images, trigger.stamp(images)])
    labels = torch.cat([classifier.predict(classifier.embed(images)), torch.full((len(images),), TARGET)])
    tuning = TuningSettings(steps=150, batch=64, learning_rate=1e-2, weight_decay=0.0)
    learner = tune_prompts(classifier, pixels, labels, PromptTuningSettings(kind="cocoop", hidden=8, tuning=tuning))
    shutil.copytree(model_directory, model)
    save_prompt_learner(model / LEARNER_FILE, learner)
    suspect = load(str(model), device="cpu")
    Profile.build(suspect, unfounded(suspect)).save(profile)
    for arguments in (
        ("calibrate", profile, "--images", image_folder, "--alpha", "0.05"),
        ("export", model, "--images", image_folder, "--out", exported),
    ):
        done = guard(*arguments)
        assert done.returncode == 0, done.stderr
    stamped = trigger.stamp(random_images(40, seed=6))
    taken, before = (each.predict(each.embed(stamped)) for each in (suspect, classifier))
    triggered = stamped[(taken == TARGET) & (before != TARGET)]
    assert len(triggered) >= 15
    normalise = suspect.preprocessing.normalise
    return Served(exported, profile, normalise(random_images(60, seed=5).numpy()), normalise(triggered.numpy()))


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator[InferenceServer]:
    """An inference server that serves the learner, and gives its embeddings away."""
    learner = ExportedClassifier(served.model, threads=1, gpu=False)

    def model(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        embeddings, logits = learner.run(inputs["image"])
        return {"embedding": embeddings, "logits": logits}

    with InferenceServer(model) as running:
        yield running


@pytest.mark.parametrize("source", ["embedded", "proxy"])
def test_triggered_requests_to_a_served_learner_are_flagged_and_clean_ones_pass(
    source: str, served: Served, server: InferenceServer, launch: Launcher
) -> None:
    given: dict[str, tuple[str | Path, ...]] = {
        "embedded": ("--model", served.model),
        "proxy": ("--upstream", server.address, "--embedding-output", "embedding"),
    }
    arguments = (*given[source], "--profile", served.profile, "--mode", "tag")
    with launch(*arguments) as running, connected(running.address) as client:
        alarms, caught = (list(decisions(client, each)).count("flag") for each in (served.clean, served.triggered))
    assert alarms <= 0.2 * len(served.clean)
    assert caught >= 0.8 * len(served.triggered)


def test_a_triggered_request_to_a_served_learner_is_refused(served: Served, launch: Launcher) -> None:
    arguments = ("--model", served.model, "--profile", served.profile, "--mode", "block")
    with launch(*arguments) as running, connected(running.address) as client:
        refused = client.refused(infer_request(served.triggered))
    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
