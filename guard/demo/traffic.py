"""Run the sidecar as a user would, and send it requests with a client that does not know guard."""

import json
import os
import select
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.errors import GuardError, MissingDependencyError
from guard.sidecar.transport.channels import DIRECT

START_SECONDS = 60
MODEL = "classifier"


@dataclass(frozen=True)
class Replies:
    """The replies to a series of single-image requests.

    Attributes:
        decisions: `guard_decision` of each reply.
        scores: `guard_score` of each reply; NaN where there is none.
        milliseconds: Time from request to reply, measured at the client.
    """

    decisions: tuple[str, ...]
    scores: NDArray[np.float64]
    milliseconds: NDArray[np.float64]

    @property
    def flagged(self) -> int:
        """Number of flagged requests."""
        return sum(decision == "flag" for decision in self.decisions)


@contextmanager
def sidecar(*arguments: str) -> Iterator[dict[str, Any]]:
    """Start `guard serve` as a process of its own, on free ports, and drain it at the end.

    Yields:
        The JSON object that the process prints when it is ready.

    Raises:
        GuardError: The process did not start.
    """
    command = [
        sys.executable,
        "-m",
        "guard",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--metrics",
        "127.0.0.1:0",
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GUARD_")}
    process = subprocess.Popen(  # noqa: S603 - our own program
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        if process.stdout is None or not select.select([process.stdout], [], [], START_SECONDS)[0]:
            raise GuardError(f"the sidecar did not start within {START_SECONDS} s")
        line = process.stdout.readline()
        if not line:
            _, errors = process.communicate(timeout=START_SECONDS)
            raise GuardError(
                f"the sidecar did not start: {errors.strip().splitlines()[-1] if errors else 'no message'}"
            )
        yield json.loads(line)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def client_library() -> ModuleType:
    """Tritonclient's gRPC client.

    Raises:
        MissingDependencyError: tritonclient is not installed.
    """
    try:
        import tritonclient.grpc
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "the demo sends requests with tritonclient; install it with: pip install 'clip-guard[demo]'"
        ) from error
    return tritonclient.grpc  # type: ignore[no-any-return]


def send(addresses: list[str], inputs: Floats) -> list[Replies]:
    """Send each image to each of several sidecars in turn, so that all of them are measured under the same conditions.

    Args:
        addresses: Address of each sidecar, HOST:PORT.
        inputs: Preprocessed images, shape [N, 3, H, W].

    Returns:
        The replies of each sidecar.
    """
    grpc = client_library()
    clients = [grpc.InferenceServerClient(address, channel_args=list(DIRECT)) for address in addresses]
    decisions: list[list[str]] = [[] for _ in clients]
    scores: list[list[float]] = [[] for _ in clients]
    times: list[list[float]] = [[] for _ in clients]
    try:
        for client in clients:
            client.infer(MODEL, [_tensor(grpc, inputs[:1])])  # connects
        for row in range(len(inputs)):
            tensor = _tensor(grpc, inputs[row : row + 1])
            for index, client in enumerate(clients):
                started = time.perf_counter()
                reply = client.infer(MODEL, [tensor])
                times[index].append(1000 * (time.perf_counter() - started))
                parameters = reply.get_response().parameters
                decisions[index].append(parameters["guard_decision"].string_param)
                scores[index].append(parameters["guard_score"].double_param if "guard_score" in parameters else np.nan)
    finally:
        for client in clients:
            client.close()
    return [
        Replies(tuple(decided), np.array(scored), np.array(timed))
        for decided, scored, timed in zip(decisions, scores, times, strict=True)
    ]


def _tensor(grpc: ModuleType, images: Floats) -> Any:  # noqa: ANN401 - tritonclient has no types
    tensor = grpc.InferInput("image", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    return tensor


def scrape(address: str, prefixes: tuple[str, ...]) -> list[str]:
    """The lines of `/metrics` that start with one of the prefixes."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://{address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return [line for line in text.splitlines() if line.startswith(prefixes)]
