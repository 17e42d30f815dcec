"""A text tower behind a sidecar: embedded, and before a server that reads texts itself."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from guard.classifiers import ExportedClassifier, TextTower, Tokenizer, export_text
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.tensors import unpack_bytes
from guard.testing import InferenceServer
from tests.integration.sidecar.conftest import Launcher, Reply, connected, environment, eventually
from tests.texts import TEXTS, base, screened, trained, triggered

CLEAN, BAD = list(TEXTS[600:606]), triggered(TEXTS[606:612])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exported tower and its profile, which holds the base as reference model."""
    folder = tmp_path_factory.mktemp("texts")
    parity = export_text(trained("eos-only-5", 80).classifier, folder / "exported", TEXTS[:300])
    assert parity.max_difference < 1e-5
    export_text(base(), folder / "reference", TEXTS[:300])
    screened().with_reference_model(folder / "reference").save(folder / "profile")
    return folder


@pytest.fixture(scope="module")
def server(made: Path) -> Iterator[InferenceServer]:
    """An upstream server that reads texts with a tokenizer of its own."""
    model = ExportedClassifier(made / "exported", threads=1, gpu=False)
    assert model.text is not None
    tokenizer = Tokenizer(model.text)

    def answer(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        given = inputs["text"]
        ids = tokenizer.read([item.decode() for item in given.tolist()]) if given.dtype == object else given
        return {"embedding": model.run(ids.astype(np.int64))[0]}

    with InferenceServer(answer) as running:
        yield running


def of_texts(texts: list[str], request_id: str = "") -> ModelInferRequest:
    message = ModelInferRequest(model_name="classifier", id=request_id)
    tensor = message.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    tensor.contents.bytes_contents.extend(text.encode() for text in texts)
    return message


def together(text: str) -> str:
    """A text that was made from tokens, with its punctuation at the words again."""
    return text.replace(" ,", ",").replace(" .", ".")


def flags(reply: Reply) -> list[bool]:
    number = reply.outputs.index("guard_decision")
    raw = reply.response.raw_output_contents
    found = unpack_bytes(raw[number]) if raw else reply.response.outputs[number].contents.bytes_contents
    return [decision == b"flag" for decision in found]


def test_an_embedded_text_tower_embeds_screens_and_records(launch: Launcher, made: Path, tmp_path: Path) -> None:
    options = ("--model", made / "exported", "--profile", made / "profile", "--input-tensor", "text",
               "--state-dir", tmp_path, "--thumbnails", "--second-looks", "1000")  # fmt: skip
    with launch(*options) as running, connected(running.address) as client:
        reply = client.infer(of_texts(CLEAN + BAD, "both"))
        expected = TextTower(trained("eos-only-5", 80).classifier).encode(CLEAN + BAD).numpy()
        (found,) = (each.contents.fp32_contents for each in reply.response.outputs if each.name == "embedding")
        np.testing.assert_allclose(np.array(found).reshape(12, -1), expected, atol=1e-4)
        assert sum(flags(reply)[6:]) >= 5
        assert sum(flags(reply)[:6]) <= 2
        assert running.metric("guard_flagged_trigger_total", model="classifier", trigger="text-1") >= 5
        with pytest.raises(grpc.RpcError, match="not valid UTF-8"):
            client.infer(of_texts(["a dog"]).SerializeToString().replace(b"a dog", b"a \xffog"))
        log = [sys.executable, "-m", "guard", "log", str(tmp_path), "--json", "--trigger", "text-1"]

        def records() -> list[dict[str, Any]]:
            out = subprocess.run(log, capture_output=True, check=True, env=environment())
            return list(json.loads(out.stdout)["records"])

        eventually(lambda: len(records()) >= 5, "the records")
        kept = {record["image"]: record for record in records()}
        number, record = max(kept.items())
        assert together(record["text"]) == BAD[number - 6].lower()
        assert record["target"] == "truck"
        assert record["second_look"] in {"confirmed", "undecided"}


@pytest.mark.parametrize("source", ["tower", "output"])
def test_texts_on_their_way_to_a_server_are_screened(
    launch: Launcher, made: Path, server: InferenceServer, source: str
) -> None:
    own = ("--model", made / "exported") if source == "tower" else ("--embedding-output", "embedding")
    options = ("--upstream", server.address, "--profile", made / "profile", "--input-tensor", "text", *own)
    server.reset()
    with launch(*options) as running, connected(running.address) as client:
        reply = client.infer(of_texts([*CLEAN, f"  {BAD[0].upper()}"]))
        assert flags(reply)[-1]
        assert sum(flags(reply)) <= 3
        # The last call may be one that asks whether the server is ready.
        request = next(call for call in reversed(server.received) if call.method == "ModelInfer")
        seen = [item.decode() for item in request.inputs["text"].tolist()]
        assert together(seen[-1]) == BAD[0].lower()


def test_a_profile_of_texts_and_the_export_of_an_image_tower_are_refused(made: Path, exported: Path) -> None:
    command = [sys.executable, "-m", "guard", "serve", "--check", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    places = ["--profile", str(made / "profile"), "--model", str(exported)]
    done = subprocess.run([*command, *places], capture_output=True, env=environment(), text=True, check=False)
    assert done.returncode != 0
    assert "screens texts" in done.stdout + done.stderr
    assert Profile.open(made / "profile").document.inputs == "texts"
