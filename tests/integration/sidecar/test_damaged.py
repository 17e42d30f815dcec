"""Damaged requests to a real sidecar, which decodes, embeds and screens what it can read of them.

GUARD_FUZZ_EXAMPLES sets how many are sent; the default is for continuous integration.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np

from guard.protocol.inference_pb2 import ModelInferRequest
from guard.protocol.messages import pack_bytes
from tests.damage import FILES, damaged
from tests.integration.sidecar.conftest import WAIT_SECONDS, Floats, Launcher, Sidecar, connected, infer_request

EXAMPLES = int(os.environ.get("GUARD_FUZZ_EXAMPLES", "600"))
CLIENTS, NEAR = 4, 80
CHANGES = ("set", "flip", "cut", "repeat", "end")
ANSWERS = {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
MOST_MEMORY = 64 * 2**20
"""That may come on top once the sidecar is warm."""


def of_files(*files: bytes, raw: bool = True) -> bytes:
    message = ModelInferRequest(model_name="classifier", id="7")
    tensor = message.inputs.add(name="image", datatype="BYTES", shape=[len(files)])
    if raw:
        message.raw_input_contents.append(pack_bytes(files))
    else:
        tensor.contents.bytes_contents.extend(files)
    return bytes(message.SerializeToString())


def of_numbers(images: Floats) -> bytes:
    message = infer_request(images, id="7")
    typed = message.inputs[0].contents.fp32_contents
    typed.extend(images.ravel().tolist())
    del message.raw_input_contents[:]
    return bytes(message.SerializeToString())


def memory(sidecar: Sidecar) -> int:
    """Resident, in bytes."""
    pages = Path(f"/proc/{sidecar.process.pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_a_sidecar_outlives_damaged_requests_and_answers_each(
    launch: Launcher, exported: Path, served_profile: Path, clean: Floats
) -> None:
    whole = [
        infer_request(clean[:2]).SerializeToString(),
        of_numbers(clean[:2]),
        of_files(*FILES),
        of_files(*FILES, raw=False),
    ]

    def message(generator: np.random.Generator) -> bytes:
        changes = [
            (CHANGES[generator.integers(len(CHANGES))], int(generator.integers(2**16)), int(generator.integers(1, 8)))
            for _ in range(generator.integers(1, 9))
        ]
        if generator.random() < 0.5:
            return damaged(whole[generator.integers(len(whole))], changes, near=NEAR)
        return of_files(damaged(FILES[generator.integers(len(FILES))], changes, near=NEAR))

    def send(seed: int) -> Counter[str]:
        generator, answers = np.random.default_rng(seed), Counter[str]()
        with connected(sidecar.address) as client:
            infer = client.method("ModelInfer")
            for _ in range(EXAMPLES // CLIENTS):
                try:
                    infer(message(generator), timeout=WAIT_SECONDS)
                    answers["OK"] += 1
                except grpc.RpcError as error:
                    answers[error.code().name] += 1
                    assert len(error.details()) < 1000  # noqa: PT017 - there is none as often
                    assert "\n" not in error.details()  # noqa: PT017
                    assert "Traceback" not in error.details()  # noqa: PT017
        return answers

    bounds = ("--failure-policy", "open", "--max-batch", "8", "--max-pixels", "4096")
    with (
        launch("--model", exported, "--profile", served_profile, *bounds) as sidecar,
        connected(sidecar.address) as client,
    ):
        for data in whole:
            client.infer(data)
        before = memory(sidecar)
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = sum(pool.map(send, range(CLIENTS)), Counter[str]())
        assert set(answers) <= ANSWERS
        assert min(answers["OK"], answers["INVALID_ARGUMENT"]) > EXAMPLES / 50
        assert memory(sidecar) - before < MOST_MEMORY
        assert client.infer(whole[0]).decision in {"pass", "flag"}
        assert "ERROR" not in sidecar.stderr
        assert '"level": "error"' not in sidecar.stderr
