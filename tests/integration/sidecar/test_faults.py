"""The table of docs/failures.md, cell by cell, with real faults in a real sidecar."""

import json
import os
import select
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from guard.classifiers import ExportedClassifier
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.tensors import unpack_bytes
from guard.sidecar import Reason
from guard.sidecar.telemetry.metrics import UNKNOWN
from guard.testing import InferenceServer
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Client,
    Floats,
    Launcher,
    Sidecar,
    command,
    connected,
    environment,
    eventually,
    infer_request,
    pairs,
)

SOURCES = ("embedded", "tower", "reading")
POLICIES = ("open", "closed")
Code: TypeAlias = grpc.StatusCode

FAULTY = """
import os, pathlib
from guard.screening import Detector

judge, folder = Detector.judge, pathlib.Path(os.environ["FAULTS"])

def faulty(self, scores):
    if (folder / "raise").exists():
        raise ZeroDivisionError("broken on purpose")
    if (folder / "block").exists():
        (folder / "gate").read_bytes()
    return judge(self, scores)

Detector.judge = faulty
"""
"""Loaded by the sidecar's interpreter as it starts: screening that fails, or that waits for somebody at the gate."""

# What happens under `open` and under `closed`: a code, or None for a reply that is served as unchecked.
EXPECTED: dict[tuple[str, str], tuple[Code | None, Code | None]] = {
    ("timeout", "tower"): (None, Code.UNAVAILABLE),
    ("timeout", "reading"): (None, Code.UNAVAILABLE),
    ("error", "embedded"): (None, Code.UNAVAILABLE),
    ("error", "tower"): (None, Code.UNAVAILABLE),
    ("error", "reading"): (None, Code.UNAVAILABLE),
    ("overloaded", "embedded"): (Code.UNAVAILABLE, Code.UNAVAILABLE),
    ("overloaded", "tower"): (None, Code.UNAVAILABLE),
    ("overloaded", "reading"): (None, Code.UNAVAILABLE),
    ("upstream_failed", "tower"): (Code.UNAVAILABLE, Code.UNAVAILABLE),
    ("upstream_failed", "reading"): (Code.UNAVAILABLE, Code.UNAVAILABLE),
    ("model_unknown", "embedded"): (Code.NOT_FOUND, Code.NOT_FOUND),
    ("model_unknown", "tower"): (None, Code.FAILED_PRECONDITION),
    ("model_unknown", "reading"): (None, Code.FAILED_PRECONDITION),
    ("embedding_missing", "reading"): (None, Code.FAILED_PRECONDITION),
    ("input_unreadable", "embedded"): (Code.INVALID_ARGUMENT, Code.INVALID_ARGUMENT),
    ("input_unreadable", "tower"): (None, Code.INVALID_ARGUMENT),
    ("shared_memory", "embedded"): (Code.INVALID_ARGUMENT, Code.INVALID_ARGUMENT),
    ("shared_memory", "tower"): (None, Code.FAILED_PRECONDITION),
    ("shared_memory", "reading"): (None, Code.FAILED_PRECONDITION),
}
CELLS = [(fault, source, policy) for fault, source in EXPECTED for policy in POLICIES]


