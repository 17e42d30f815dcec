"""Unmodified clients, a real MLServer, and nothing, or a sidecar, between them."""

import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from guard.classifiers import ExportedClassifier
from guard.profiles import Profile
from guard.triggers import Patch
from tests.conftest import random_images
from tests.e2e.environments import environment
from tests.integration.sidecar.conftest import Floats, Launcher, eventually, free_port

HERE = Path(__file__).parent
RUNTIME, KSERVE = HERE.parents[1] / "deploy" / "mlserver", HERE / "kserve_client"
SECONDS = 60
START = "from mlserver.cli import main; main()"
VIAS = ("direct", "reading", "own tower")


@pytest.fixture(scope="module")
def classify(exported: Path) -> ExportedClassifier:
    return ExportedClassifier(exported, threads=1, gpu=False)


@pytest.fixture(scope="module")
def mlserver_python() -> Path:
    return environment(RUNTIME / "requirements.txt")


@pytest.fixture(scope="module")
def mlserver(mlserver_python: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLServer with the small classifier."""
    folder, port = tmp_path_factory.mktemp("mlserver"), free_port()
    shutil.copy(RUNTIME / "classifier.py", folder)
    settings = {
        "host": "127.0.0.1", "grpc_port": port, "http_port": free_port(), "parallel_workers": 0,
        # Its interceptor for metrics does not work with streams, nor does compression.
        "metrics_endpoint": None, "gzip_enabled": False, "debug": False,
    }  # fmt: skip
    model = {
        "name": "classifier", "implementation": "classifier.Classifier", "platform": "onnxruntime_onnx",
        "parameters": {"uri": str(exported), "version": "1"},
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 16, 16]}],
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLSERVER_")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(mlserver_python), "-c", START, "start", str(folder)], cwd=folder, env=clean, stdout=log, stderr=log
        )
    address = f"127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with triton.InferenceServerClient(address) as client:
            try:
                return bool(client.is_model_ready("classifier"))
            except triton.InferenceServerException:
                return False

    try:
        eventually(ready, "MLServer starting")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(SECONDS)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def addresses(
    mlserver: str, exported: Path, profile: Profile, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Where to ask: the server itself, and two sidecars before it."""
    folder = tmp_path_factory.mktemp("sidecars")
    profile.save(folder / "profile")
    launch = Launcher(folder)
    common = ("--profile", folder / "profile", "--upstream", mlserver, "--timeout", "30", "--pass-headers", "tenant")
    with ExitStack() as stack:
        reading = stack.enter_context(launch(*common, "--embedding-output", "embedding"))
        own = stack.enter_context(launch(*common, "--model", exported))
        yield {"direct": mlserver, "reading": reading.address, "own tower": own.address}


@pytest.fixture(params=VIAS)
def via(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return random_images(24, seed=5).numpy()


@pytest.fixture(scope="module")
def clean(classify: ExportedClassifier, pixels: NDArray[np.uint8]) -> Floats:
    return classify.preprocessing.normalise(pixels)


@pytest.fixture(scope="module")
def triggered(classify: ExportedClassifier, trigger: Patch) -> Floats:
    return classify.preprocessing.normalise(trigger.stamp(random_images(24, seed=6)).numpy())


@pytest.fixture(scope="module")
def files(pixels: NDArray[np.uint8]) -> list[bytes]:
    """The same images, as PNG."""
    found = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def tensors(kind: str, images: Floats, files: list[bytes], count: int) -> list[Any]:
    if kind == "FP32":
        return [triton.InferInput("image", [count, *images.shape[1:]], kind).set_data_from_numpy(images[:count])]
    array = np.array(files[:count], object)
    return [triton.InferInput("image", [count], kind).set_data_from_numpy(array)]


def without_annotations(reply: Any) -> Any:
    """The reply as it was before guard wrote into it."""
    found = service_pb2.ModelInferResponse()
    found.CopyFrom(reply)
    for name in [name for name in found.parameters if name.startswith("guard_")]:
        del found.parameters[name]
    for index in reversed(range(len(found.outputs))):
        if found.outputs[index].name.startswith("guard_"):
            del found.outputs[index]
            if found.raw_output_contents:
                del found.raw_output_contents[index]
    return found


def check(reply: Any, direct: Any, via: str, logits: Floats) -> None:
    """The reply is right, and the one that the server itself gives, but for annotations."""
    assert without_annotations(reply) == direct
    np.testing.assert_allclose(triton.InferResult(reply).as_numpy("logits"), logits, atol=1e-4)
    decision = reply.parameters["guard_decision"].string_param
    assert decision in ({""} if via == "direct" else {"pass", "flag"})
    rows = triton.InferResult(reply).as_numpy("guard_decision")
    assert (rows is None) == (via == "direct" or len(logits) == 1)


@pytest.mark.parametrize("outputs", [None, ["logits"], ["embedding", "logits"]], ids=["all", "some", "embedding"])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("kind", ["FP32", "BYTES"])
def test_triton_client(
    addresses: dict[str, str],
    via: str,
    kind: str,
    count: int,
    outputs: list[str] | None,
    clean: Floats,
    files: list[bytes],
    classify: ExportedClassifier,
) -> None:
    def ask(address: str) -> Any:
        wanted = outputs and [triton.InferRequestedOutput(name) for name in outputs]
        with triton.InferenceServerClient(address) as client:
            sent = tensors(kind, clean, files, count)
            return client.infer("classifier", sent, outputs=wanted, request_id="7", timeout=None).get_response()

    reply, direct = ask(addresses[via]), ask(addresses["direct"])
    check(reply, direct, via, classify.run(clean[:count])[1])
    assert reply.id == "7"
    names = [output.name for output in without_annotations(reply).outputs]
    assert names == (outputs or ["logits", "embedding", "label"])


@pytest.mark.parametrize("kind", ["FP32", "BYTES"])
async def test_triton_client_with_asyncio(
    addresses: dict[str, str], via: str, kind: str, clean: Floats, files: list[bytes], classify: ExportedClassifier
) -> None:
    async def ask(address: str) -> Any:
        async with triton_aio.InferenceServerClient(address) as client:
            return (await client.infer("classifier", tensors(kind, clean, files, 4))).get_response()

    check(await ask(addresses[via]), await ask(addresses["direct"]), via, classify.run(clean[:4])[1])


def test_triton_client_gets_the_servers_own_description(addresses: dict[str, str], via: str) -> None:
    def ask(address: str) -> list[Any]:
        with triton.InferenceServerClient(address) as client:
            return [
                client.is_server_live(), client.is_server_ready(), client.is_model_ready("classifier"),
                client.get_server_metadata(), client.get_model_metadata("classifier"),
            ]  # fmt: skip

    found = ask(addresses[via])
    assert found == ask(addresses["direct"])
    assert found[:3] == [True] * 3
    assert (found[3].name, found[4].platform) == ("mlserver", "onnxruntime_onnx")


def typed(kind: str, images: Floats, files: list[bytes], count: int) -> Any:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype=kind)
    if kind == "FP32":
        tensor.shape.extend([count, *images.shape[1:]])
        tensor.contents.fp32_contents.extend(images[:count].ravel().tolist())
    else:
        tensor.shape.append(count)
        tensor.contents.bytes_contents.extend(files[:count])
    return service_pb2.ModelInferRequest(model_name="classifier", inputs=[tensor])


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("kind", ["FP32", "BYTES"])
def test_typed_contents_and_metadata(
    addresses: dict[str, str],
    via: str,
    kind: str,
    count: int,
    clean: Floats,
    files: list[bytes],
    classify: ExportedClassifier,
) -> None:
    def ask(address: str) -> tuple[Any, dict[str, str]]:
        with grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            reply, call = stub.ModelInfer.with_call(
                typed(kind, clean, files, count), timeout=SECONDS, metadata=(("tenant", "blue"),)
            )
            return reply, {item.key: item.value for item in call.trailing_metadata()}

    (reply, trailing), (direct, _) = ask(addresses[via]), ask(addresses["direct"])
    assert not reply.raw_output_contents
    assert without_annotations(reply) == direct
    # Its converter rounds nothing: typed contents hold the same floats.
    logits = np.array(reply.outputs[0].contents.fp32_contents).reshape(count, -1)
    np.testing.assert_allclose(logits, classify.run(clean[:count])[1], atol=1e-4)
    assert trailing["tenant"] == "blue"
    assert ("guard-decision" in trailing) == (via != "direct")


def test_the_servers_errors_arrive_as_they_are(addresses: dict[str, str], via: str, clean: Floats) -> None:
    def ask(address: str) -> tuple[str, str]:
        with triton.InferenceServerClient(address) as client, pytest.raises(triton.InferenceServerException) as caught:
            client.infer("classifier", tensors("FP32", clean, [], 1), outputs=[triton.InferRequestedOutput("nonsense")])
        return caught.value.status(), caught.value.message()

    found = ask(addresses[via])
    assert found == ask(addresses["direct"])
    assert found == ("StatusCode.INVALID_ARGUMENT", "there is no output nonsense")


def decide(address: str, images: Floats) -> list[str]:
    with triton.InferenceServerClient(address) as client:
        replies = [client.infer("classifier", tensors("FP32", images[i : i + 1], [], 1)) for i in range(len(images))]
        batch = client.infer("classifier", tensors("FP32", images, [], len(images)))
    found = [reply.get_response().parameters["guard_decision"].string_param for reply in replies]
    assert [decision.decode() for decision in batch.as_numpy("guard_decision")] == found
    return found


@pytest.mark.parametrize("via", VIAS[1:])
def test_triggered_images_are_flagged_and_clean_ones_pass(
    addresses: dict[str, str], via: str, clean: Floats, triggered: Floats, profile: Profile,
    classify: ExportedClassifier,
) -> None:  # fmt: skip
    detector = profile.detector()
    for batch, most in ((clean, "pass"), (triggered, "flag")):
        found = decide(addresses[via], batch)
        flags = detector.score(classify.run(batch)[0]).flags
        assert found == ["flag" if flag else "pass" for flag in flags]
        assert found.count(most) >= 0.8 * len(batch)


def test_kserves_client(
    addresses: dict[str, str], clean: Floats, files: list[bytes], classify: ExportedClassifier, tmp_path: Path
) -> None:
    python = environment(KSERVE / "requirements.txt")
    parts = [np.frombuffer(file, np.uint8) for file in files[:3]]
    sent = {"images": clean[:3], "files": np.concatenate(parts), "lengths": np.array([len(part) for part in parts])}
    np.savez(tmp_path / "in.npz", **sent)  # type: ignore[arg-type] # numpy's stubs take the names for options
    found = {}
    for via in VIAS:
        out = tmp_path / f"{via}.npz"
        run(python, KSERVE / "ask.py", addresses[via], tmp_path / "in.npz", out)
        found[via] = dict(np.load(out))
    direct = found["direct"]
    assert direct["state"].all()
    for form in ("raw-fp32", "raw-bytes", "typed-fp32", "typed-bytes"):
        np.testing.assert_allclose(direct[f"{form}/logits"], classify.run(clean[:3])[1], atol=1e-4)
    for via in VIAS[1:]:
        # A batch: one decision for each image.
        assert all(len(found[via].pop(f"{form}/guard_decision")) == 3 for form in ("raw-fp32", "typed-bytes"))
        rest = {name: value for name, value in found[via].items() if "guard_" not in name and "parameters" not in name}
        assert set(rest) == {name for name in direct if "parameters" not in name}
        for name, value in rest.items():
            np.testing.assert_array_equal(value, direct[name])
        assert "guard_decision" in str(found[via]["raw-fp32/parameters"])


def test_mlservers_own_streaming_client(
    addresses: dict[str, str], via: str, mlserver_python: Path, clean: Floats, triggered: Floats,
    profile: Profile, classify: ExportedClassifier, tmp_path: Path,
) -> None:  # fmt: skip
    batches = {f"{index:03}": (clean, triggered)[index % 2][index : index + 2] for index in range(8)}
    np.savez(tmp_path / "in.npz", **batches)  # type: ignore[arg-type] # as above
    run(mlserver_python, HERE / "mlserver_stream.py", addresses[via], tmp_path / "in.npz", tmp_path / "out.npz")
    found, detector = dict(np.load(tmp_path / "out.npz")), profile.detector()
    assert len(found) == 2 * len(batches)
    for name, batch in batches.items():
        embeddings, logits = classify.run(batch)
        np.testing.assert_allclose(found[name], logits, atol=1e-4)
        decision = "flag" if detector.score(embeddings).flags.any() else "pass"
        assert str(found[f"decision-{name}"]) == ("" if via == "direct" else decision)


def run(*command: str | Path) -> None:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=2 * SECONDS
    )
    assert done.returncode == 0, done.stderr
