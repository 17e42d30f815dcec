"""Damaged requests and images: they are refused with an error of guard's, in bounded memory, or they are served.

GUARD_FUZZ_EXAMPLES sets the number of examples of each test; continuous integration takes more than the default.
"""

import os
import tracemalloc
from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.classifiers import Preprocessing, decode
from guard.errors import ImageError, RequestError
from guard.protocol.dialects import StreamDialect
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse
from guard.protocol.messages import pack_bytes, parse_request, uses_shared_memory
from guard.protocol.tensors import (
    add_output,
    encoded_inputs,
    find_input,
    float_images,
    float_output,
    raw_contents,
)
from guard.sidecar.decisions.watch import input_digest
from guard.sidecar.inference import bypass
from guard.sidecar.inference.calls import RefusedError
from guard.sidecar.inference.screener import count_images
from tests.damage import FILES, damaged

EXAMPLES = int(os.environ.get("GUARD_FUZZ_EXAMPLES", "100"))
SIZE, MAX_BATCH, MAX_PIXELS = 8, 4, 4096
MOST_BYTES = 32 * 2**20
"""Far above what a request of these sizes needs, and far below what a length in a damaged one may claim."""
quick = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
IMAGES = np.linspace(-1, 1, 2 * 3 * SIZE * SIZE, dtype=np.float32).reshape(2, 3, SIZE, SIZE)
PREPROCESSING = Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def request(datatype: str, *, raw: bool) -> bytes:
    shape = IMAGES.shape if datatype == "FP32" else (len(FILES),)
    message = ModelInferRequest(model_name="m", id="7")
    tensor = message.inputs.add(name="image", datatype=datatype, shape=shape)
    if raw:
        message.raw_input_contents.append(IMAGES.tobytes() if datatype == "FP32" else pack_bytes(FILES))
    elif datatype == "FP32":
        tensor.contents.fp32_contents.extend(IMAGES.ravel().tolist())
    else:
        tensor.contents.bytes_contents.extend(FILES)
    message.outputs.add(name="logits").parameters["classification"].int64_param = 3
    return message.SerializeToString()


REQUESTS = [request(datatype, raw=raw) for datatype in ("FP32", "BYTES") for raw in (True, False)]
POSITIONS = st.integers(0, 2**16)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), POSITIONS, st.integers(0, 255)),
        st.tuples(st.just("flip"), POSITIONS, st.integers(0, 7)),
        st.tuples(st.just("cut"), POSITIONS, st.integers(1, 64)),
        st.tuples(st.just("repeat"), POSITIONS, st.integers(1, 64)),
        st.tuples(st.just("end"), POSITIONS, st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


def read_request(data: bytes) -> None:
    """All that a sidecar does with a request before the model runs."""
    message = parse_request(data)
    uses_shared_memory(message)
    count_images(message, "image")
    input_digest(message, 0, "image")
    index = find_input(message, "image")
    tensor, raw = message.inputs[index], raw_contents(message, index)
    if tensor.datatype == "BYTES":
        for file in encoded_inputs(tensor, raw, MAX_BATCH):
            PREPROCESSING(decode(file, max_pixels=MAX_PIXELS), max_pixels=MAX_PIXELS)
    else:
        images = float_images(tensor, raw, (3, SIZE, SIZE), MAX_BATCH)
        assert len(images) <= MAX_BATCH


def in_bounds(work: Callable[[], object]) -> None:
    """Nothing but guard's errors comes out, and none with more than a line; memory stays small."""
    # Tracing slows everything down several times over, hypothesis above all; it is on only here.
    tracemalloc.start()
    try:
        work()
    except (RequestError, ImageError, RefusedError) as error:
        assert len(str(error)) < 1000  # noqa: PT017 - there is none as often
        assert "\n" not in str(error)  # noqa: PT017
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES


@quick
@given(st.sampled_from(REQUESTS), CHANGES)
def test_a_damaged_request(data: bytes, changes: list[tuple[str, int, int]]) -> None:
    in_bounds(lambda: read_request(damaged(data, changes, near=80)))


@quick
@given(st.sampled_from(FILES), CHANGES, st.integers(0, 3))
def test_a_damaged_image(file: bytes, changes: list[tuple[str, int, int]], extra: int) -> None:
    message = ModelInferRequest(raw_input_contents=[pack_bytes([damaged(file, changes, near=60)] * (1 + extra))])
    message.inputs.add(name="image", datatype="BYTES", shape=[1 + extra])
    in_bounds(lambda: read_request(message.SerializeToString()))


@quick
@given(st.binary(max_size=300))
def test_anything_at_all(data: bytes) -> None:
    in_bounds(lambda: read_request(data))
    in_bounds(lambda: bypass.check_model_control(data, allowed=True))


async def nobody() -> str:
    return ""


@quick
@given(st.booleans(), CHANGES)
def test_a_damaged_reply_of_a_stream(
    enveloped: bool,  # noqa: FBT001
    changes: list[tuple[str, int, int]],
) -> None:
    response = ModelInferResponse(model_name="m", id="7")
    add_output(response, "embedding", IMAGES[0, 0], raw=True)
    data = response.SerializeToString()
    data = b"\x12" + bytes([len(data) & 127 | 128, len(data) >> 7]) + data if enveloped else data
    sent = damaged(data, changes, near=40)

    def read() -> None:
        if (found := StreamDialect("auto", nobody).read(sent)) is not None:
            float_output(found.response, "embedding")

    in_bounds(read)