@pytest.fixture(scope="module")
def server(classify: ExportedClassifier) -> Iterator[InferenceServer]:
    def model(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        embeddings, logits = classify.run(np.asarray(inputs["image"], np.float32))
        return {"logits": logits, "embedding": embeddings}

    with InferenceServer(model) as running:
        yield running


class Faults:
    """What goes wrong in the screening of every sidecar, by files that they look for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.mkfifo(folder / "gate")
        (folder / "sitecustomize.py").write_text(FAULTY, encoding="utf-8")

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        (self.folder / name).touch()
        try:
            yield
        finally:
            (self.folder / name).unlink()

    def let_through(self) -> None:
        """Let one wait end; blocks until there is one."""
        (self.folder / "gate").write_bytes(b"")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@contextmanager
def faulty_sidecar(faults: Faults, log: Path, *arguments: str | Path) -> Iterator[Sidecar]:
    """Unlike others, it may write tracebacks to its log."""
    path = os.pathsep.join(filter(None, (str(faults.folder), os.environ.get("PYTHONPATH"))))
    variables = {**environment(), "PYTHONPATH": path, "FAULTS": str(faults.folder)}
    with log.open("wb") as errors:
        process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=errors, env=variables)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], WAIT_SECONDS)[0], "the sidecar did not start"
        line = process.stdout.readline()
        assert line, log.read_text(encoding="utf-8")
        yield Sidecar(process, json.loads(line), log)
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()


def source_arguments(source: str, server: InferenceServer, exported: Path) -> tuple[str | Path, ...]:
    """Where the embeddings come from."""
    return {
        "embedded": ("--model", exported),
        "tower": ("--upstream", server.address, "--model", exported),
        "reading": ("--upstream", server.address, "--embedding-output", "embedding"),
    }[source]


@pytest.fixture(scope="module")
def sidecars(
    faults: Faults, server: InferenceServer, exported: Path, served_profile: Path
) -> Iterator[dict[tuple[str, str], Sidecar]]:
    """One for each source of embeddings and each policy, with one worker and no queue."""
    limits = ("--workers", "1", "--max-queued", "0", "--timeout", "0.5", "--drain-timeout", "0")
    with ExitStack() as stack:
        yield {
            (source, policy): stack.enter_context(
                faulty_sidecar(
                    faults,
                    faults.folder / f"{source}-{policy}.log",
                    *source_arguments(source, server, exported),
                    *("--profile", served_profile, *limits),
                    *("--failure-policy", policy),
                )
            )
            for source in SOURCES
            for policy in POLICIES
        }


@contextmanager
def fault(
    name: str, faults: Faults, server: InferenceServer, client: Client, images: Floats
) -> Iterator[ModelInferRequest]:
    """Bring a fault about; the request that runs into it."""
    request = infer_request(images[:1], id="1")
    if name == "timeout":
        with faults("block"):
            yield request
            faults.let_through()
    elif name == "error":
        with faults("raise"):
            yield request
    elif name == "overloaded":
        with faults("block"):
            # Takes the one worker, and keeps it, answered or not.
            first = client.method("ModelInfer").future(request.SerializeToString())
            with (faults.folder / "gate").open("wb"):
                # Somebody reads: the worker is at the gate.
                yield request
            first.exception()
    elif name == "upstream_failed":
        server.stop()
        try:
            yield request
        finally:
            server.start()
    elif name == "model_unknown":
        request.model_name = "other"
        yield request
    elif name == "embedding_missing":
        server.answer = lambda data: server.respond(data).replace(b"embedding", b"embodding")
        yield request
    elif name == "input_unreadable":
        request.inputs[0].shape[1] = 1
        request.inputs[0].shape[2] *= 3
        server.answer = lambda _: server.respond(infer_request(images[:1]).SerializeToString())
        yield request
    elif name == "shared_memory":
        request.inputs[0].parameters["shared_memory_region"].string_param = "region"
        server.answer = lambda _: server.respond(infer_request(images[:1]).SerializeToString())
        yield request


@pytest.mark.parametrize(("name", "source", "policy"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_a_fault_is_answered_as_documented(
    sidecars: dict[tuple[str, str], Sidecar],
    faults: Faults,
    server: InferenceServer,
    clean: Floats,
    name: str,
    source: str,
    policy: str,
) -> None:
    server.reset()
    sidecar, code = sidecars[source, policy], EXPECTED[name, source][POLICIES.index(policy)]
    model = UNKNOWN if name == "model_unknown" else "classifier"
    before = sidecar.metric("guard_unchecked_total", model=model, reason=name)
    with connected(sidecar.address) as client:
        with fault(name, faults, server, client, clean) as request:
            if code is None:
                reply = client.infer(request)
                assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", name)
                trailing = dict(reply.trailing)
                assert "logits" in reply.outputs
            else:
                error = client.refused(request)
                assert error.code() is code
                assert "broken on purpose" not in error.details()
                trailing = dict(pairs(error.trailing_metadata()))
        assert (trailing["guard-decision"], trailing["guard-reason"]) == ("unchecked", name)
        eventually(lambda: sidecar.metric("guard_unchecked_total", model=model, reason=name) == before + 1, "counting")
        # And the next request is fine.
        server.reset()
        eventually(lambda: decided(client, clean), "the fault ending")


@pytest.mark.parametrize("source", SOURCES)
def test_under_closed_no_request_reaches_a_model_that_vetting_did_not_clear(
    launch: Launcher,
    server: InferenceServer,
    exported: Path,
    served_profile: Path,
    clean: Floats,
    source: str,
) -> None:
    server.reset()
    arguments = source_arguments(source, server, exported)
    strict = ("--profile", served_profile, "--require-vetted", "--failure-policy", "closed")
    with launch(*arguments, *strict) as sidecar, connected(sidecar.address) as client:
        error = client.refused(infer_request(clean[:1]))
        assert error.code() is Code.FAILED_PRECONDITION
        assert "the vetting of this model did not end with the verdict" in error.details()
        assert dict(pairs(error.trailing_metadata()))["guard-reason"] == "model_not_vetted"
        assert not [call for call in server.received if call.method.endswith("ModelInfer")]
        eventually(
            lambda: sidecar.metric("guard_unchecked_total", model="classifier", reason="model_not_vetted") == 1,
            "counting",
        )


@pytest.mark.parametrize("source", SOURCES)
def test_under_open_what_such_a_model_answers_is_screened_and_never_passes(
    launch: Launcher,
    server: InferenceServer,
    exported: Path,
    served_profile: Path,
    profile: Profile,
    classify: ExportedClassifier,
    clean: Floats,
    triggered: Floats,
    source: str,
) -> None:
    server.reset()
    images = np.concatenate([clean, triggered])
    flags = profile.detector().score(classify.run(images)[0]).flags
    arguments = source_arguments(source, server, exported)
    lenient = ("--profile", served_profile, "--require-vetted", "--failure-policy", "open", "--mode", "block")
    with launch(*arguments, *lenient) as sidecar, connected(sidecar.address) as client:
        reply = client.infer(infer_request(images[~flags][:2]))
        assert (reply.decision, reply.parameter("guard_reason")) == ("unchecked", "model_not_vetted")
        assert reply.parameter("guard_p_value") > 0
        assert "logits" in reply.outputs
        each = reply.response.raw_output_contents[reply.outputs.index("guard_decision")]
        assert unpack_bytes(each) == [b"unchecked"] * 2
        assert client.refused(infer_request(images[flags][:1])).code() is Code.PERMISSION_DENIED
        eventually(
            lambda: sidecar.metric("guard_requests_total", model="classifier", decision="flag", mode="block") == 1,
            "counting",
        )
        assert sidecar.metric("guard_unchecked_total", model="classifier", reason="model_not_vetted") == 1
        assert sidecar.metric("guard_images_total", model="classifier", decision="unchecked") == 2
        assert sidecar.metric("guard_images_total", model="classifier", decision="pass") == 0


def decided(client: Client, images: Floats) -> bool:
    try:
        return client.infer(infer_request(images[:1])).decision in {"pass", "flag"}
    except grpc.RpcError:
        return False


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_unchecked_request_has_one_reason(
    sidecars: dict[tuple[str, str], Sidecar], source: str, policy: str
) -> None:
    """In the figures too: as many requests without a decision as there are reasons."""
    sidecar = sidecars[source, policy]
    for model in ("classifier", UNKNOWN):
        requests = sidecar.metric("guard_requests_total", model=model, decision="unchecked", mode="tag")
        unchecked = [sidecar.metric("guard_unchecked_total", model=model, reason=reason) for reason in Reason]
        assert requests == sum(unchecked)
