"""Sidecars as processes, a client that knows only bytes, and an upstream server that does what a test asks for."""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from guard.classifiers import ExportedClassifier
from guard.demo.traffic import scrape
from guard.profiles import Profile
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
)
from guard.testing import Call, InferenceServer
from guard.testing import Fault as Fault  # noqa: PLC0414 - for the tests of this folder
from guard.triggers import Patch
from tests.conftest import random_images

WAIT_SECONDS = 60
Floats = NDArray[np.float32]
Pairs = tuple[tuple[str, str | bytes], ...]


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_SECONDS} s"
        time.sleep(0.02)


@dataclass
class Sidecar:
    process: subprocess.Popen[bytes]
    announced: dict[str, Any]
    errors: Path

    @property
    def address(self) -> str:
        return str(self.announced["listen"])

    @property
    def stderr(self) -> str:
        return self.errors.read_text(encoding="utf-8")

    def metric(self, name: str, **labels: str) -> float:
        if "model" in labels:
            labels = {"version": "", **labels}
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in scrape(str(self.announced["metrics"]), (name,)):
            series, _, value = line.rpartition(" ")
            found, _, inside = series.partition("{")
            if found == name and wanted == set(inside.rstrip("}").split(",")) - {""}:
                return float(value)
        raise AssertionError(f"{name} {labels} is not exposed")


def command(*arguments: str | Path) -> list[str]:
    ports = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    return [sys.executable, "-m", "guard", "serve", *ports, *(str(argument) for argument in arguments)]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GUARD_")}


def refused_start(*arguments: str | Path) -> tuple[int, list[str]]:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), timeout=WAIT_SECONDS, check=False
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


class Launcher:
    def __init__(self, errors: Path) -> None:
        self._errors, self._count = errors, 0

    @contextmanager
    def __call__(self, *arguments: str | Path, through: Sequence[str] = ()) -> Iterator[Sidecar]:
        """A sidecar that must end well: drained, with code 0, and without a traceback in its log.

        Args:
            arguments: Arguments of `guard serve`.
            through: A program that starts it, with its own arguments.
        """
        self._count += 1
        path = self._errors / f"{self._count}.log"
        with path.open("wb") as errors:
            started = [*through, *command(*arguments)]
            process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=errors, env=environment())
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], WAIT_SECONDS)[0], "the sidecar did not start"
            line = process.stdout.readline()
            assert line, path.read_text(encoding="utf-8")
            sidecar = Sidecar(process, json.loads(line), path)
            yield sidecar
            process.terminate()
            assert process.wait(WAIT_SECONDS) == 0, sidecar.stderr
            assert "Traceback" not in sidecar.stderr, sidecar.stderr
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="session")
def served_profile(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "profile"
    profile.save(directory)
    return directory


@pytest.fixture(scope="session")
def classify(exported: Path) -> ExportedClassifier:
    return ExportedClassifier(exported, threads=1, gpu=False)


@pytest.fixture(scope="session")
def clean(classify: ExportedClassifier) -> Floats:
    """Preprocessed images that no profile has seen."""
    return classify.preprocessing.normalise(random_images(60, seed=5).numpy())


@pytest.fixture(scope="session")
def triggered(classify: ExportedClassifier, trigger: Patch) -> Floats:
    """Images with the trigger."""
    return classify.preprocessing.normalise(trigger.stamp(random_images(60, seed=6)).numpy())


def infer_request(images: Floats, **more: Any) -> ModelInferRequest:
    tensor = ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=images.shape)
    return ModelInferRequest(
        **{"model_name": "classifier", "inputs": [tensor], "raw_input_contents": [images.tobytes()], **more}
    )


@dataclass
class Reply:
    response: ModelInferResponse
    data: bytes
    initial: Pairs
    trailing: Pairs

    def parameter(self, name: str) -> Any:
        value = self.response.parameters[name]
        return getattr(value, str(value.WhichOneof("parameter_choice")))

    @property
    def decision(self) -> str:
        return str(self.parameter("guard_decision"))

    @property
    def outputs(self) -> list[str]:
        return [output.name for output in self.response.outputs]


def pairs(metadata: Any) -> Pairs:
    return tuple((item.key, item.value) for item in metadata or ())


class Client:
    """The protocol as bytes, so that anything can be sent."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, [("grpc.enable_retries", 0)])

    def method(self, name: str) -> Any:
        return self.channel.unary_unary(f"/{SERVICE}/{name}")

    def call(self, name: str, data: bytes = b"") -> bytes:
        reply: bytes = self.method(name)(data, timeout=WAIT_SECONDS)
        return reply

    def infer(
        self, request: ModelInferRequest | bytes, *, timeout: float | None = WAIT_SECONDS, metadata: Pairs = ()
    ) -> Reply:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        reply, call = self.method("ModelInfer").with_call(data, timeout=timeout, metadata=metadata)
        return Reply(
            ModelInferResponse.FromString(reply), reply, pairs(call.initial_metadata()), pairs(call.trailing_metadata())
        )

    def refused(self, request: ModelInferRequest | bytes, **more: Any) -> Any:
        """The error that a request is answered with; whatever it is, it says nothing about guard's inside."""
        with pytest.raises(grpc.RpcError) as caught:
            self.infer(request, **more)
        error: Any = caught.value
        assert "Traceback" not in error.details()
        assert "\n" not in error.details()
        return error


@contextmanager
def connected(address: str) -> Iterator[Client]:
    client = Client(address)
    try:
        yield client
    finally:
        client.channel.close()


class Upstream(InferenceServer):
    """The server behind a sidecar: the small classifier, asked for its class scores only.

    Attributes:
        classify: Computes its answers.
    """

    def __init__(self, classify: ExportedClassifier) -> None:
        super().__init__(lambda inputs: {"logits": self._outputs(inputs)["logits"]}, name="upstream")
        self.classify = classify
        self._both = InferenceServer(self._outputs)

    def inferences(self) -> list[Call]:
        return [call for call in self.received if call.method == "ModelInfer"]

    def running(self, port: int = 0) -> Self:
        self.address = f"127.0.0.1:{port}"
        return self

    def _outputs(self, inputs: Mapping[str, Floats]) -> dict[str, Floats]:
        embeddings, logits = self.classify.run(inputs["image"])
        return {"logits": logits, "embedding": embeddings}

    def logits(self, data: bytes) -> bytes:
        return self.respond(data)

    def with_embedding(self, data: bytes) -> bytes:
        """All outputs, or those that the request lists, in its order."""
        return self._both.respond(data)


@pytest.fixture(scope="session")
def running_upstream(classify: ExportedClassifier) -> Iterator[Upstream]:
    with Upstream(classify).running() as upstream:
        yield upstream


@pytest.fixture
def upstream(running_upstream: Upstream) -> Upstream:
    running_upstream.reset()
    return running_upstream


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def decisions(client: Client, images: Floats) -> Sequence[str]:
    return [client.infer(infer_request(images[i : i + 1])).decision for i in range(len(images))]
