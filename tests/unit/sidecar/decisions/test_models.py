"""Which model, and which version of it, a request is for."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from guard.classifiers import Classifier
from guard.errors import GuardError
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.sidecar import Settings
from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.models import Models
from guard.sidecar.decisions.routes import Request
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.policy import Decision
from guard.sidecar.telemetry.metrics import UNKNOWN, Metrics
from guard.triggers import Patch
from tests.conftest import random_images

UPSTREAM = {"upstream": "127.0.0.1:9", "embedding_output": "embedding"}
Make = Callable[..., Models]


@pytest.fixture(scope="module")
def place(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "profile"
    profile.save(directory)
    return directory


@contextmanager
def making(place: Path) -> Iterator[Make]:
    """Models from a list of names and versions."""
    workers = Workers(1, 0)

    def make(*known: tuple[str, str | None], metrics: Metrics | None = None, **top: Any) -> Models:
        models = [
            {"model_name": name, "profile": place, **({} if version is None else {"model_version": version})}
            for name, version in known
        ]
        settings, metrics = Settings.load(None, models=models, **top), metrics or Metrics()
        return Models(Shared(settings, workers, Recorder(settings, metrics)), metrics)

    try:
        yield make
    finally:
        workers.close()


@pytest.fixture(scope="module")
def make(place: Path) -> Iterator[Make]:
    with making(place) as made:
        yield made


def found(models: Models, name: str, version: str = "") -> str | None:
    served = models.find(name, version)
    return None if served is None else served.settings.label


def request(models: Models, name: str, version: str = "") -> Request:
    message = ModelInferRequest(model_name=name, model_version=version)
    return Request(message, b"", models.route(name, version))


@pytest.mark.parametrize(
    ("versions", "taken"),
    [
        (("9", "10"), "10"),
        (("10", "9", "2"), "10"),
        (("9", "stable", "10"), "10"),
        (("blue", "green"), "green"),
        (("9", None, "10"), None),
        (("٣", "2"), "٣"),
        (("²", "1"), "1"),
        (("9" * 128, "8"), "9" * 128),
    ],
)
def test_a_request_without_a_version_is_for_the_model_without_one_or_else_the_highest(
    make: Make, versions: tuple[str | None, ...], taken: str | None
) -> None:
    served = make(*(("a", version) for version in versions), **UPSTREAM).find("a", "")
    assert served is not None
    assert served.settings.model_version == taken


def test_a_request_is_for_the_model_that_it_names_and_no_other(make: Make) -> None:
    models = make(("a", "1"), ("a", "2"), ("b", None), **UPSTREAM)
    assert found(models, "a", "1") == "a@1"
    assert found(models, "a", "2") == "a@2"
    assert found(models, "b") == "b"
    for name, version in (("a", "3"), ("a", "01"), ("b", "1"), ("A", "1"), ("c", ""), ("", ""), (UNKNOWN, "")):
        assert found(models, name, version) is None
        assert models.route(name, version) is models.unknown
    assert models.unknown.checker is None


def test_a_model_that_guard_serves_itself_has_version_1_if_it_is_given_none(make: Make, exported: Path) -> None:
    models = make(("a", None), ("b", "7"), model=exported)
    assert [(served.settings.model_name, served.version) for served in models.served] == [("a", "1"), ("b", "7")]
    assert found(models, "a") == found(models, "a", "1") == "a"
    assert found(models, "b") == found(models, "b", "7") == "b@7"
    assert found(models, "a", "2") is None
    assert found(models, "b", "1") is None


@pytest.mark.parametrize(
    ("asked", "replied", "settled"),
    [
        ("", "1", "a@1"),
        ("", "2", "a@2"),
        ("", "", "a@2"),
        ("", "3", "a@2"),
        ("1", "2", "a@1"),
        ("1", "1", "a@1"),
    ],
)
def test_the_reply_settles_the_version_only_where_the_request_left_it_open(
    make: Make, asked: str, replied: str, settled: str
) -> None:
    models = make(("a", "1"), ("a", "2"), **UPSTREAM)
    made = request(models, "a", asked)
    assert models.is_current(made) is bool(asked)
    models.settle(made, replied)
    assert made.route.settings.label == settled


def test_a_reply_makes_no_unknown_model_known(make: Make) -> None:
    models = make(("a", "1"), ("b", "1"), **UPSTREAM)
    made = request(models, "c")
    assert models.is_current(made)
    models.settle(made, "1")
    assert made.route is models.unknown


def test_a_model_of_one_version_leaves_nothing_open(make: Make) -> None:
    models = make(("a", "1"), ("b", "1"), ("b", "2"), **UPSTREAM)
    assert models.is_current(request(models, "a"))
    assert not models.is_current(request(models, "b"))


def test_a_model_that_cannot_be_loaded_stops_the_start(make: Make, tmp_path: Path) -> None:
    with making(tmp_path) as elsewhere, pytest.raises(GuardError, match="there is no profile"):
        elsewhere(("a", None), **UPSTREAM)
    with pytest.raises(GuardError, match="alpha"):
        make(("a", None), alpha=1e-6, **UPSTREAM)


def test_a_certificate_beside_the_profile_does_not_make_the_monitor_forget_and_a_new_calibration_does(
    place: Path, profile: Profile, classifier: Classifier, images: Tensor, trigger: Patch, tmp_path: Path
) -> None:
    directory = tmp_path / "profile"
    shutil.copytree(place, directory)
    attack = classifier.embed(trigger.stamp(random_images(200, seed=6))).numpy()
    with making(directory) as make:
        metrics = Metrics()
        models = make(("a", None), metrics=metrics, run_length=10_000, **UPSTREAM)
        (served,) = models.served

        def alarm() -> float | None:
            return metrics.registry.get_sample_value(
                "guard_alarm", {"model": "a", "version": "", "kind": "attack", "stream": "match patch-1"}
            )

        def check(embeddings: NDArray[np.float32]) -> None:
            made = request(models, "a")
            outcome = asyncio.run(served.checker.check_embeddings(embeddings, made.message, made.trace_id))
            assert outcome.decision is not Decision.UNCHECKED

        check(attack)
        assert alarm() == 1
        (directory / "certificate.json").write_text("{}", encoding="utf-8")
        asyncio.run(models.refresh())
        check(attack[:1])
        assert alarm() == 1
        profile.calibrate(classifier, images, 0.1, seed=1).save(directory)
        asyncio.run(models.refresh())
        check(attack[:1])
        assert alarm() == 0
