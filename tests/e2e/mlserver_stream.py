"""One stream of MLServer's own client: stream.py ADDRESS IN.npz OUT.npz; run in MLServer's environment.

IN has one array of images for each message, OUT the class scores and the decision of each reply.
"""

import sys
from collections.abc import Iterator

import grpc
import numpy as np
from mlserver.grpc import dataplane_pb2 as messages  # type: ignore[import-not-found]
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub  # type: ignore[import-not-found]

address, asked, answered = sys.argv[1:]


def requests() -> Iterator[messages.ModelInferRequest]:
    for images in np.load(asked).values():
        tensor = messages.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=images.shape)
        yield messages.ModelInferRequest(
            model_name="classifier", id="s", inputs=[tensor], raw_input_contents=[images.tobytes()]
        )


with grpc.insecure_channel(address) as channel:
    found = {}
    for index, reply in enumerate(GRPCInferenceServiceStub(channel).ModelStreamInfer(requests(), timeout=60)):
        place = [output.name for output in reply.outputs].index("logits")
        values = np.frombuffer(reply.raw_output_contents[place], np.float32)
        found[f"{index:03}"] = values.reshape(tuple(reply.outputs[place].shape))
        found[f"decision-{index:03}"] = np.array(reply.parameters["guard_decision"].string_param)
np.savez(answered, **found)  # type: ignore[arg-type] # numpy's stubs take the names for options
